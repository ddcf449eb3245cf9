"""The published tokenizer of VAR, or one of yours, fine-tuned on other images: by default its decoder alone.

Token ids do not change with train_parts="decoder": token caches and transformers of the tokenizer stay valid. With
"all" they do not. Rates are for a batch of 256; use any data source, here a folder of images in class folders.

Needs:    vae_ch160v4096z32.pth as models/vae_ch160v4096z32.pth (or --config.init_from=a model directory or workdir),
          and lpips.npz (`mvar convert --lpips`), or --config.codebook.perceptual_weight=0.
Command:  python -m mvar_jax train --config configs/tokenizer_finetune.py --config.data.path=photos \\
              --workdir runs/tokenizer_finetune
Hardware: one card of 80 GB, or several of 24 GB.
Hours:    not yet run.
Score:    not yet run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = ml_collections.ConfigDict()
    c.task = "tokenizer"
    c.seed = 0
    c.num_steps = 20_000
    c.batch_size = 32
    c.accumulate_steps = 1
    c.log_every_steps = 50
    c.eval_every_steps = 1000
    c.picture_every_steps = 1000
    c.save_every_steps = 500
    c.keep_checkpoints = 2
    c.max_bad_steps = 10
    c.init_from = "models/vae_ch160v4096z32.pth"
    c.train_parts = "decoder"
    c.data = dict(
        source="folder",
        path="",
        name="",
        image_size=256,
        size=0,
        val_fraction=0.02,
        flip=False,
        crop="random",
        min_crop=0.8,
        upright=True,
        num_threads=4,
        num_workers=0,
    )
    c.model = dict(sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    c.codebook = dict(l1_weight=0.2, l2_weight=1.0, perceptual_weight=1.0, perceptual_file="lpips.npz")
    # a fresh discriminator judges from the first step on; heads over DINO need kind="dino" and file="dino.npz"
    c.adversary = dict(kind="patch", file="", start_step=0, ramp_steps=2000)
    c.optimizer = dict(
        base_learning_rate=1e-5,
        schedule="lin0.3",
        warmup_steps=500,
        weight_decay=0.005,
        clip_norm=1.0,
        ema_decay=0.999,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
