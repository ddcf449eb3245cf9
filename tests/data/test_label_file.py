import pytest

from mvar_jax.data.label_file import read_labels
from mvar_jax.errors import InputError

IMAGES = ["a.jpg", "my b.jpg", "c.jpg"]
CLASSES = ["n01", "n02", "golden retriever"]


def _read(folder, text):
    (folder / "labels.txt").write_text(text)
    labels, unused = read_labels(folder / "labels.txt", IMAGES, CLASSES)
    return labels.tolist(), unused


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg golden retriever\nmy b.jpg n01\nc.jpg n02\n",
        "a golden retriever\nmy b n01\nc n02\n",
        "a.jpg,golden retriever\nmy b.jpg,n01\nc.jpg,n02\n",
        "a.jpg 2 17 18\nmy b.jpg 0 3 4\nc.jpg 1 1 1\n",
        "a.jpg 2\nmy b.jpg 0\nc.jpg 1\n",
    ],
)
def test_names_may_hold_spaces_and_further_columns_are_ignored(tmp_path, text):
    assert _read(tmp_path, text) == ([2, 0, 1], 0)


def test_lines_that_name_no_image_are_counted(tmp_path):
    text = "# made by hand\n# in May\nfile label\na.jpg 2\nmy b.jpg 0\nc.jpg 1\nd.jpg 9\n"
    assert _read(tmp_path, text) == ([2, 0, 1], 4)


def test_lines_of_one_file_must_agree(tmp_path):
    boxes = "a.jpg n01 1 2\na.jpg n01 5 6\nmy b.jpg n01\nc.jpg n02\n"
    assert _read(tmp_path, boxes) == ([0, 0, 1], 0)
    with pytest.raises(InputError, match="labels.txt must hold one label .*: it has both 'n01' and 'n02' for a.jpg"):
        _read(tmp_path, "a.jpg n01\na.jpg n02\nmy b.jpg n01\nc.jpg n02\n")
