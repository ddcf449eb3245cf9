"""Learning-rate and weight-decay schedules in host floats (docs/method.md, Training)."""

import math
import re

from mvar_jax.errors import InputError

FLAT_SHARES = {"lin0": 0.05, "lin": 0.15, "lin00": 0.0, "exp": 0.15}


def check_schedule(name: str) -> None:
    """Raise InputError if the schedule is unknown."""
    if name != "cos" and name not in FLAT_SHARES and not _is_two_piece(name):
        known = "cos, lin, lin0, lin00, exp, or lin<T> with 0 < T < 1 such as lin0.3"
        words = f"config.optimizer.schedule must be one of {known}, got {name!r}"
        raise InputError(words, field="config.optimizer.schedule", given=name, expected=known)


def _is_two_piece(name: str) -> bool:
    return bool(re.fullmatch(r"lin0?\.\d+", name)) and 0 < float(name[3:]) < 1


def learning_rate_factor(
    name: str, iteration: int, num_iterations: int, warmup: int, start: float, end: float
) -> float:
    """Return the multiple of the peak learning rate at `iteration` of `num_iterations`.

    warmup: iterations of linear growth from the multiple `start`; end: multiple at the last iteration.
    """
    if iteration < warmup:
        return start + (1 - start) * iteration / warmup
    p = (iteration - warmup) / max(num_iterations - 1 - warmup, 1)
    if name == "cos":
        return end + (1 - end) * (1 + math.cos(math.pi * p)) / 2
    if _is_two_piece(name):
        T = float(name[3:])
        knee = (1 + end + (1 - end) * (1 - T)) / 2
        return 1 + (knee - 1) * p / T if p < T else knee + (end - knee) * (p - T) / (1 - T)
    flat = FLAT_SHARES[name]
    if p < flat:
        return 1.0
    rest = (p - flat) / (1 - flat)
    return end**rest if name == "exp" else 1 - (1 - end) * rest


def weight_decay_at(iteration: int, num_iterations: int, first: float, last: float) -> float:
    """Return the weight decay: a cosine from `first` at iteration 0 to `last` at the end."""
    return last + (first - last) * (1 + math.cos(math.pi * iteration / max(num_iterations - 1, 1))) / 2
