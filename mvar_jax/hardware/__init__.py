"""Known machines, and compilation for machines that are not here."""
