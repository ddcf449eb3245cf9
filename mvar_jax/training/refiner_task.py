"""The task that trains a refiner on the hidden states of a frozen transformer."""

import numpy as np

from mvar_jax.checkpoints.model_directory import fingerprint
from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import start_weights
from mvar_jax.scales import Phase
from mvar_jax.sharding import is_abstract
from mvar_jax.training import refiner_step
from mvar_jax.training.initial import Initial
from mvar_jax.training.scoring import Scorer
from mvar_jax.training.task import RunOptions, TaskData
from mvar_jax.training.transformer_step import PhaseOptions
from mvar_jax.training.transformer_task import TokenTask, with_input


class RefinerTask(TokenTask):
    """The task that trains a refiner on token ids; hidden states are computed in the step.

    base: tokenizer, frozen transformer, and the module of the refiner. scorer: of samples, None draws none.
    """

    def __init__(
        self, run: RunOptions, options: PhaseOptions, base: Networks, data: TaskData, scorer: Scorer | None = None
    ):
        self._recipe = refiner_step.RefinerRecipe(run.optimizer, options, run.seed, run.accumulate_steps)
        initial = None
        if not is_abstract(base):
            initial = Initial(start_weights(base.params, np.asarray(base.tokenizer_params["codebook"])))
        super().__init__(run, base.refiner, base.transformer, options, base, data, initial, scorer)
        if not is_abstract(base):
            self.base = fingerprint(base.transformer, base.params)
            self.data_identity["transformer"] = self.base

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases with a refined scale."""
        return refiner_step.refined_phases(self.tokenizer)

    def networks_of(self, params, tokenizer: Networks) -> Networks:
        """Return the frozen networks with the refiner."""
        return tokenizer.replace(refiner_params=params)

    def _take_step(self, phases, state, batch, learning_rate, weight_decay, tokenizer: Networks):
        batch = with_input(tokenizer, batch, self.rows_together)
        return refiner_step.train_step(self._recipe, phases, tokenizer, state, batch, learning_rate, weight_decay)

    def _sum_losses(self, params, batch, tokenizer: Networks):
        return refiner_step.eval_step(self.networks_of(params, tokenizer), with_input(tokenizer, batch))

    def flops_of_step(self, step: int) -> float:
        """Return a forward pass of the transformer and three of the refiner, over the step's phases."""
        phases, refiner = self.phases_of_step(step), self.tokenizer.refiner
        scales = [scale for phase in phases for scale in self.tokenizer.refined_scales(phase)]
        return self.run.batch_size * (2.0 * self._macs(phases) + 6.0 * refiner.macs(scales))
