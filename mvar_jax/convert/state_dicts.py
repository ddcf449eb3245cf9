"""The state dict of one module, wherever a file of weights holds it."""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mvar_jax.convert.files import WeightsFile
from mvar_jax.convert.tensors import Foreign, Tensor
from mvar_jax.errors import InputError

# the published trainers' names of a state dict
WRAPPERS = {"tokenizer": ("vae_local",), "transformer": ("mvar_wo_ddp", "var_wo_ddp")}
MARKERS = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
# parts of names that torch's own wrappers of a module add
MODULE_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MAX_DEPTH = 4  # of dictionaries in dictionaries
MAX_TENSORS = 10_000
MAX_PREFIXES = 16
SHOWN_NAMES = 8


@dataclasses.dataclass(frozen=True)
class StateDict(Mapping):
    """The state dict of one module; a tensor is read on access.

    Attributes:
      name: the keys under which it was found, such as trainer.mvar_wo_ddp; "" for a plain file.
      settings: command-line settings stored in a training checkpoint.
    """

    file: WeightsFile
    tensors: dict[str, Tensor]
    name: str
    settings: dict

    def __getitem__(self, name: str) -> np.ndarray:
        return self.file.read(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def sizes(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises InputError if it is missing, empty or of another rank."""
        if name not in self.tensors:
            raise self.refuse(f"tensor {name} is missing")
        shape = self.tensors[name].shape
        if len(shape) != num_axes or 0 in shape:
            raise self.refuse(f"tensor {name} must have {num_axes} axes and not be empty, got shape {list(shape)}")
        return shape

    def count(self, pattern: str) -> int:
        """Return the number of tensors whose whole name matches."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)

    def refuse(self, reason: str) -> InputError:
        """Return an InputError with the reason why the state dict cannot be converted."""
        message = f"{self.file.field}={self.file.path} cannot be converted: {reason}"
        return InputError(message, field=self.file.field, given=str(self.file.path), expected=reason)


class Candidate(NamedTuple):
    """A state dict that a file may hold: the name of its place, as in StateDict, and its tensors without prefix."""

    name: str
    tensors: dict


def is_named(name: str, key: str) -> bool:
    """Return whether `key` is the name of a state dict's place, or its last part."""
    return key in (name, name.rpartition(".")[2])


def find_state_dict(kind: str, file: WeightsFile, chosen: str | None = None) -> StateDict:
    """Find the state dict of a tokenizer or transformer in a file: plain, or in dictionaries of any name.

    Names may carry prefixes: those of torch's wrappers, or a module's name as in `model.pos_1LC`. If there are
    several, `chosen` names one, as in `StateDict.name` or by its last part; else the plain one is taken, or the one
    of the published trainers.

    Raises InputError if the file has no state dict, only one of the other module, or several of which none is chosen.
    """
    found = list(find_candidates(kind, file))
    if not found:
        raise _refuse_missing(kind, file)
    name, tensors = choose(kind, file, found, chosen)
    if len(tensors) > MAX_TENSORS:
        raise file.refuse(f"its state dict has {len(tensors)} entries, more than {MAX_TENSORS}")
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not isinstance(key, str):
            what = tensor.class_name if isinstance(tensor, Foreign) else type(tensor).__name__
            shown = key[:100] if isinstance(key, str) else type(key).__name__
            message = f"{file.field}={file.path} must hold tensors by name, got {shown!a}: {what[:100]}"
            raise InputError(message, field=file.field, given=str(file.path), expected="tensors by name")
    # expanded tensors, and those of one storage, may take more memory than the file
    file.check_unpacked(sum(8 * math.prod(tensor.shape) for tensor in tensors.values()))
    settings = file.content.get("args")
    settings = settings.attributes if isinstance(settings, Foreign) else settings  # an argparse.Namespace
    return StateDict(file, tensors, name, settings if isinstance(settings, dict) else {})


def find_candidates(kind: str, file: WeightsFile) -> Iterator[Candidate]:
    """Yield the state dicts of this kind, those in fewer dictionaries first."""
    level, seen = [((), file.content)], set()
    for _ in range(MAX_DEPTH):
        below = []
        for where, node in level:
            if not isinstance(node, dict) or id(node) in seen:
                continue
            seen.add(id(node))
            found = list(_split_prefixes(kind, file, where, node))
            yield from found
            if not found:
                below += [((*where, name), value) for name, value in node.items() if isinstance(name, str)]
        level = below


def _split_prefixes(kind: str, file: WeightsFile, where: tuple[str, ...], node: dict) -> Iterator[Candidate]:
    """Yield the state dicts in one dictionary, one for each prefix of the marker."""
    marker = MARKERS[kind]
    names = {_without_wrappers(key) if isinstance(key, str) else key: key for key in node}
    texts = [name for name in names if isinstance(name, str)]
    prefixes = [name.removesuffix(marker) for name in texts if f".{name}".endswith(f".{marker}")]
    if prefixes and len(names) < len(node):
        raise file.refuse("two of its tensors have one name without the prefixes of torch's wrappers")
    for prefix in prefixes[:MAX_PREFIXES]:
        below = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        is_below = lambda name, below=below: isinstance(name, str) and name.startswith(below)
        own = [name for name in (texts if prefix else names) if not is_below(name)]
        if prefix:
            tensors = {name.removeprefix(prefix): node[names[name]] for name in own if name.startswith(prefix)}
        else:
            tensors = {name: node[names[name]] for name in own}
        yield Candidate(".".join([*where, *prefix.split(".")[:-1]]), tensors)


def _without_wrappers(name: str) -> str:
    """Return a tensor's name without the parts that torch's wrappers of a module add, such as `module.`."""
    return ".".join(part for part in name.split(".") if part not in MODULE_WRAPPERS)


def choose(kind: str, file: WeightsFile, found: list[Candidate], key: str | None) -> Candidate:
    """Return the candidate that `key` names, or the plain, the published or the only one.

    Raises InputError if that decides nothing.
    """
    names = [candidate.name for candidate in found]
    listed = ", ".join(name[:100] or "plain" for name in names[:SHOWN_NAMES])
    if key is not None and len(found) > 1:
        chosen = [c for c in found if is_named(c.name, key)]
        if len(chosen) != 1:
            message = f"--weights must be one of {listed}, the state dicts in {file.field}={file.path}, got {key!r}"
            raise InputError(message, field="weights", given=key, expected=listed)
        return chosen[0]
    published = [c for name in WRAPPERS[kind] for c in found if is_named(c.name, name)]
    chosen = [c for c in found if not c.name] + published
    if not chosen and len(found) > 1:
        message = (
            f"{file.field}={file.path} holds {len(found)} state dicts, {listed}: choose one by convert --weights"
        )
        raise InputError(message, field="weights", given=None, expected=listed)
    taken = chosen[0] if chosen else found[0]
    if len(found) > 1:
        words = f"the {kind} is {taken.name or 'plain'} of {listed} in {file.path}; --weights chooses another"
        print(words, file=sys.stderr, flush=True)
    return taken


def _refuse_missing(kind: str, file: WeightsFile) -> InputError:
    other = next(name for name in MARKERS if name != kind)
    hint = ""
    if isinstance(file.content, Foreign):
        hint = f"; it holds a whole object of {file.content.class_name[:100]!a}: save its state_dict() instead"
    elif next(find_candidates(other, file), None) is not None:
        hint = f"; it holds a {other}, give it as --{other}"
    expected = f"a {kind}'s state dict with {MARKERS[kind]}, plain or in a dictionary"
    message = f"{file.field}={file.path} must hold {expected}{hint}"
    return InputError(message, field=file.field, given=str(file.path), expected=expected)
