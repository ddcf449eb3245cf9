"""MVAR-d16 on your own photographs, 256 px: DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/CLASS/*).

Command:  python -m mvar_jax data --config configs/folder.py --config.data.path=DIR --out runs/folder/look
          python -m mvar_jax cache_tokens --config configs/folder.py --config.data.path=DIR \\
              --tokenizer models/mvar-d16 --out runs/folder/tokens
          python -m mvar_jax train --config configs/folder.py --config.data.cache=runs/folder/tokens \\
              --workdir runs/folder/transformer
          Without a cache, encoding inside the training step: --config.data.path=DIR
          --config.data.tokenizer=models/mvar-d16 instead of --config.data.cache. models/mvar-d16 is what `convert`
          wrote.
          ImageNet: --config.data.source=tfds --config.data.name=imagenet2012, prepared by launch/prepare_imagenet.sh,
          and --config.data.upright=False for the reference's pixels. Tars: --config.data.source=tars.
Hardware: one accelerator of 24 GB or more.
Score:    not run yet.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = ml_collections.ConfigDict()
    c.task = "transformer"
    c.seed = 0
    c.num_steps = 100_000
    c.batch_size = 64
    c.log_every_steps = 50
    c.eval_every_steps = 2000
    c.picture_every_steps = 2000
    c.save_every_steps = 1000
    c.keep_checkpoints = 2
    c.max_bad_steps = 10
    c.init_from = ""
    c.data = dict(
        source="folder",
        path="",
        name="",
        image_size=256,
        size=0,
        flip=True,
        crop="centre",
        min_crop=0.8,
        upright=True,
        num_views=2,
        cache="",
        tokenizer="",
        cache_memory_mib=256,  # 4096 holds all of ImageNet: six times the rate, start-up half a minute longer
        num_threads=4,
        num_workers=0,
        max_bad_share=0.01,
    )
    c.model = dict(
        sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        vocab_size=4096,
        code_width=32,
        refine_step=8,
        kernel_size=7,
        num_classes=0,  # the number of classes in the data
        depth=16,
        width=1024,
        num_heads=16,
        drop_path_rate=0.1 * 16 / 24,
        dtype="bfloat16",
    )
    c.phases = dict(schedule="paper", ratio=8, label_drop_rate=0.1, label_smoothing=0.0)
    c.optimizer = dict(
        base_learning_rate=1e-4,
        schedule="lin0",
        warmup_steps=2000,
        warmup_factor=0.005,
        final_factor=0.1,
        weight_decay=0.05,
        ema_decay=0.9999,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
