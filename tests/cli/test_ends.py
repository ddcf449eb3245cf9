"""How commands end: by signals, without a terminal, with nobody who reads what they print."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvar_jax.__main__ import main
from mvar_jax.sampling import bulk
from mvar_jax.stopping import STOPPED_STATUS, StopFlag
from mvar_jax.tokens import encode

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "tests/training/plain_train.py", "train", "--config", "configs/debug.py"]
# makes stdin the terminal of the process's session, whose end is then the process's own
BECOME = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
ON_TERMINAL = [sys.executable, "-c", BECOME]
LONG = ["--config.num_steps=1000000", "--config.eval_every_steps=0", "--config.keep_checkpoints=1"]


@contextlib.contextmanager
def start(command, **options):
    """A process in a session of its own, which does not outlive the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


def wait_until(is_there, process) -> None:
    deadline_s = time.monotonic() + 120
    while not is_there():
        assert process.poll() is None, f"the process ended early with status {process.returncode}"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def checkpoint_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def test_training_goes_on_to_its_end_if_nobody_reads_what_it_prints(tmp_path):
    with start([*TRAIN, "--workdir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.close()
        assert process.wait(120) == 0
    assert checkpoint_steps(tmp_path)[-1] == 12


def test_training_whose_terminal_goes_away_saves_and_says_so_by_its_status(tmp_path):
    """The terminal's end is a SIGHUP, and every later write to it is an error."""
    master, terminal = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with start([*ON_TERMINAL, *TRAIN, *LONG, "--workdir", str(tmp_path)], **streams) as process:
        os.close(terminal)
        wait_until(lambda: checkpoint_steps(tmp_path), process)
        before = checkpoint_steps(tmp_path)[-1]
        os.close(master)
        assert process.wait(120) == STOPPED_STATUS
    assert checkpoint_steps(tmp_path)[-1] > before


def test_training_stopped_by_sigterm_saves_and_says_so_by_its_status(tmp_path):
    with start([*TRAIN, *LONG, "--workdir", str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: checkpoint_steps(tmp_path), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    step = checkpoint_steps(tmp_path)[-1]
    assert process.returncode == STOPPED_STATUS
    assert f"stopped by SIGTERM at step {step} of 1000000" in output and "the same command continues" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_before_the_work_begins_gives_the_same_status_and_leaves_nothing(tmp_path, number):
    config, marker = tmp_path / "slow.py", tmp_path / "reading"
    config.write_text(f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(300)\n")
    command = [*TRAIN[:-1], str(config), "--workdir", str(tmp_path / "run")]
    with start(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(marker.exists, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED_STATUS and not (tmp_path / "run").exists()
    assert errors == f"stopped by {number.name}; the same command continues\n"


SLOW_TO_END = """
import atexit, pathlib, time

def end_slowly():
    pathlib.Path({ending!r}).touch()
    time.sleep(300)

{register}
try:
    pathlib.Path({reading!r}).touch()
    time.sleep(300)
finally:
    {unwind}
"""


@pytest.mark.parametrize("moment", ["unwinding", "exiting"])
def test_second_interrupt_ends_a_command_that_is_ending_without_a_traceback(tmp_path, moment):
    config, reading, ending = tmp_path / "slow.py", tmp_path / "reading", tmp_path / "ending"
    calls = {"register": "atexit.register(end_slowly)", "unwind": "pass"}
    if moment == "unwinding":
        calls = {"register": "", "unwind": "end_slowly()"}
    config.write_text(SLOW_TO_END.format(reading=str(reading), ending=str(ending), **calls))
    with start([*TRAIN[:-1], str(config), "--workdir", str(tmp_path / "run")], stderr=subprocess.PIPE) as process:
        for marker in (reading, ending):
            wait_until(marker.exists, process)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert errors == (b"interrupted\n" if moment == "exiting" else b"")


def test_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.raise_if_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# a process that was started without its standard streams, or whose disk is full, opens a file and prints
PRINTING = """
import os, sys
from mvar_jax.cli.streams import guard_streams
guard_streams()
number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("lost", flush=True)
print("lost", file=sys.stderr)
os.write(1, b"lost")
os.write(number, str(number).encode())
"""


@pytest.mark.parametrize("streams", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_what_cannot_be_printed_neither_fails_nor_lands_in_another_file(tmp_path, streams):
    command = f'"{sys.executable}" -c \'{PRINTING}\' "{tmp_path}/file" {streams}'
    if "full" in streams:
        command = command.replace('os.write(1, b"lost")', "")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sampling_stopped_by_a_signal_continues_to_the_same_files(run, tmp_path, monkeypatch, capsys):
    command = ["sample", "--checkpoint", run.transformer, "--labels", "0,1", "--num", "6", "--batch_size", "2"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    save, saved = bulk.save_png, []

    def save_and_stop(path, image):
        save(path, image)
        saved.append(path.name)
        if path.name == "000002.png":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the main thread sees it before it draws all the rest

    monkeypatch.setattr(bulk, "save_png", save_and_stop)
    monkeypatch.setattr(bulk, "_start", lambda *args, start=bulk._start: (time.sleep(0.1), start(*args))[1])
    assert main([*command, "--out", str(tmp_path / "stopped")]) == STOPPED_STATUS
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err
    left = files_of(tmp_path / "stopped")
    assert sorted(saved) == [name for name in sorted(left) if name.endswith(".png")], "an image is half written"
    finished = [name for name in left if name.startswith("unfinished")]
    assert len(finished) == len(saved) // 2 < 6, "what was drawn is kept, and the rest was not drawn"
    monkeypatch.undo()
    assert main([*command, "--out", str(tmp_path / "stopped")]) == 0
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_caching_stopped_by_a_signal_continues_to_the_same_files(run, tmp_path, monkeypatch, capsys):
    command = [*run.cache, "--images_per_shard", "8", "--batch_size", "4"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    encode_some = encode.encode_range

    def encode_and_stop(encoder, source, transform, begin, end, **options):
        for number, record in enumerate(encode_some(encoder, source, transform, begin, end, **options), begin):
            yield record
            if number == 9:
                os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(encode, "encode_range", encode_and_stop)
    assert main([*command, "--out", str(tmp_path / "stopped")]) == STOPPED_STATUS
    assert "stopped by SIGHUP; the same command continues" in capsys.readouterr().err
    shards = {path.name for path in (tmp_path / "stopped").rglob("*.array_record*")}
    first = "train-00000-of-00003.array_record"
    assert shards == {first, f"{first}.json"}, "the finished shard alone"
    monkeypatch.undo()
    assert main([*command, "--out", str(tmp_path / "stopped")]) == 0
    # the copy of the tokenizer is a checkpoint, which holds the time
    whole, resumed = (
        {name: data for name, data in files_of(tmp_path / folder).items() if not name.startswith("tokenizer/")}
        for folder in ("whole", "stopped")
    )
    assert whole == resumed and "cache.json" in whole
