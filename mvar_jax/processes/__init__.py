"""The processes of one run: how they join, agree, and leave together."""
