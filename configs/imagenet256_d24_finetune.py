"""MVAR-d24 fine-tuned from VAR-d24 on ImageNet 256 px: the published recipe, 80 epochs of batch 448.

Needs:    the published VAR file as models/var_d24.pth (or --config.init_from=a model directory).
          The tokenizer as models/vae: docs/reproducing.md has the command.
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d24_finetune.py --tokenizer models/vae \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d24_finetune.py \\
              --workdir runs/imagenet256_d24_finetune
Hardware: 8 cards of 24 GB or more, state sharded over them (compiled, not run).
Hours:    not yet run.
Score:    not yet run; published FID 2.23, IS 300.1.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=24, epochs=80, batch_size=448, init_from="models/var_d24.pth", is_sharded=True)
