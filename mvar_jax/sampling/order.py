"""Which samples are drawn, and in which order files and arrays hold them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mvar_jax.checkpoints.model_directory import fingerprint
from mvar_jax.files.json_files import read_json
from mvar_jax.models.networks import Networks
from mvar_jax.ops.precision import EXACT
from mvar_jax.processes.holding import OUTPUTS
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.values import as_integer, as_num_each, as_seed

ORDER_KEY = "order"


def spread_labels(num_labels: int, num: int) -> np.ndarray:
    """Return which of the labels each of `num` samples has, `[num]`: one round over all labels after another.

    The samples of a last round that is not whole are spread evenly over the labels, as few samples are.
    """
    rounds, rest = divmod(num, num_labels)
    last = np.arange(rest) * num_labels // max(1, rest)
    return np.concatenate([np.tile(np.arange(num_labels), rounds), last])


@dataclasses.dataclass(frozen=True)
class Order:
    """The samples to draw: `num` of each label, or with `total` so many in all.

    Samples are numbered label by label, and sample i is a function of (weights, its label, seed, i, options). Files
    and arrays hold them round-robin over the labels: the published evaluator takes the inception score of parts in
    file order, which is far too low for images sorted by class. An interruption loses at most the batches that are
    being computed or written. Raises InputError if a number is out of range.

    is_by_label: files and arrays hold the samples in the order of their numbers, as earlier versions wrote them.
    total: samples in all, see `spread_labels` for their labels; None for `num` of each label.
    """

    labels: tuple[int, ...]
    num: int
    options: SampleOptions
    seed: int = 0
    batch_size: int = 64
    saves_tokens: bool = False
    truncates: bool = False
    is_by_label: bool = False
    total: int | None = None

    @classmethod
    def of_total(cls, labels: tuple[int, ...], total: int, options: SampleOptions, **others) -> "Order":
        """Return the order of `total` samples, spread evenly over the labels. others: further fields."""
        return cls(labels, -(-total // len(labels)), options, **others, total=total)

    def __post_init__(self):
        as_seed(self.seed)
        most = as_num_each(self.num, len(self.labels)) * len(self.labels)
        if self.total is not None:
            as_integer(self.total, "total", most - len(self.labels) + 1, most)
        as_integer(self.batch_size, "batch_size", 1)

    @functools.cached_property
    def numbers_N(self) -> np.ndarray:
        """Return the number of the sample in each file."""
        num_labels, total = len(self.labels), self._total
        if self.is_by_label:
            return np.arange(total, dtype=np.uint32)
        numbers_N = spread_labels(num_labels, total) * self.num + np.arange(total) // num_labels
        return numbers_N.astype(np.uint32)

    @functools.cached_property
    def labels_N(self) -> np.ndarray:
        """Return the label of the sample in each file."""
        return np.asarray(self.labels, np.int32)[self.numbers_N // self.num]

    def identity(self, networks: Networks) -> dict:
        """Return everything that the files' bytes depend on, by the names of the command's options."""
        model, weights = networks.transformer, identify_weights(networks)
        return {
            # the precision is part of it; folders of 0.1.0 do not name one
            "dtype": jnp.dtype(model.dtype).name + ", exact" * (model.precision == EXACT),
            "checkpoint": weights["checkpoint"],
            "labels": _as_ranges(self.labels),
            "num": self.num,
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "save_tokens": self.saves_tokens,
            "truncate_uint8": self.truncates,
            **({} if self.is_by_label else {ORDER_KEY: self._describe_rounds()}),
            "refiner": weights["refiner"],
            "switch": weights["switch"],
        }

    @property
    def _total(self) -> int:
        return len(self.labels) * self.num if self.total is None else self.total

    def _describe_rounds(self) -> str:
        return "round-robin" + ", the last round spread over the labels" * bool(self._total % len(self.labels))


def identify_weights(networks: Networks) -> dict[str, str | None]:
    """Return the part of `Order.identity` that tells weights: checkpoint, refiner and switch; None for no such part.

    Older folders have neither of the last two.
    """
    model, refiner, switch = networks.transformer, None, None
    if networks.refiner is not None:
        refiner = "weights " + fingerprint(networks.refiner, networks.refiner_params)[:16]
    if networks.later is not None:
        later = identify_weights(networks.parts()[1])
        words = ", refiner ".join(filter(None, (later["checkpoint"], later["refiner"])))
        switch = f"{networks.switch}: {words}"
    checkpoint = fingerprint(model, networks.params)[:16]
    checkpoint += fingerprint(networks.tokenizer, networks.tokenizer_params)[:16]
    return {"checkpoint": f"weights {checkpoint}", "refiner": refiner, "switch": switch}


def is_by_label(out: Path) -> bool:
    """Return whether an earlier version began the samples in a folder: its options do not name their order."""
    try:
        return ORDER_KEY not in read_json(out / OUTPUTS["sample"].identity, dict[str, Any])
    except (OSError, ValueError):  # there is none, or a damaged one, which `owned_folder` refuses
        return False


def _as_ranges(labels: tuple[int, ...]) -> str:
    """Write (0, 1, 2, 7) as "0-2,7"."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][1] + 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
