"""What a run needs on machines that are not here: its own programs, compiled, with their memory, work and time."""
