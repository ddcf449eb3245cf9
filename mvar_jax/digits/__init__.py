"""The digits example: its judge, its report."""
