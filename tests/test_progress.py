"""Progress is a bar on a terminal, and elsewhere plain lines."""

import io
import sys

import pytest

from mvar_jax import progress
from mvar_jax.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    with Progress("encode", 40, "image", done=8) as shown:
        shown.skip_to(10)
        for _ in range(30):
            clock[0] += progress.LINE_S / 10
            shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "encode 20/40, 1.0 images/s, 00:20 left",
        "encode 30/40, 1.0 images/s, 00:10 left",
        "encode 40/40, 1.0 images/s, 00:00 left",
    ]


def test_a_bar_takes_its_rate_from_what_this_run_has_done(clock, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("encode", 10_000, "image") as shown:
        shown.skip_to(9_000)
        bar = shown._bar
        assert (bar.initial, bar.n) == (9_000, 9_000)
        clock[0] += 10
        shown.update(100)
        assert bar.n == 9_100 and bar.n - bar.initial == 100


def test_short_work_with_a_delay_and_other_processes_are_not_shown(clock, capsys):
    assert list(track("ab", 2, "index", "tar", delay_s=1.0)) == ["a", "b"]
    with Progress("sample", 1, "image", is_shown=False) as shown:
        shown.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("step", 3, "step") as shown:
        for _ in range(3):
            shown.update(note=lambda rate: "loss 1")
    text = sys.stderr.getvalue()
    assert "3/3" in text and "loss 1" in text and text.count("\n") == 1 and "\r" in text
