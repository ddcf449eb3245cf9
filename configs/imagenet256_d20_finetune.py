"""MVAR-d20 fine-tuned from VAR-d20 on ImageNet 256 px: the published recipe, 80 epochs of batch 192.

Needs:    the published VAR file as models/var_d20.pth (or --config.init_from=a model directory).
          The tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d20_finetune.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d20_finetune.py \\
              --workdir runs/imagenet256_d20_finetune
Hardware: 8 cards of 24 GB or more (compiled, not run).
Hours:    not yet run.
Score:    not yet run; published FID 2.87, IS 295.3.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=20, epochs=80, batch_size=192, init_from="models/var_d20.pth")
