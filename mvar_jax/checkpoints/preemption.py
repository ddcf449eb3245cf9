"""Orbax's manager without its questions about a preemption."""

import orbax.checkpoint as ocp


class UnaskingManager(ocp.CheckpointManager):
    """A checkpoint manager that never asks JAX whether a preemption is near.

    The training loop asks at every step, and it may be the only one: asking tells JAX which step this process is at.
    When a save ends, Orbax asks in the background for the older step that was saved. If a signal comes just then, the
    processes agree to stop at a step that this one has passed, and wait for it for ever. Orbax uses the answer only
    for its statistics, because `Checkpoints` decides itself when to save.
    """

    def reached_preemption(self, step: int) -> bool:
        """Return False."""
        return False
