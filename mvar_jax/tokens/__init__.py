"""Encoding images to token ids, and token caches."""
