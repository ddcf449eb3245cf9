"""MVAR-d16 on ImageNet 512 px from scratch; its 2,240 tokens an image are why the batch is smaller.

Needs:    the tokenizer with the scales of 512 px:
          mvar convert --from_hub FoundationVision/var --tokenizer vae_ch160v4096z32.pth \\
              --patch_nums 1,2,3,4,6,9,13,18,24,32 --out models/vae512
Command:  python -m mvar_jax cache_tokens --config configs/imagenet512_d16.py --tokenizer models/vae512 \\
              --out data/imagenet512_tokens
          python -m mvar_jax train --config configs/imagenet512_d16.py --workdir runs/imagenet512_d16
Hardware: 8 cards of 80 GB.
Hours:    not yet run.
Score:    not yet run.
"""

from configs import _imagenet


def get_config():
    """Settings; every key can be set on the command line."""
    return _imagenet.make_config(depth=16, epochs=300, batch_size=192, image_size=512)
