import itertools
import json

import numpy as np
import pytest

from mvar_jax.data.decoding import BadImage
from mvar_jax.data.options import DataOptions, LoadOptions
from mvar_jax.data.pipeline import eval_batches, is_bad, train_batches
from mvar_jax.data.skipped import Skipped
from mvar_jax.data.sources import ArraySource
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError


def _source(num_samples=10):
    """Sample i holds the value i in its pixels and i % 5 as its label."""
    images = np.arange(num_samples, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return ArraySource(images, np.arange(num_samples) % 5, tuple("abcde"))


def _keep(image, rng):
    return image


def _add_noise(image, rng):
    """Noise in the second channel."""
    noisy = image.copy()
    noisy[..., 1] = rng.integers(256, size=image.shape[:2])
    return noisy


def _take(batches, count):
    taken = list(itertools.islice(batches, count))
    if hasattr(batches, "close"):
        batches.close()
    return taken


def _train(count, transform=_add_noise, source=None, **options):
    options = {"batch_size": 4, "seed": 3, **options}
    return _take(train_batches(source or _source(), transform, **options), count)


def _samples(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).astype(int)


def _assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            assert np.array_equal(batch[key], other[key]), key


def test_train_batch_has_the_declared_fields_and_dtypes():
    batch = _train(2)[1]
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "image": ("uint8", (4, 2, 2, 3)),
        "label": ("int32", (4,)),
        "index": ("int64", (4,)),
    }
    assert batch["index"].tolist() == [4, 5, 6, 7]
    assert np.array_equal(batch["label"], batch["image"][:, 0, 0, 0].astype(int) % 5)


@pytest.mark.parametrize("start_step", [1, 4, 37])
def test_train_batches_resume_bit_equal_at_any_step(start_step):
    full = _train(start_step + 3)
    _assert_equal(_train(3, start_step=start_step), full[start_step:])


def test_train_batches_are_the_same_for_any_number_of_threads():
    _assert_equal(*(_train(8, options=LoadOptions(num_threads=n)) for n in (3, 0)))


def test_process_shards_make_up_the_single_process_batch():
    whole = _train(5)
    parts = [_train(5, process_index=process, process_count=2) for process in range(2)]
    joined = [
        {key: np.concatenate([first[key], second[key]]) for key in first}
        for first, second in zip(*parts, strict=True)
    ]
    _assert_equal(joined, whole)
    assert not set(parts[0][0]["index"]) & set(parts[1][0]["index"])


def test_every_epoch_is_another_permutation_of_the_source():
    epochs = _samples(_train(10)).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(_samples(_train(10, seed=4)).reshape(4, 10)[0])


def test_sample_noise_differs_between_rows_epochs_and_seeds():
    def noises(seed):
        batches = _train(10, seed=seed)
        return {batch["image"][row, ..., 1].tobytes() for batch in batches for row in range(4)}

    assert len(noises(3)) == 40
    assert not noises(3) & noises(4)


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_batches_hold_every_sample_once_and_mask_the_filling(process_count):
    seen, num_batches = [], set()
    for process in range(process_count):
        batches = _take(
            eval_batches(_source(), _keep, batch_size=8, process_index=process, process_count=process_count), 99
        )
        num_batches.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (8 // process_count, 2, 2, 3)
            assert batch["mask"].dtype == np.float32 and set(batch["mask"]) <= {0, 1}
            seen.extend(batch["image"][batch["mask"] == 1, 0, 0, 0].astype(int))
    assert sorted(seen) == list(range(10))
    assert num_batches == {2}


def test_rows_that_fill_the_last_batch_are_decoded_once():
    loaded = []

    class Counted(type(_source())):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    source = _source()
    source.__class__ = Counted
    batches = _take(eval_batches(source, _keep, batch_size=64), 9)
    assert sorted(loaded) == list(range(10)) and batches[0]["mask"].sum() == 10


def test_eval_transform_gets_no_rng():
    assert (
        _take(eval_batches(_source(), lambda image, rng: image + (rng is not None), batch_size=10), 1)[0][
            "image"
        ].max()
        == 9
    )


def test_error_in_a_transform_reaches_the_caller():
    def refuse(image, rng):
        raise InputError("image must be another one", field="image")

    for num_workers in (0, 1):
        with pytest.raises(InputError, match="image must be another one"):
            _train(1, transform=refuse, options=LoadOptions(num_workers=num_workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 3}, "batch_size must be .* 3, got 4"),
        ({"batch_size": 0}, "batch_size must be .* 1, got 0"),
        ({"process_index": 2, "process_count": 2}, "process_index must be from 0 to 1, got 2"),
        ({"seed": -1}, "seed must be .*got -1"),
        ({"start_step": -1}, "start_step must be 0 or more, got -1"),
        ({"source": ArraySource(np.zeros((0, 2)), np.zeros(0), ("a",))}, "source must hold at least 1 sample"),
    ],
)
def test_train_batches_name_the_field_they_refuse(options, message):
    source = options.pop("source", _source())
    with pytest.raises(InputError, match=message):
        train_batches(source, _keep, **{"batch_size": 4, "seed": 0, **options})


def _refuse_some(image, rng):
    """Samples 3 and 7 are bad."""
    if image.flat[0] in (3, 7):
        raise BadImage(f"no good: {image.flat[0]}")
    return image if rng is None else _add_noise(image, rng)


ALLOWING = LoadOptions(max_bad_share=0.2)


def test_bad_images_are_replaced_listed_and_leave_the_other_rows_alone():
    skipped = Skipped("train", 10, 0.2)
    batches = _train(5, transform=_refuse_some, skipped=skipped)
    for batch, whole in zip(batches, _train(5), strict=True):
        good = ~np.isin(whole["image"][:, 0, 0, 0].astype(int), (3, 7))
        assert np.array_equal(batch["image"][good], whole["image"][good])
        assert np.array_equal(batch["label"], batch["image"][:, 0, 0, 0].astype(int) % 5)
        assert np.array_equal(batch["index"], whole["index"])
    assert not set(_samples(batches)) & {3, 7}
    assert [entry["name"] for entry in skipped.entries()] == ["image 3", "image 7"]
    assert skipped.entries()[1]["reason"] == "no good: 7"


def test_bad_images_keep_batches_a_function_of_seed_and_step():
    full = _train(9, transform=_refuse_some, options=ALLOWING)
    _assert_equal(_train(4, transform=_refuse_some, options=ALLOWING, start_step=5), full[5:])
    threads = LoadOptions(num_threads=0, max_bad_share=0.2)
    _assert_equal(_train(9, transform=_refuse_some, options=threads), full)


def test_worker_processes_give_the_same_batches_and_report_what_is_bad():
    skipped = Skipped("train", 10, 0.2)
    options = LoadOptions(num_workers=2, max_bad_share=0.2)
    batches = _train(5, transform=_refuse_some, options=options, skipped=skipped)
    _assert_equal(batches, _train(5, transform=_refuse_some, options=ALLOWING))
    assert [entry["number"] for entry in skipped.entries()] == [3, 7]


def test_photographs_stay_pixels_on_their_way():
    images = np.arange(10 * 8 * 8 * 3, dtype=np.uint8).reshape(10, 8, 8, 3)
    source = ArraySource(images, np.arange(10), tuple("abcdefghij"))
    transform = PhotoTransform(8, flip=False)
    for num_workers in (0, 1):
        batch = _train(1, transform=transform, source=source, options=LoadOptions(num_workers=num_workers))[0]
        np.testing.assert_array_equal(batch["image"], images[batch["label"]], strict=True)


def test_evaluation_masks_bad_images():
    skipped = Skipped("val", 10, 0.2)
    batches = _take(eval_batches(_source(), _refuse_some, batch_size=8, options=ALLOWING, skipped=skipped), 9)
    seen = np.concatenate([batch["image"][batch["mask"] == 1, 0, 0, 0] for batch in batches])
    assert seen.astype(int).tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert all(batch["image"].shape == (8, 2, 2, 3) for batch in batches) and len(skipped) == 2


def test_more_bad_images_than_allowed_end_the_work_with_their_share_and_name():
    words = "2 bad images, but data.max_bad_share=0.1 allows at most 1 of 10 train.* the last is image [37]: no good"
    with pytest.raises(InputError, match=words):
        _train(9, transform=_refuse_some, options=LoadOptions(max_bad_share=0.1))
    with pytest.raises(InputError, match="1 bad images, .*at most 0 of 10 val"):
        _take(eval_batches(_source(), _refuse_some, batch_size=8, options=LoadOptions(max_bad_share=0)), 9)


def test_nothing_but_bad_images_ends_the_work():
    def refuse(image, rng):
        raise BadImage("none")

    for share, message in ((0.3, "4 bad images"), (1.0, "no image of the train split can be used; the last")):
        with pytest.raises(InputError, match=message):
            _train(9, transform=refuse, options=LoadOptions(max_bad_share=share))


def test_list_of_skipped_images_is_kept_in_a_file_and_gone_on_with(tmp_path):
    file = tmp_path / "skipped.json"
    still_bad = lambda entry: True
    first = Skipped("train", 10, 0.2)
    first.keep_in(file, still_bad)
    assert not file.exists()
    first.add(7, "b.jpg", "cut short")
    again = Skipped("train", 10, 0.2)
    again.keep_in(file, still_bad)
    again.add(8, "b.jpg", "cut short")  # by its name: the number may have changed
    again.add(2, "a.jpg", "empty")
    content = json.loads(file.read_text())
    assert content["skipped"] == [
        {"number": 2, "name": "a.jpg", "reason": "empty"},
        {"number": 7, "name": "b.jpg", "reason": "cut short"},
    ]
    with pytest.raises(InputError, match="3 bad images"):
        again.add(3, "c.jpg", "empty")


def test_limit_of_bad_images_is_not_undone_by_restarting(tmp_path):
    mended: set[str] = set()
    still_bad = lambda entry: entry["name"] not in mended

    def start(*names):
        skipped = Skipped("train", 10, 0.3)
        skipped.keep_in(tmp_path / "skipped.json", still_bad)
        for name in names:
            skipped.add(int(name), name, "empty")
        return skipped

    start("0", "1", "2")
    for _ in range(4):
        with pytest.raises(InputError, match="4 bad images, .*at most 3 of 10 train images; the last is 5: empty"):
            start("5", "6", "7")
    mended |= {"0", "2"}
    assert [entry["name"] for entry in start("6").entries()] == ["1", "5", "6"]


def test_an_image_is_bad_only_under_its_name_and_while_it_cannot_be_read():
    asked = [(3, "image 3"), (4, "image 4"), (7, "image 3"), (99, "image 99")]
    assert [is_bad(_source(), _refuse_some, *entry) for entry in asked] == [True, False, False, False]


@pytest.mark.parametrize("field", ["num_threads", "num_workers", "max_bad_share"])
def test_loading_options_out_of_range_are_refused(field):
    with pytest.raises(InputError, match=f"data.{field} must be a .*number from 0 to .*, got -1") as error:
        LoadOptions(**{field: -1})
    assert error.value.field == f"config.data.{field}"
    with pytest.raises(InputError, match=f"data.{field}"):
        DataOptions("digits", 32, **{field: -1})


def test_memory_of_a_cache_below_zero_is_refused():
    with pytest.raises(InputError, match="data.cache_memory_mib must be a whole number of at least 0, got -1"):
        DataOptions("digits", 32, cache_memory_mib=-1)
