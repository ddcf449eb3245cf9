import numpy as np
import pytest
from PIL import Image

from mvar_jax.errors import InputError
from mvar_jax.files.images import CAPTION_PX, save_png, side_by_side, tile_columns, tile_grid, to_uint8


def flat_images(*levels, height=4, width=3):
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


def test_to_uint8_rounds_or_truncates_and_clips():
    images = np.array([-2, -1, 0, 0.999, 1, 3], np.float32).reshape(1, 1, 2, 3)
    assert to_uint8(images).ravel().tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(images, truncate=True).ravel().tolist() == [0, 0, 127, 254, 255, 255]


def test_tile_grid_places_images_row_by_row_between_white_lines():
    grid = tile_grid(flat_images(10, 20, 30), columns=2, pad=2)
    assert grid.shape == (2 + 2 * 6, 2 + 2 * 5, 3)
    expected = np.full(grid.shape, 255)
    expected[2:6, 2:5], expected[2:6, 7:10], expected[8:12, 2:5] = 10, 20, 30
    np.testing.assert_array_equal(grid, expected)


def test_tile_grid_is_no_wider_than_its_images():
    assert tile_grid(flat_images(1, 2), columns=9, pad=0).shape == (4, 6, 3)


def test_tile_grid_zoom_repeats_pixels_and_keeps_the_padding():
    image = np.random.default_rng(0).integers(0, 255, (1, 2, 2, 3), np.uint8)
    grid = tile_grid(image, columns=1, pad=1, zoom=3)
    assert grid.shape == (8, 8, 3)
    np.testing.assert_array_equal(grid[1:7, 1:7], np.kron(image[0], np.ones((3, 3, 1), np.uint8)))


def test_tile_grid_refuses_floats():
    with pytest.raises(InputError, match="uint8"):
        tile_grid(np.zeros((1, 2, 2, 3), np.float32), columns=1)


def test_side_by_side_puts_each_reconstruction_right_of_its_original():
    grid = side_by_side(flat_images(10, 20), flat_images(30, 40), columns=1, pad=1)
    assert grid.shape == (11, 8, 3)
    assert grid[1, 1:7, 0].tolist() == [10] * 3 + [30] * 3
    assert grid[6, 1:7, 0].tolist() == [20] * 3 + [40] * 3


def test_save_png_reads_back_equal_and_leaves_nothing_else(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "new" / "x.png"
    save_png(path, image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_save_png_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")
    with pytest.raises(TypeError):
        save_png(path, np.zeros((2, 2, 3), np.complex64))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_columns_hold_their_images_below_their_captions():
    picture = tile_columns({"a": flat_images(10, 20), "b": flat_images(30, 40)}, pad=1, zoom=2)
    head, grid = picture[:CAPTION_PX], picture[CAPTION_PX:]
    rows = np.concatenate([flat_images(10), flat_images(30), flat_images(20), flat_images(40)])
    np.testing.assert_array_equal(grid, tile_grid(rows, 2, pad=1, zoom=2))
    assert head[:, : head.shape[1] // 2].min() < 128 and head[:, head.shape[1] // 2 :].min() < 128, "both are written"
