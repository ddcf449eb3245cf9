"""MVAR-d24 on ImageNet 256 px from scratch. No such run is published: batch of its fine-tuning, VAR's other values.

Needs:    the tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d24.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d24.py --workdir runs/imagenet256_d24
Hardware: 8 cards of 24 GB or more, state sharded over them (compiled, not run).
Hours:    not yet run.
Score:    not yet run.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(
        depth=24, epochs=350, batch_size=448, base_learning_rate=8e-5, final_factor=0.01, is_sharded=True
    )
