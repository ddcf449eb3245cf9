"""Progress of a command on stderr: a bar on a terminal, else a line every few seconds, without carriage returns."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

BAR_S = 0.5  # between changes of a bar
LINE_S = 10.0  # between lines

Item = TypeVar("Item")


class Progress:
    """Progress of `total` units of work.

    Args:
      label: what is done.
      total: number of units.
      unit: name of one unit.
      done: units that an earlier run has done.
      delay_s: nothing is shown before so many seconds have passed.
      is_shown: False shows nothing, for all but one of several processes.
    """

    def __init__(
        self, label: str, total: int, unit: str, *, done: int = 0, delay_s: float = 0.0, is_shown: bool = True
    ):
        self._label, self._total, self._unit = label, total, unit
        self._done = self._first = self._shown = done
        self._began_s = self._shown_s = time.monotonic()
        self._delay_s, self._is_shown = delay_s, is_shown
        self._bar = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit=unit, delay=delay_s, mininterval=BAR_S, dynamic_ncols=True
            )
        self._interval_s = BAR_S if self._bar is not None else LINE_S

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def skip_to(self, done: int) -> None:
        """Count units that an earlier run has done."""
        num_skipped = done - self._done
        self._first += num_skipped
        self._shown += num_skipped
        self._done = done
        if self._bar is not None:
            for name in ("initial", "n", "last_print_n"):  # what tqdm takes its rate from
                setattr(self._bar, name, getattr(self._bar, name) + num_skipped)

    def start_here(self) -> None:
        """Take rates and the time that is left from the units that follow."""
        self._began_s = self._shown_s = time.monotonic()
        self._first = self._shown = self._done
        if self._bar is not None:
            self._bar.start_t = self._bar.last_print_t = time.time()

    def update(self, num: int = 1, note: Callable[[float], str] | None = None) -> None:
        """Count `num` more units and show the progress, if due.

        note: called only then with the units a second since the last time; returns what is shown instead of the rate.
        """
        self._done += num
        now_s = time.monotonic()
        is_due = now_s - self._shown_s >= self._interval_s or self._done == self._total
        if not self._is_shown or not is_due or now_s - self._began_s < self._delay_s:
            return
        rate = (self._done - max(self._shown, self._first)) / max(now_s - self._shown_s, 1e-9)
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note(rate), refresh=False)
            self._bar.update(self._done - self._shown)
        else:
            text = f"{rate:.1f} {self._unit}s/s" if note is None else note(rate)
            unit_s = (now_s - self._began_s) / max(self._done - self._first, 1)
            left = tqdm.format_interval((self._total - self._done) * unit_s)
            line = f"{self._label} {self._done}/{self._total}, {text}, {left} left"
            print(line, file=sys.stderr, flush=True)
        self._shown, self._shown_s = self._done, now_s


def track(items: Iterable[Item], total: int, label: str, unit: str, delay_s: float = 0.0) -> Iterator[Item]:
    """Yield the items, `total` in number, and show how many are done."""
    with Progress(label, total, unit, delay_s=delay_s) as progress:
        for item in items:
            yield item
            progress.update()
