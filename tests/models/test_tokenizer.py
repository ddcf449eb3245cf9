import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import (
    F_HAT,
    FEATURES,
    LOSSES,
    TOKENIZER,
    TOKENIZER_GRADIENTS,
    assert_close,
    assert_gradients_close,
    assert_images_close,
    channels_first,
    load,
    load_json,
    published_tokenizer,
)
from small_case import count, shapes_of

from mvar_jax.errors import InputError
from mvar_jax.models.tokenizer import Tokenizer

GOLDEN = load("tokenizer")


def test_golden_image_is_read_right(golden_images):
    pixels = channels_first(golden_images).reshape(-1)[GOLDEN["x_check_idx"]]
    assert_close("x", pixels, GOLDEN["x_check_val"], atol=1e-6)


def test_encoder_output_equals_golden(encoded_images):
    f, _ = encoded_images
    assert f.dtype == jnp.float32
    assert_close("f", channels_first(f), GOLDEN["f"], **FEATURES)


def test_ids_equal_golden_exactly(encoded_images, tokenizer_training):
    _, ids = encoded_images
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, GOLDEN["ids"])
    np.testing.assert_array_equal(tokenizer_training["encoded"].ids_BL, GOLDEN["ids"])


def test_f_hat_of_every_scale_equals_golden(accumulated_ids, tokenizer_training):
    f_hats, _ = accumulated_ids
    assert_close("f_hat from ids", channels_first(jnp.stack(f_hats)), GOLDEN["f_hat_scales"], **F_HAT)
    encoded = tokenizer_training["encoded"]
    assert_close("f_hat from images", channels_first(jnp.stack(encoded.f_hats)), GOLDEN["f_hat_scales"], **F_HAT)


def test_rests_are_what_earlier_scales_left_over(tokenizer_training, encoded_images):
    f, _ = encoded_images
    encoded = tokenizer_training["encoded"]
    last = np.asarray(f - encoded.f_hats[-2]).reshape(2, 256, 8)
    np.testing.assert_allclose(encoded.rests[-1], last, atol=2e-4)
    np.testing.assert_allclose(encoded.rests[0], np.asarray(f).mean((1, 2))[:, None], atol=2e-4)


def test_teacher_forcing_input_equals_golden(accumulated_ids):
    _, previous = accumulated_ids
    assert_close("teacher-forcing input", previous, GOLDEN["mvar_input"], **F_HAT)


def test_reconstructions_equal_golden_and_are_clipped(decode, accumulated_ids):
    f_hats, _ = accumulated_ids
    images = decode(np.concatenate([np.stack(f_hats)[:, 0], np.asarray(f_hats[-1])[1:]]))
    assert_images_close("rec_all0", images[:10], GOLDEN, "rec_all0", grid=16)
    assert_images_close("rec_last", images[9:], GOLDEN, "rec_last", grid=8)


def test_training_reconstruction_equals_golden_and_is_not_clipped(tokenizer_training):
    assert np.abs(tokenizer_training["rec"]).max() > 1.5
    assert_images_close("train_fwd_rec", tokenizer_training["rec"], GOLDEN, "train_fwd_rec", grid=16)


@pytest.mark.parametrize("name", ["vq_loss", "rec_mse"])
def test_training_losses_equal_golden(name, tokenizer_training):
    assert_close(name, tokenizer_training[name], GOLDEN[name], **LOSSES)


def test_training_gradients_equal_golden(tokenizer_training):
    published = published_tokenizer(tokenizer_training["grads"])
    assert_gradients_close("tokenizer gradient", published, GOLDEN, "vaegrad", TOKENIZER_GRADIENTS)


def test_parameter_counts_equal_the_published_tokenizer():
    params = shapes_of(Tokenizer(TOKENIZER.sides))
    expected = load_json("counts.json")["params"]["vae_ch160_v4096_z32"]
    assert count(params) == expected["total"]
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        assert count(params[name]) == expected[name]
    quantizer = {name: params[name] for name in params if name == "codebook" or name.startswith("phi_convs")}
    assert count(quantizer) == expected["quantize"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sides": (1, 4, 2)}, "sides"),
        ({"num_groups": None}, "num_groups"),
        ({"group_size": 4}, "num_groups"),
        ({"num_phi": 0}, "num_phi"),
        ({"num_phi": 5}, "num_phi"),
    ],
)
def test_check_refuses_fields_that_do_not_fit(changes, field):
    small_case.TOKENIZER.check(image_size=10)
    with pytest.raises(InputError, match=f"^{field} must ") as caught:
        small_case.TOKENIZER.clone(**changes).check()
    assert caught.value.field == field


def test_check_refuses_another_image_size():
    with pytest.raises(
        InputError, match="^sides must be a list with a last side of 8, that is image_size=16 / 2, got"
    ):
        small_case.TOKENIZER.check(image_size=16)


@pytest.mark.parametrize(("num_phi", "index_of_scale"), [(1, (0, 0, 0, 0)), (2, (0, 0, 1, 1)), (4, (0, 1, 2, 3))])
def test_phi_blends_the_convolution_that_the_scale_shares(num_phi, index_of_scale):
    module = small_case.TOKENIZER.clone(num_phi=num_phi)
    params = small_case.seeded_params(module)
    assert sum(name.startswith("phi_convs") for name in params) == num_phi
    x_BYXc = np.random.default_rng(1).normal(size=(1, 5, 5, 4)).astype(np.float32)
    padded = np.pad(x_BYXc[0], ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    for scale, index in enumerate(index_of_scale):
        conv = params[f"phi_convs_{index}"]
        expected = 0.5 * x_BYXc[0] + 0.5 * (np.einsum("yxcij,ijcd->yxd", windows, conv["kernel"]) + conv["bias"])
        ours = module.apply({"params": params}, scale, x_BYXc, method="phi")
        np.testing.assert_allclose(ours[0], expected, atol=1e-5)


def test_unquantised_forward_passes_f_itself_and_has_no_quantizer_loss():
    module = small_case.TOKENIZER
    params = small_case.seeded_params(module)
    image = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (1, 10, 10, 3)), jnp.float32)

    @jax.jit
    def run(params, image):
        decode_f = lambda module, image: module.decode_raw(module.features(image))
        rec, loss, _ = module.apply({"params": params}, image, False)
        return rec, loss, module.apply({"params": params}, image, method=decode_f)

    rec, loss, expected = run(params, image)
    assert loss == 0
    np.testing.assert_allclose(rec, expected, rtol=1e-5, atol=1e-5)
