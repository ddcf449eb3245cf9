"""MVAR-d16 on ImageNet 256 px from scratch: the published recipe, 300 epochs of batch 448.

Needs:    the tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d16.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d16.py --workdir runs/imagenet256_d16
Hardware: 8 cards of 24 GB or more, or any slice whose batch axes divide 448.
Hours:    not yet run.
Score:    not yet run; published FID 3.01, IS 285.2.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=16, epochs=300, batch_size=448)
