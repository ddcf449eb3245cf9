"""Sampling of token pyramids, scale by scale, and what is built on it: editing, bulk sampling, analysis."""
