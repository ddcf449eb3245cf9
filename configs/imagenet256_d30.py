"""MVAR-d30 on ImageNet 256 px from scratch. No such run is published: the values are those of VAR-d30.

Needs:    the tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d30.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d30.py --workdir runs/imagenet256_d30
Hardware: 8 cards of 80 GB or a TPU v5e-256 slice, state sharded over them (compiled, not run).
Hours:    not yet run.
Score:    not yet run.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(
        depth=30,
        epochs=350,
        batch_size=1024,
        init_gamma=1e-5,
        base_learning_rate=8e-5,
        final_factor=0.01,
        final_weight_decay=0.08,
        is_sharded=True,
    )
