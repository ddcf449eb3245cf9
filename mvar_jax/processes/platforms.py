"""Why jax's first backend did not start: JAX_PLATFORMS names what is not here, or a device is busy or broken."""

import difflib
import importlib.util
import os
from collections.abc import Iterator

from mvar_jax.errors import InputError

VARIABLE = "JAX_PLATFORMS"
_PLUGINS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "tpu": ("libtpu",),
}
_EXTRAS = {"cuda": "cuda12 or cuda13", "gpu": "cuda12 or cuda13", "tpu": "tpu"}
_ALIASES = {"gpu": "cuda"}


def installed() -> tuple[str, ...]:
    """Return the platforms whose plugin for jax is installed."""
    is_there = importlib.util.find_spec
    return tuple(name for name, plugins in _PLUGINS.items() if not plugins or any(map(is_there, plugins)))


def explain(error: BaseException) -> InputError | None:
    """Return an InputError that explains a failed start of jax's first backend; None for any other error."""
    if not any(_passed_start(link) for link in _chain(error)):
        return None
    given, here = os.environ.get(VARIABLE, ""), installed()
    absent = [name for name in filter(None, given.split(",")) if _ALIASES.get(name, name) not in here]
    advice = f"unset {VARIABLE} or set it to cpu"
    if not given:
        words = f"jax finds no device that starts ({_reason(error)}); set {VARIABLE}=cpu to use the CPU"
    elif not absent:
        words = f"{VARIABLE}={given} does not start here ({_reason(error)}); {advice}"
    elif absent[0] in _EXTRAS:
        words = f"{VARIABLE}={given} needs the extra {_EXTRAS[absent[0]]} (installed here: {', '.join(here)}); "
        words += f"install it, or {advice}"
    else:
        near = difflib.get_close_matches(absent[0], (*_PLUGINS, *_ALIASES), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        words = f"{VARIABLE} must name platforms that jax knows (installed here: {', '.join(here)}), got {given!r}."
        words += f"{hint} Else {advice}"
    return InputError(words, field=VARIABLE, given=given, expected=", ".join(here))


def _reason(error: BaseException) -> str:
    """Return jax's reason without its own advice, in one line."""
    text = " ".join(str(error).split())
    for advice in (" (set JAX_PLATFORMS", " (you may need to"):
        text = text.partition(advice)[0]
    if text.startswith("Unable to initialize backend"):
        text = text.partition(": ")[2]
    return text[:200] or "no device is visible"


def _passed_start(error: BaseException) -> bool:
    """Return whether an exception passed through the function of jax that starts all backends."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "backends" and frame.f_globals.get("__name__") == "jax._src.xla_bridge":
            return True
        trace = trace.tb_next
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what caused it: jax cuts its own frames out of the first and keeps them in the next."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
