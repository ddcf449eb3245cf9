"""Model directories, checkpoints of a run, the best of them, class names."""
