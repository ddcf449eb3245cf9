"""Machines, and compiling for machines that are not here."""
