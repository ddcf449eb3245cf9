"""The published tokenizer's shape on ImageNet 512 px from scratch: more and larger scales, the same weights' shapes.

The weights of 256 px also encode 512 px without any training, with these scales as --config.model.sides; train here
only if that is not enough.

Needs:    as configs/tokenizer_imagenet256.py.
Command:  python -m mvar_jax train --config configs/tokenizer_imagenet512.py --workdir runs/tokenizer_imagenet512
Hardware: 8 cards of 80 GB; of 24 GB with --config.model.remat=True --config.accumulate_steps=4.
Hours:    not yet run; by arithmetic 28 on 8 H100: 32 million images of 7.6 TFLOP at 300 TFLOP/s a card.
Score:    not yet run.
"""

import ml_collections

from configs import tokenizer_imagenet256


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    return tokenizer_imagenet256.make_config(image_size=512, batch_size=64, num_steps=500_000)
