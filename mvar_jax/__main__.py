"""`python -m mvar_jax COMMAND`: the command line."""

import argparse
import atexit
import gc
import importlib
import sys

from mvar_jax.cli.streams import guard_streams
from mvar_jax.data.pillow_warnings import ignore_pillow_warnings
from mvar_jax.processes.join import OFF
from mvar_jax.processes.together import run_together
from mvar_jax.stopping import LOST_STATUS, STOPPED_STATUS, end_on_signals, raise_on_signals

COMMANDS = ("train", "plan", "data", "cache_tokens", "sample", "edit", "reconstruct", "evaluate", "sweep", "convert")
COMMANDS += ("report",)
EXIT_STATUSES = (
    "Exit status: 0 complete; 1 failed; 2 bad input, nothing changed; 130 stopped by Ctrl-C; "
    f"{STOPPED_STATUS} stopped early by SIGTERM or SIGHUP (time limit, preemption, maintenance, lost terminal): the "
    f"same command continues; {LOST_STATUS} another process of the run was lost: the same command continues."
)


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage text."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands and their arguments; imports no heavy library."""
    parser = Parser(prog="mvar", description="MVAR in JAX: train, sample, edit, evaluate.", epilog=EXIT_STATUSES)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"mvar_jax.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status, see EXIT_STATUSES and `run_together`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(argv)
    takes_overrides = args.command in ("train", "plan", "data", "cache_tokens")
    unknown = [a for a in rest if not (takes_overrides and a.startswith("--config."))]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = rest
    return run_together(lambda: args.run(args), getattr(args, "distributed", OFF))


def start() -> int:
    """Run `main` as the entry point of a process."""
    guard_streams()
    raise_on_signals()
    # tracing creates many objects that stay alive; collecting them often, and at exit, takes a tenth of a short run
    gc.set_threshold(200_000, 20, 100)
    atexit.register(gc.freeze)
    ignore_pillow_warnings()
    try:
        return main()
    except KeyboardInterrupt:  # while an earlier signal was answered
        return 130
    finally:
        end_on_signals()


if __name__ == "__main__":
    sys.exit(start())
