"""Judges, figures, pictures and the report: what a finished run is held to."""
