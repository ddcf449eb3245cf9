from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mvar_jax.sampling import bulk
from mvar_jax.sampling.bulk import Order
from mvar_jax.sampling.sampler import SampleOptions


@pytest.mark.parametrize(
    ("num_labels", "num", "rows", "columns"),
    [
        (3, 20, 3, 20),
        (10, 40, 10, 32),
        (10, 50, 10, 32),
        (20, 30, 20, 20),
        (1, 37, 2, 32),
        (10, 1, 10, 1),
        (500, 2, 13, 32),
    ],
)
def test_rows_of_the_grid_show_one_label_each(tmp_path, num_labels, num, rows, columns):
    """The pixels of a sample are its label's number; so many labels that a row each has no place share rows."""
    order = Order(tuple(range(num_labels)), num, SampleOptions(), batch_size=16)
    pixels = (1 + order.labels_N % 200).astype(np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    parts = np.split(pixels, range(16, len(pixels), 16))
    batches = SimpleNamespace(order=order, out=tmp_path, read=lambda name: iter(parts))
    bulk._join(batches)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    side = (grid.shape[0] - 2) // rows
    assert (grid.shape[0] - 2, grid.shape[1] - 2) == (rows * side, columns * side)
    centers = grid[side // 2 :: side, side // 2 :: side, 0][:rows, :columns]
    assert num_labels > 400 or all(len(set(row.tolist()) - {255}) == 1 for row in centers)
