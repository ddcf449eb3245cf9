"""The published tokenizer's shape on ImageNet 256 px from scratch, by the recipe of docs/guide.md.

VAR's own training was not published; rates, losses and lengths merge those of the public programs that come nearest
(vaex, XQGAN, BitVAE). The discriminator works on patches; heads over a frozen DINO ViT-S/16, which scored better in
XQGAN, need its file: --config.adversary.kind=dino --config.adversary.file=dino.npz (`mvar convert --dino`).

Needs:    ImageNet in ~/tensorflow_datasets (launch/prepare_imagenet.sh), elsewhere with --config.data.path=DATA, and
          lpips.npz (`mvar convert --lpips`).
Command:  python -m mvar_jax train --config configs/tokenizer_imagenet256.py --workdir runs/tokenizer_imagenet256
Hardware: 8 cards of 80 GB; of 24 GB with --config.model.remat=True --config.accumulate_steps=4.
Hours:    not yet run; by arithmetic 28 on 8 H100: 128 million images of 1.9 TFLOP at 300 TFLOP/s a card.
Score:    not yet run; VAR's tokenizer has an rFID of about 0.92.
"""

import ml_collections

from configs import _imagenet


def get_config() -> ml_collections.ConfigDict:
    """Settings; every key can be set on the command line."""
    return make_config(image_size=256, batch_size=256, num_steps=500_000)


def make_config(*, image_size: int, batch_size: int, num_steps: int) -> ml_collections.ConfigDict:
    """Return the settings of a run with every phase in proportion to its length."""
    steps_per_epoch = -(-1_281_167 // batch_size)
    c = ml_collections.ConfigDict()
    c.task = "tokenizer"
    c.seed = 0
    c.num_steps = num_steps
    c.batch_size = batch_size
    c.accumulate_steps = 1
    c.log_every_steps = 100
    c.eval_every_steps = 10_000
    c.picture_every_steps = 10_000
    c.save_every_steps = 2500
    c.keep_checkpoints = 2
    c.max_bad_steps = 20
    # the short side is drawn from image_size to 9/8 of it; no flip, as the codes serve mirrored images too
    c.data = dict(
        source="tfds",
        name="imagenet2012",
        image_size=image_size,
        crop="random",
        min_crop=8 / 9,
        upright=False,
        num_threads=4,
        num_workers=8,
    )
    c.model = dict(
        sides=_imagenet.SIDES[image_size],
        vocab_size=4096,
        code_width=32,
        ch=160,
        ch_mult=(1, 1, 2, 2, 4),
        num_phi=4,
        dtype="bfloat16",
        remat=False,
    )
    c.codebook = dict(
        warmup_steps=2000,
        revive_every_steps=500,
        revive_until_step=int(0.15 * num_steps),  # before the discriminator, which would see new codes as new images
        l1_weight=0.2,
        l2_weight=1.0,
        perceptual_weight=1.0,
        perceptual_file="lpips.npz",
        scale_dropout=0.1,
    )
    c.adversary = dict(
        kind="patch",
        layers=3,
        width=64,
        weight=0.4,
        adaptive=True,
        start_step=int(0.2 * num_steps),
        ramp_steps=int(0.02 * num_steps),
        warmup_steps=steps_per_epoch,
        lecam_weight=0.001,
    )
    c.optimizer = dict(
        base_learning_rate=1e-4,
        schedule="cos",
        warmup_steps=steps_per_epoch,
        final_factor=0.3,
        weight_decay=0.005,
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
        ema_decay=0.9999,
        ema_ramp=True,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    return c
