"""A tiny MVAR on the tokens of `debug.py`: two phases, in under a minute.

Command:  python -m mvar_jax cache_tokens --config configs/debug_transformer.py --tokenizer runs/debug \\
              --out runs/debug_tokens
          python -m mvar_jax train --config configs/debug_transformer.py --workdir runs/debug_transformer
Hardware: one CPU core, under a minute.
Score:    none; the loss of the evaluation falls. Training steps alternate between the phases, whose losses differ.
"""

import ml_collections

from configs import debug


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    c = debug.get_config()
    tokenizer = c.model
    del c.codebook
    c.task = "transformer"
    c.init_from = ""
    c.data.cache = "runs/debug_tokens"
    c.model = ml_collections.ConfigDict(
        dict(
            sides=tokenizer.sides,
            vocab_size=tokenizer.vocab_size,
            code_width=tokenizer.code_width,
            refine_step=2,
            kernel_size=3,
            num_classes=10,
            depth=2,
            width=16,
            num_heads=2,
            drop_path_rate=0.1,
            init_gamma=0.1,
        )
    )
    c.phases = dict(schedule="paper", ratio=2, label_drop_rate=0.1)
    c.optimizer = dict(base_learning_rate=0.03, warmup_steps=2, ema_decay=0.9)
    return c
