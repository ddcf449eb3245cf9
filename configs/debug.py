"""A tiny tokenizer on generated images: checks in under a minute that `train` runs here.

Command:  python -m mvar_jax train --config configs/debug.py --workdir runs/debug
Hardware: one CPU core, under a minute.
Score:    none; the loss falls.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = ml_collections.ConfigDict()
    c.task = "tokenizer"
    c.seed = 0
    c.num_steps = 12
    c.batch_size = 8
    c.accumulate_steps = 1
    c.log_every_steps = 1
    c.eval_every_steps = 6
    c.picture_every_steps = 0
    c.save_every_steps = 4
    c.keep_checkpoints = 2
    c.keep_best = ""
    c.max_bad_steps = 3
    c.profile_steps = ()
    c.data = dict(source="synthetic", image_size=4, size=40)
    c.model = dict(
        sides=(1, 2, 4),
        vocab_size=16,
        code_width=4,
        ch=8,
        ch_mult=(1,),
        num_res_blocks=1,
        num_groups=4,
        num_phi=1,
    )
    c.codebook = dict(warmup_steps=4, revive_every_steps=4, revive_until_step=10)
    c.optimizer = dict(base_learning_rate=0.03, warmup_steps=2, ema_decay=0.9)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
