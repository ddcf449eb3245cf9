import numpy as np
import pytest
from PIL import Image

from mvar_jax.digits.curves import Curves, plot_curves


def test_plot_curves_writes_a_figure_and_refuses_a_scale_without_a_curve(tmp_path):
    curves = dict(
        validation_loss=([0, 10], [[4.8, 4.8], [2.0, 1.5]]),
        training_loss=([0, 5, 10], [4.8, 3.0, 2.0]),
        tokenizer_psnr_db=([0, 4], [10.0, 29.0]),
        tokenizer_usage_percent=([0, 2, 4], [[0, 5], [40, 60], [99, 100]]),
        num_codes=128,
    )
    path = tmp_path / "curves.png"
    plot_curves(path, Curves(**curves, patch_nums=(1, 2)))
    assert np.asarray(Image.open(path).convert("RGB")).std() > 5
    with pytest.raises(ValueError):
        plot_curves(path, Curves(**curves, patch_nums=(1, 2, 3)))
