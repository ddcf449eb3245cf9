"""Adversarial losses of a tokenizer: hinge, LeCam regularisation, and the weight that balances two gradients.

Logits are `[B, N] float32`, N a discriminator's logits for one image. All are means over B and N, so those of equal
parts of a batch average to that of the batch.
"""

import flax.struct
import jax
import jax.numpy as jnp

MIN_WEIGHT, MAX_WEIGHT = 0.015, 1e4
EPS = 1e-6


def discriminator_loss(real_BN: jax.Array, fake_BN: jax.Array) -> jax.Array:
    """Return the halved hinge loss: 1 if the discriminator knows nothing, 0 if it separates with a margin of 1."""
    return (jnp.mean(jax.nn.relu(1 - real_BN)) + jnp.mean(jax.nn.relu(1 + fake_BN))) / 2


def generator_loss(fake_BN: jax.Array) -> jax.Array:
    """Return minus the mean logit of the reconstructions."""
    return -jnp.mean(fake_BN)


@flax.struct.dataclass
class LogitMeans:
    """Moving means of a discriminator's logits of real images and of reconstructions, scalars float32."""

    real: jax.Array
    fake: jax.Array

    @classmethod
    def zeros(cls) -> "LogitMeans":
        """Return the means of the start."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def updated(self, real: jax.Array, fake: jax.Array, decay: float) -> "LogitMeans":
        """Return decay times the means plus (1 - decay) times the mean logits of a batch."""
        move = lambda mean, new: decay * mean + (1 - decay) * jax.lax.stop_gradient(jnp.mean(new))
        return LogitMeans(move(self.real, real), move(self.fake, fake))


def lecam_loss(real_BN: jax.Array, fake_BN: jax.Array, means: LogitMeans) -> jax.Array:
    """Return mean(relu(real - mean fake)^2) + mean(relu(mean real - fake)^2) (Tseng et al., arXiv 2104.03310).

    means: of the batches before this one, so that the loss of a batch is the mean over its parts.
    """
    real, fake = jax.nn.relu(real_BN - means.fake), jax.nn.relu(means.real - fake_BN)
    return jnp.mean(jnp.square(real)) + jnp.mean(jnp.square(fake))


def adaptive_weight(grad_rec: jax.Array, grad_adv: jax.Array) -> jax.Array:
    """Return norm(grad_rec) / (norm(grad_adv) + 1e-6), within [0.015, 1e4] (Esser et al., arXiv 2012.09841, eq. 7).

    Both are gradients of the decoder's last kernel: of the reconstruction's losses, and of `generator_loss`.
    """
    norms = [jnp.linalg.norm(grad.astype(jnp.float32).reshape(-1)) for grad in (grad_rec, grad_adv)]
    return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + EPS), MIN_WEIGHT, MAX_WEIGHT))
