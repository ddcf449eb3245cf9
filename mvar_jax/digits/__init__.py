"""The digits example: its judge, its curves and its report."""
