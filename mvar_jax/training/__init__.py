"""Optimizer, training steps, checkpoints and the loop."""
