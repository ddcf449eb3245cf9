"""MVAR-d20 on ImageNet 256 px from scratch. No such run is published: batch of its fine-tuning, VAR's 250 epochs.

Needs:    the tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d20.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d20.py --workdir runs/imagenet256_d20
Hardware: 8 cards of 24 GB or more (compiled, not run).
Hours:    not yet run.
Score:    not yet run.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=20, epochs=250, batch_size=192)
