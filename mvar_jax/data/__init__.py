"""Labelled images: sources, transforms, batches."""
