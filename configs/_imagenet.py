"""Common part of the ImageNet configs: model sizes and the published recipe (docs/method.md, Training)."""

import ml_collections

SIDES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


def make_config(
    depth: int,
    *,
    epochs: int,
    batch_size: int,
    image_size: int = 256,
    conditioning: str = "markov",
    init_from: str = "",
    init_gamma: float = 1e-3,
    base_learning_rate: float = 1e-4,
    final_factor: float = 0.1,
    final_weight_decay: float | None = None,
    is_sharded: bool = False,
) -> ml_collections.ConfigDict:
    """Return the config of a transformer on a token cache of ImageNet; the warm-up is a fiftieth of it."""
    c = ml_collections.ConfigDict()
    c.task = "transformer"
    c.seed = 0
    c.num_steps = 0  # instead of epochs
    c.epochs = float(epochs)
    c.batch_size = batch_size
    c.accumulate_steps = 1
    c.log_every_steps = 100
    c.eval_every_steps = 10_000
    c.picture_every_steps = 10_000
    c.save_every_steps = 1000
    c.keep_checkpoints = 2
    c.keep_best = "loss"
    c.max_bad_steps = 20
    c.profile_steps = ()
    c.init_from = init_from
    # the cache holds each image and its mirror image, and a step draws one; cropped as in the reference
    c.data = dict(
        source="tfds",
        name="imagenet2012",
        image_size=image_size,
        flip=True,
        upright=False,
        num_views=2,
        cache=f"data/imagenet{image_size}_tokens",
    )
    c.model = make_model(depth, image_size, conditioning, init_gamma)
    c.phases = dict(schedule="paper", ratio=8, label_drop_rate=0.1, label_smoothing=0.0)
    c.optimizer = dict(
        base_learning_rate=base_learning_rate,
        schedule="lin0",
        warmup_epochs=epochs / 50,
        warmup_factor=0.005,
        final_factor=final_factor,
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.95,
        clip_norm=2.0,
    )
    if final_weight_decay is not None:
        c.optimizer.final_weight_decay = final_weight_decay
    # the batch over all devices; the state over as many of them as divide the width, or whole on each
    c.mesh = dict(data=-1, fsdp=-1 if is_sharded else 1, tensor=1)
    return c


def make_model(depth: int, image_size: int, conditioning: str, init_gamma: float) -> dict:
    """Return the fields of a published transformer: width 64 * depth, heads of width 64."""
    return dict(
        sides=SIDES[image_size],
        refine_step=8,
        kernel_size=7,
        vocab_size=4096,
        code_width=32,
        num_classes=1000,
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        conditioning=conditioning,
        drop_path_rate=0.1 * depth / 24,
        init_gamma=init_gamma,
        remat="dots",
        dtype="bfloat16",
    )
