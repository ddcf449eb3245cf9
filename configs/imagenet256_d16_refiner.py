"""Refiner of MVAR-d16 on ImageNet 256 px: k = 3, two blocks, 34.6 M parameters on a frozen base of 310 M.

Needs:    the base as the model directory models/mvar-d16, tokenizer included (or --config.init_from=another one).
Command:  python -m mvar_jax cache_tokens --config configs/imagenet256_d16_refiner.py --tokenizer models/mvar-d16 \\
              --out data/imagenet256_tokens
          python -m mvar_jax train --config configs/imagenet256_d16_refiner.py --workdir runs/imagenet256_d16_refiner
Hardware: 8 cards of 24 GB or more.
Hours:    not yet run; by arithmetic half a step of the base: one forward pass of it (141 G-MACs an image) and three
          of the refiner (24) are 212, against 423, so 20 epochs cost about 10 of the base's 300.
Score:    not yet run; the paper's form took VAR-d16 from FID 3.30 to 2.81.
"""

import ml_collections

from configs import _imagenet


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = _imagenet.make_config(depth=16, epochs=20, batch_size=448, init_from="models/mvar-d16")
    base = c.model
    c.task = "refiner"
    c.model = dict(
        sides=base.sides,
        vocab_size=base.vocab_size,
        code_width=base.code_width,
        width=base.width,
        num_heads=base.num_heads,
        depth=2,
        window=3,
        dtype=base.dtype,
    )
    c.phases.schedule = "joint"
    c.optimizer.schedule = "cos"
    c.optimizer.final_factor = 0.01
    c.optimizer.ema_decay = 0.999
    return c
