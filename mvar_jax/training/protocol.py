"""What the loop asks of a task."""

import abc
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Task(abc.ABC):
    """A model in training. Its state is a dataclass pytree with step, params, ema, opt_state and extra.

    Attributes:
      examples_per_step: images of a step.
      has_evaluation: whether there are validation data.
      metrics: names of the numbers of an evaluation; () if they are not known beforehand.
      data_identity: what the data are, wherever they lie, as a JSON object: a run resumes only with the same.
    """

    examples_per_step: int
    has_evaluation: bool = True
    metrics: tuple[str, ...] = ()
    data_identity: dict[str, Any] = {}  # noqa: RUF012

    @abc.abstractmethod
    def init_state(self) -> Any:
        """Return the state of step 0, placed on the mesh: a function of the seed alone."""

    @abc.abstractmethod
    def abstract_state(self) -> Any:
        """Return the state as ShapeDtypeStructs with shardings."""

    @abc.abstractmethod
    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of steps start_step, start_step + 1, ...; a step has the same batch in every run."""

    @abc.abstractmethod
    def train_step(self, state: Any, batch: dict[str, np.ndarray], step: int) -> tuple[Any, dict[str, jax.Array]]:
        """Dispatch one step, which may donate `state`; return the new state and metrics.

        Metrics are scalars or [S] vectors, among them `loss` and `is_bad`: 1 if the loss or the gradient was
        not finite. Such a step must leave the weights as they were.
        """

    def scales_of_step(self, step: int) -> tuple[int, ...] | None:
        """Return the scales of the [S] vectors that a step measures, None if every step measures all."""
        return None

    @abc.abstractmethod
    def flops_of_step(self, step: int) -> float:
        """Return the model's FLOPs of a step, forward and backward, on all devices together."""

    @abc.abstractmethod
    def evaluate(self, state: Any) -> dict[str, float | list[float]]:
        """Return means over the validation data, among them `loss`; nothing without such data."""

    @abc.abstractmethod
    def pictures(self, state: Any) -> dict[str, np.ndarray]:
        """Return images by name, uint8 [Y, X, 3]. Every process calls this, and the first one writes them."""

    def settings_of(self, metric: str) -> dict[str, Any]:
        """Return the settings of an evaluation that a metric depends on, by default none."""
        return {}

    def histograms(self, state: Any) -> dict[str, np.ndarray]:
        """Return numbers by name, `[N]` each, whose distributions TensorBoard shows; by default none."""
        return {}
