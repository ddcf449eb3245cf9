"""MVAR on handwritten digits, trained on the token cache of `digits_tokenizer.py`: the quickstart's model.

Command:  python -m mvar_jax cache_tokens --config configs/digits.py --tokenizer runs/quickstart/tokenizer \\
              --out runs/quickstart/tokens
          python -m mvar_jax train --config configs/digits.py --workdir runs/quickstart/transformer
Hardware: 2 CPU cores, 3 to 4 minutes.
Score:    98% of 1,000 samples recognised as their class by an SVC that recognises 99% of real held-out digits.
"""

import ml_collections

from configs import digits_tokenizer


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    tokenizer = digits_tokenizer.get_config()
    c = ml_collections.ConfigDict()
    c.task = "transformer"
    c.seed = 0
    c.num_steps = 900  # about where the held-out loss is lowest
    c.batch_size = 32
    c.log_every_steps = 20
    c.eval_every_steps = 300
    c.picture_every_steps = -1  # the quickstart makes its own from its samples
    c.save_every_steps = 300
    c.keep_checkpoints = 1
    c.max_bad_steps = 10
    c.init_from = ""
    # a quarter of the tokenizer's augmentation: samples can be no closer to real images than the training images are
    augmentation = {name: tokenizer.data[name] / 4 for name in ("degrees", "shift_px", "scale", "shear")}
    c.data = {**tokenizer.data.to_dict(), **augmentation, "num_views": 8, "cache": "runs/quickstart/tokens"}
    c.model = dict(
        sides=tokenizer.model.sides,
        vocab_size=tokenizer.model.vocab_size,
        code_width=tokenizer.model.code_width,
        refine_step=3,
        kernel_size=(3, 5),
        num_classes=10,
        depth=4,
        width=96,
        num_heads=3,
        drop_path_rate=0.0,
        # with the large models' damped gammas and small class table, a model of this size ignores the class for long
        init_gamma=0.5,
        class_init_std=1.0,
    )
    c.phases = dict(schedule="joint", ratio=8, label_drop_rate=0.1, label_smoothing=0.0)
    c.optimizer = dict(
        base_learning_rate=2e-3 * 256 / 32,
        schedule="cos",
        warmup_steps=50,
        final_factor=0.01,
        weight_decay=0.05,
        ema_decay=0.99,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
