"""Stages that check results: the golden numbers at exact precision, and a killed run that is resumed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.parity import compare_golden
from benchmarks.stages.measure import TINY, jax_conditions
from benchmarks.stages.report import CONDITIONS, Report
from mvar_jax.errors import InputError
from mvar_jax.ops.precision import EXACT, computing

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def run_golden(args, report: Report) -> bool:
    """Compare with the golden numbers of the published programs; return whether all are within their tolerances."""
    report.add(CONDITIONS, **jax_conditions())
    with computing(EXACT):
        table = compare_golden()
    for quantity, worst, tolerance, is_ok in table.rows:
        report.add("golden numbers", quantity=quantity, worst=worst, tolerance=tolerance, ok=is_ok)
    return table.is_ok


def mvar(*arguments) -> list[str]:
    return [sys.executable, "-m", "mvar_jax", *map(str, arguments)]


def start(command: list[str]) -> subprocess.Popen:
    """Start a command that finds this checkout's mvar_jax, whatever the current folder is."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    return subprocess.Popen(command, env=environment)


def succeed(command: list[str]) -> None:
    """Run a command. Raises InputError unless it exits with 0; what it printed says why."""
    if status := start(command).wait():
        message = f"`{' '.join(command[1:4])}` must exit with 0, got {status}"
        raise InputError(message, field="stages", given=status, expected="0")


def losses_of(run: Path) -> dict[tuple, float]:
    """Return the losses that a run logged, by step and kind of line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    return {(row["step"], row["kind"]): row["loss"] for row in rows}


def kill_after(step: int, command: list[str], run: Path) -> int:
    """Start a training, kill it once it logged `step`, and return the last step that it logged."""
    process = start(command)
    while process.poll() is None and max(losses_of(run), default=(0, ""))[0] < step:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        message = f"training must still run at step {step} to be killed, but it ended with {process.returncode}"
        raise InputError(message, field="stages", given="resume", expected="a training that runs")
    return max(losses_of(run))[0]


def run_resume(args, report: Report) -> bool:
    """Train, kill, resume and sample; return whether all losses equal those of an undisturbed run.

    Every command is a process, one after the other, so this one does not use the device until they are done.
    """
    steps, killed_at = (24, 8) if args.size == TINY else (300, 60)
    cache = f"--compilation_cache={args.compilation_cache}"
    with tempfile.TemporaryDirectory() as folder:
        runs, config = Path(folder), CONFIGS / "debug_transformer.py"
        tokenizer, tokens = runs / "tokenizer", runs / "tokens"
        options = [f"--config.data.cache={tokens}", f"--config.num_steps={steps}", cache]
        options += [f"--config.save_every_steps={steps // 8}", f"--config.eval_every_steps={steps // 3}"]
        train = {name: mvar("train", "--config", config, *options, "--workdir", runs / name) for name in ("a", "b")}
        succeed(mvar("train", "--config", CONFIGS / "debug.py", cache, "--workdir", tokenizer))
        succeed(mvar("cache_tokens", "--config", config, "--tokenizer", tokenizer, "--out", tokens, cache))
        succeed(train["a"])
        step = kill_after(killed_at, train["b"], runs / "b")
        succeed(train["b"])
        draw = ["--labels", "3,4", "--num", 2, "--cfg", 1.5, "--out", runs / "samples", cache]
        succeed(mvar("sample", "--checkpoint", runs / "b", *draw))
        whole, resumed = losses_of(runs / "a"), losses_of(runs / "b")
        num_samples = len(list((runs / "samples").rglob("*.png")))
    num_different = sum(resumed.get(key) != loss for key, loss in whole.items())
    is_ok = num_different == 0 and len(whole) == len(resumed) and num_samples > 0
    report.add(CONDITIONS, **jax_conditions())
    cells = {"steps": steps, "killed after step": step, "logged losses": len(whole)}
    report.add("kill and resume", **cells, **{"losses that differ": num_different}, samples=num_samples, ok=is_ok)
    return is_ok
