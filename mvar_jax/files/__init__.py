"""Atomic writes of text, images, arrays and directories."""
