"""The commands; each module has SUMMARY, add_arguments(parser) and run(args) -> exit status."""
