"""VAR-d16 on ImageNet 256 px from scratch, the baseline: block-causal attention, 200 epochs of batch 768.

Needs:    the tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_var_d16.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_var_d16.py --workdir runs/imagenet256_var_d16
Hardware: 8 cards of 80 GB.
Hours:    not yet run.
Score:    not yet run; published FID 3.55, IS 280.4.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=16, epochs=200, batch_size=768, conditioning="full")
