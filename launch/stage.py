"""Run one stage of a recipe once and log its cost. Standard library only.

    python launch/stage.py --log runs/x/stages.json --name tokenizer --makes PATH [PATH ...] -- COMMAND ...

A stage is skipped if it finished with the same command and its outputs still exist. A stage that starts from the
beginning makes the later entries of the log out of date: they are removed, and those stages run again. The cost of an
interrupted or failed attempt is added to the next attempt with the same command. Each entry holds `wall_s`, `cpu_s`
(user and system, all processes the command waited for), `peak_rss_mib` (its largest single process), `num_attempts`
and `finished`. The exit status is the command's; death by signal n is 128 + n.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def fail(message: str, status: int):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--log", type=Path, required=True, help="JSON file with one entry for every stage")
    parser.add_argument("--name", required=True, help="the stage's entry in the log")
    parser.add_argument("--makes", nargs="+", required=True, metavar="PATH", help="what the command writes")
    options = parser.parse_args(arguments[:split])
    if not arguments[split + 1 :]:
        parser.error("no command after --")
    return options, arguments[split + 1 :]


def read_log(path: Path) -> dict:
    try:
        log = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        log = None
    if not isinstance(log, dict):
        fail(f"--log {path} is not a log of stages; remove it to start over", 2)
    return log


def write_log(path: Path, log: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(log, indent=1) + "\n")
    os.replace(temporary, path)


def run_child(command: list[str]) -> int:
    """Return the command's exit status, or 128 + n if signal n ended it or was sent to this program.

    Ctrl-C and hang-up reach the child through the process group; sending them a second time could cut its clean-up
    short. SIGTERM is commonly sent to one process only, so it is passed on. The child is always awaited; after a
    signal its work counts as unfinished, whatever its exit status.
    """
    received, child = [], None

    def note(number, frame):
        received.append(number)
        if child and number == signal.SIGTERM:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}", 127 if isinstance(error, FileNotFoundError) else 126)
    if signal.SIGTERM in received:
        child.terminate()
    status = child.wait()
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def main(arguments: list[str]) -> int:
    options, command = parse(arguments)
    log = read_log(options.log)
    entry = log.get(options.name, {})
    is_same = entry.get("command") == command
    if is_same and entry["finished"] and all(os.path.exists(path) for path in options.makes):
        print(f"{options.name}: done before, {entry['wall_s']:.0f} s", flush=True)
        return 0
    if not is_same or entry["finished"]:
        names = list(log)
        kept = names[: names.index(options.name)] if options.name in log else names
        log = {name: log[name] for name in kept}
        entry = {"command": command, "wall_s": 0.0, "cpu_s": 0.0, "peak_rss_mib": 0.0, "num_attempts": 0}

    start_s = time.monotonic()
    status = run_child(command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    missing = [path for path in options.makes if not os.path.exists(path)]
    entry["wall_s"] += time.monotonic() - start_s
    entry["cpu_s"] += used.ru_utime + used.ru_stime
    rss_mib = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # Linux counts in KiB
    entry["peak_rss_mib"] = max(entry["peak_rss_mib"], rss_mib)
    entry["num_attempts"] += 1
    entry["finished"] = status == 0 and not missing
    log[options.name] = entry
    write_log(options.log, log)
    if status == 0 and missing:
        fail(f"{options.name} exited with status 0 but did not make {', '.join(missing)}", 1)
    outcome = "done" if status == 0 else f"stopped with status {status}"
    cost = f"{entry['wall_s']:.0f} s, CPU {entry['cpu_s']:.0f} s, peak {entry['peak_rss_mib']:.0f} MiB"
    print(f"{options.name}: {outcome}, {cost}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
