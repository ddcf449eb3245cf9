"""Evaluation of image sets: reconstructions with their scores, and statistics between sets."""
