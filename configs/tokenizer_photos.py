"""Tokenizer of real photographs: 64 px crops; installed packages bring at least scikit-learn's two.

Command:  python -m mvar_jax train --config configs/tokenizer_photos.py --workdir runs/photos
          A shorter run, every phase in proportion: --config configs/tokenizer_photos.py:300
Hardware: 2 CPU cores, 12 minutes.
Score:    28.5 dB on the held-out right fifth of each photograph; 25.2 after half of the steps.
"""

import ml_collections

NUM_STEPS = 1200


def get_config(num_steps: str | int = NUM_STEPS) -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    num_steps = int(num_steps)
    c = ml_collections.ConfigDict()
    c.task = "tokenizer"
    c.seed = 0
    c.num_steps = num_steps
    c.batch_size = 8
    c.log_every_steps = 10
    c.eval_every_steps = num_steps // 4
    c.picture_every_steps = num_steps // 4
    c.save_every_steps = num_steps // 4
    c.keep_checkpoints = 1
    c.max_bad_steps = 10
    c.data = dict(source="photos", image_size=64, val_fraction=0.2, flip=True)
    c.model = dict(
        sides=(1, 2, 3, 4, 6, 8, 12, 16),
        vocab_size=512,
        code_width=16,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        num_groups=None,
        group_size=4,
        num_phi=4,
    )
    c.codebook = dict(
        warmup_steps=num_steps // 12,
        revive_every_steps=max(1, num_steps // 60),
        revive_until_step=int(0.6 * num_steps),
        revive_below=0.1,
        usage_decay=0.95,
        l1_weight=0.2,
        l2_weight=1.0,
        simvq=False,
        scale_dropout=0.1,
    )
    # without LPIPS, whose weights would have to be downloaded
    c.adversary = dict(
        kind="patch",
        layers=2,
        width=32,
        start_step=int(0.8 * num_steps),
        ramp_steps=num_steps // 20,
        warmup_steps=num_steps // 20,
        weight=0.4,
    )
    c.optimizer = dict(
        base_learning_rate=1e-3 * 256 / 8,
        schedule="cos",
        warmup_steps=num_steps // 30,
        final_factor=0.05,
        weight_decay=0.005,
        clip_norm=1.0,
        beta2=0.99,
        ema_decay=0.99,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
