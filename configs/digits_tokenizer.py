"""Tokenizer of handwritten digits (scikit-learn's 1,797 images, enlarged to 32x32): the quickstart's first stage.

Command:  python -m mvar_jax train --config configs/digits_tokenizer.py --workdir runs/quickstart/tokenizer
Hardware: 2 CPU cores, 2 to 3 minutes.
Score:    28.5 dB or more on the held-out fifth, every code used.
"""

import ml_collections

NUM_STEPS = 300


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = ml_collections.ConfigDict()
    c.task = "tokenizer"
    c.seed = 0
    c.num_steps = NUM_STEPS
    c.batch_size = 32
    c.log_every_steps = 10
    c.eval_every_steps = 150
    c.picture_every_steps = -1  # the quickstart makes its own
    c.save_every_steps = 100
    c.keep_checkpoints = 1
    c.max_bad_steps = 10
    c.data = dict(
        source="digits",
        image_size=32,
        split_seed=0,
        val_fraction=0.2,
        degrees=5.0,
        shift_px=0.15,
        scale=0.03,
        shear=0.04,
    )
    c.model = dict(
        sides=(1, 2, 3, 5, 8),
        vocab_size=256,
        code_width=16,
        ch=16,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        num_groups=None,
        group_size=4,
        beta=1.0,  # keeps f close to its codes: independently drawn tokens have less to decide
    )
    c.codebook = dict(
        warmup_steps=30,
        revive_every_steps=15,
        revive_until_step=int(0.6 * NUM_STEPS),
        revive_below=1.0,
        usage_decay=0.9,  # adapts within tens of steps: a run is short
        l1_weight=0.0,
        l2_weight=1.0,
    )
    c.optimizer = dict(
        base_learning_rate=3e-3 * 256 / 32,
        schedule="cos",
        warmup_steps=20,
        final_factor=0.01,
        weight_decay=0.0,
        beta2=0.99,
        ema_decay=0.97,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
