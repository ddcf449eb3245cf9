"""Compiling for machines that are not here, and what that says of memory and work."""
