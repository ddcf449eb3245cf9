import contextlib
import warnings

import numpy as np
import pytest
from image_files import bomb, encode, noise
from PIL import Image

import mvar_jax.__main__ as command_line
from mvar_jax.data import decoding, pillow_warnings
from mvar_jax.data.decoding import BadImage, open_rgb, read_image
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError

COLOUR = noise(30, 20)
BROKEN_EXIF = b"Exif\0\0MM\0*garbage"
JPEG = encode(Image.fromarray(COLOUR), "JPEG", quality=95)


def _pixels(data, **options):
    return np.asarray(open_rgb(data, **options))


def test_colour_files_of_every_format_give_their_pixels():
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(_pixels(encode(Image.fromarray(COLOUR), kind, **options)), COLOUR)
    assert np.abs(_pixels(JPEG).astype(int) - COLOUR).mean() < 8
    pair = encode(Image.fromarray(COLOUR), "MPO", save_all=True, append_images=[Image.fromarray(COLOUR)])
    assert np.abs(_pixels(pair).astype(int) - COLOUR).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_colour_modes_become_rgb_as_pillow_has_it(mode):
    picture = Image.fromarray(COLOUR).convert(mode)
    assert np.array_equal(_pixels(encode(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lab_becomes_every_mode_by_rgb(channels):
    lab = Image.new("LAB", (4, 3), (150, 20, 30))
    expected = lab.convert("RGB").convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    assert np.array_equal(_pixels(encode(lab, "TIFF"), channels=channels), np.asarray(expected))


def test_a_mode_that_pillow_cannot_convert_makes_a_bad_image(monkeypatch):
    monkeypatch.setattr(decoding, "_BETWEEN", {})
    with pytest.raises(BadImage, match="conversion from LAB"):
        open_rgb(encode(Image.new("LAB", (4, 3)), "TIFF"), channels=1)


def test_palette_with_transparency_keeps_its_colours_without_a_warning():
    picture = Image.fromarray(COLOUR).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = _pixels(encode(picture, transparency=bytes(range(256))))
    assert np.array_equal(pixels, np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_gives_the_colours_it_was_made_of():
    pixels = _pixels(encode(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95))
    assert pixels.shape == (20, 30, 3)
    assert np.abs(pixels.astype(int) - COLOUR).mean() < 8


def test_sixteen_bits_are_scaled_not_clipped():
    ramp_YX = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    pixels = _pixels(encode(Image.fromarray(ramp_YX)))
    assert np.abs(pixels[..., 0] - ramp_YX / 257).max() <= 0.5
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag_turns_the_picture_upright_where_asked(orientation):
    stored = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, exif=exif)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transposes that undo each orientation
    upright = stored if orientation == 1 else stored.transpose(Image.Transpose(turns[orientation]))
    assert np.array_equal(_pixels(data), np.asarray(upright))
    assert np.array_equal(_pixels(data, upright=False), COLOUR)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_orientation_tag_leaves_the_pixels_alone():
    assert np.array_equal(_pixels(encode(Image.fromarray(COLOUR), exif=BROKEN_EXIF)), COLOUR)


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own limit
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG, PNG, WEBP, BMP, GIF, TIFF image \\(0 bytes"),
        (b"GIF89a" + bytes(40), "."),
        (encode(Image.fromarray(COLOUR), "PPM"), "not a JPEG"),
        (encode(Image.fromarray(COLOUR), "BMP")[:-100], "truncated"),
        (encode(Image.new("F", (30, 20), 0.5), "TIFF"), "pixels of 32 bits in mode F, of which nobody knows"),
        (encode(Image.new("I", (30, 20), 70_000), "TIFF"), "pixels of 32 bits in mode I, of which nobody knows"),
        (JPEG[:-100], "OSError.*truncated"),
        (JPEG[:30], "OSError.*Truncated"),
        (encode(Image.fromarray(COLOUR))[:200], "truncated"),
        (encode(Image.fromarray(COLOUR), "WEBP")[:60], "."),
        (bomb(30_000, 30_000), "DecompressionBombError.*900000000 pixels"),
        (bomb(12_000, 12_000), "12000 x 12000 pixels, more than 67108864"),
        (bomb(100, 100), "."),
    ],
)
def test_unusable_bytes_are_bad_with_a_reason_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        open_rgb(data)
    assert "\n" not in str(error.value) and str(error.value)


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_lossless_formats_give_the_pixels_that_were_saved(kind, mode):
    if (kind, mode) == ("BMP", "CMYK"):
        mode = "RGBA"  # BMP has no CMYK
    picture = Image.fromarray(COLOUR).convert(mode)
    assert np.array_equal(_pixels(encode(picture, kind)), np.asarray(picture.convert("RGB")))


def test_of_several_frames_the_first_is_read():
    frames = [Image.fromarray(COLOUR).convert("P"), Image.new("P", (30, 20))]
    for kind in ("GIF", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.array_equal(_pixels(data), np.asarray(frames[0].convert("RGB")))


def test_sixteen_bits_of_tiff_are_scaled_also_where_zero_is_white():
    ramp_YX = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    data = encode(Image.fromarray(ramp_YX), "TIFF")
    tag = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # photometric interpretation, one short
    assert data.count(tag + b"\x01") == 1
    for white, wanted_YX in ((65535, ramp_YX), (0, 65535 - ramp_YX.astype(int))):
        pixels = _pixels(data.replace(tag + b"\x01", tag + (b"\x01" if white else b"\x00")))
        assert np.abs(pixels[..., 0] - wanted_YX / 257).max() <= 0.5


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_damage_anywhere_is_bad_or_harmless_but_never_another_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = np.frombuffer(encode(Image.fromarray(COLOUR), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(len(whole), size=3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(BadImage):
                assert open_rgb(damaged.tobytes()).mode == "RGB"


def test_warnings_of_pillow_are_hidden_only_on_request():
    files = encode(Image.fromarray(COLOUR), exif=BROKEN_EXIF), bomb(12_000, 12_000)
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        for num_seen in (2, 0):
            for data in files:
                with contextlib.suppress(BadImage):
                    open_rgb(data)
            assert len(seen) == num_seen
            seen.clear()
            pillow_warnings.ignore_pillow_warnings()


def test_start_hides_the_warnings_of_pillow(monkeypatch):
    monkeypatch.setattr(command_line, "main", lambda: 0)
    monkeypatch.setattr(command_line.gc, "set_threshold", lambda *numbers: None)
    monkeypatch.setattr(command_line.atexit, "register", lambda function: None)
    with warnings.catch_warnings():
        assert command_line.start() == 0
        assert any(
            action == "ignore" and module and module.match("PIL.Image")
            for action, _, _, module, _ in warnings.filters
        )


def test_any_exception_of_a_reader_makes_the_image_bad(monkeypatch):
    def fail(*args, **options):
        raise KeyError("deep inside")

    monkeypatch.setattr(decoding.Image, "open", fail)
    with pytest.raises(BadImage, match="KeyError.*deep inside"):
        open_rgb(JPEG)


def test_one_pixel_becomes_a_flat_picture_and_a_thread_is_bad():
    pixels = PhotoTransform(16, flip=False)(encode(Image.new("RGB", (1, 1), (255, 0, 0))))
    assert np.array_equal(pixels, np.broadcast_to(np.uint8([255, 0, 0]), (16, 16, 3)))
    with pytest.raises(BadImage, match="1 x 9000 pixels: too long and thin"):
        PhotoTransform(256, flip=False)(encode(Image.new("RGB", (1, 9000))))


def test_read_image_names_the_file_it_refuses(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), _pixels(JPEG))
    (tmp_path / "b.jpg").write_bytes(JPEG[:100])
    for name in ("b.jpg", "none.jpg"):
        with pytest.raises(InputError, match=f"--images must be a readable image.*{name}"):
            read_image(tmp_path / name)
