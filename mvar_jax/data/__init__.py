"""Labelled images and token caches: where they come from, how they are transformed, how they are batched."""
