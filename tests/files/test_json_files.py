"""JSON files are read against a type each: what is of another type is named by its place in the file."""

import json
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest

from mvar_jax.checkpoints.best import Metric, Scores, read_scores
from mvar_jax.data.skipped import Skipped
from mvar_jax.errors import InputError
from mvar_jax.files.json_files import read_json
from mvar_jax.files.lines import read_lines
from mvar_jax.schema import conform
from mvar_jax.tokens.cache_reader import read_meta


class Part(TypedDict):
    size: int
    share: NotRequired[float]


class Whole(TypedDict):
    format: Literal[1]
    trains: Literal["a", "b"] | None
    sides: int | tuple[int, ...]
    parts: dict[str, list[Part]]


GOOD = {"format": 1, "trains": None, "sides": [1, 2], "parts": {"x": [{"size": 3, "share": 1, "more": "kept"}]}}


def test_a_value_of_the_type_is_returned_with_tuples_and_further_keys():
    read = conform(GOOD, Whole, "file")
    assert read == GOOD | {"sides": (1, 2)} and list(read) == list(GOOD)
    assert conform(np.float32(2), float, "x") == 2 and conform(np.int64(2), int, "x") == 2
    assert conform({"a": [None]}, dict[str, Any], "x") == {"a": [None]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": True}, "file.format must be 1, got True"),
        ({"trains": "c"}, "file.trains must be 'a' or 'b' or None, got 'c'"),
        ({"sides": "12"}, "file.sides must be a whole number or a list, each part a whole number, got '12'"),
        ({"sides": [1, 2.0]}, "file.sides[1] must be a whole number, got 2.0"),
        ({"sides": False}, "file.sides must be a whole number or a list, each part a whole number, got False"),
        ({"parts": []}, "file.parts must be a group of keys, got []"),
        ({"parts": {"x": {}}}, "file.parts.x must be a list, each part a group of keys, got {}"),
        ({"parts": {"x": [{}]}}, "file.parts.x[0].size is missing"),
        ({"parts": {"x": [{"size": 1, "share": "1"}]}}, "file.parts.x[0].share must be a number, got '1'"),
        ({"trains": "c" * 1000}, f"file.trains must be 'a' or 'b' or None, got 'c{'c' * 55}..."),
    ],
)
def test_a_value_of_another_type_is_named_by_its_place(change, words):
    with pytest.raises(InputError) as refusal:
        conform(GOOD | change, Whole, "file")
    assert str(refusal.value) == words
    with pytest.raises(InputError, match="^file.trains is missing$"):
        conform({key: value for key, value in GOOD.items() if key != "trains"}, Whole, "file")


@pytest.mark.parametrize("content", [b"", b"[", b"\xff\xfe", b"[" * 100_000, b"3", b'{"a": "1"}'])
def test_a_file_that_is_not_of_the_type_is_one_kind_of_error(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file.json", dict[str, int])


META = {"format": 1, "tokenizer_fingerprint": "", "tokenizer_path": "", "sides": [1], "vocab_size": 16}
SHARD = {"name": "train-0", "num_records": 1, "bytes": 8}
META |= {"dtype": "uint16", "label_names": ["ant"]}
META |= {"splits": {"train": {"num_records": 1, "num_views": 1, "shards": [SHARD]}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "cache.json.format must be 1, got 2"),
        ({"sides": 3}, "cache.json.sides must be a list"),
        ({"vocab_size": "16"}, "cache.json.vocab_size must be a whole number, got '16'"),
        ({"dtype": "text"}, "cache.json.dtype must be 'uint16' or 'int32', got 'text'"),
        ({"label_names": {"0": "ant"}}, "cache.json.label_names must be a list"),
        ({"splits": []}, "cache.json.splits must be a group of keys"),
        ({"splits": {"train": {"num_records": 1, "num_views": 1, "shards": [3]}}}, "splits.train.shards[0] must be"),
    ],
)
def test_a_damaged_cache_json_is_refused_with_the_key(tmp_path, change, words):
    (tmp_path / "cache.json").write_text(json.dumps(META))
    assert read_meta(tmp_path) == META
    (tmp_path / "cache.json").write_text(json.dumps(META | change))
    with pytest.raises(InputError) as refusal:
        read_meta(tmp_path)
    assert refusal.value.field == "cache" and words in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("content", ['{"3": "high"}', "[1]", '{"x": 1}', "3"])
def test_scores_of_another_type_count_as_none(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    assert read_scores(tmp_path) == ({}, None)


def test_scores_of_the_first_version_have_no_metric(tmp_path):
    (tmp_path / "scores.json").write_text('{"3": 0.5}')
    assert read_scores(tmp_path) == ({3: 0.5}, None)
    scores = Scores(tmp_path, *read_scores(tmp_path))
    assert scores.measure_by("fid_1k:min") is None and scores.best_of([3]) == 3
    scores.write()
    assert read_scores(tmp_path) == ({3: 0.5}, "fid_1k:min")


def test_scores_of_another_metric_or_other_settings_choose_no_best(tmp_path):
    scores = Scores(tmp_path, {3: 180.0}, "inception_score_1k:max")
    metric = Metric.parse("fid_1k")
    assert scores.measure_by(metric.describe({"eval_cfg": 1.5})) == "inception_score_1k:max"
    assert scores.is_best(metric.score({"fid_1k": 3.0}), [3])
    scores.add(6, -3.0, [3, 6])
    assert scores.measure_by(metric.describe({"eval_cfg": 1.5})) is None and scores.best_of([3, 6]) == 6
    assert scores.measure_by(metric.describe({"eval_cfg": 2.0})) == "fid_1k:min eval_cfg=1.5"
    assert scores.best_of([3, 6]) is None


@pytest.mark.parametrize("entry", [{"number": "3"}, {"name": 3}, {"reason": None}])
def test_a_list_of_bad_images_of_another_type_is_begun_again(tmp_path, entry):
    good = {"number": 3, "name": "ant/3.jpg", "reason": "cut"}
    for entries, expected in (([good], [good]), ([good | entry], [])):
        (tmp_path / "skipped.json").write_text(json.dumps({"skipped": entries}))
        skipped = Skipped("train", 10, 1.0)
        skipped.keep_in(tmp_path / "skipped.json", lambda entry: True)
        assert skipped.entries() == expected


def test_lines_that_are_no_objects_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n3\n[]\nnull\n{"st')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
