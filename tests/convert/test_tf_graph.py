import numpy as np
import pytest
from graph_files import constant, field, node, number, tensor, varint

from mvar_jax.convert import tf_graph
from mvar_jax.convert.tf_graph import read_constants
from mvar_jax.errors import InputError

X = np.arange(6, dtype="<f4").reshape(2, 3)


def read(tmp_path, data: bytes) -> dict:
    (tmp_path / "x.pb").write_bytes(data)
    return read_constants("inception", tmp_path / "x.pb")


def refusal_of(tmp_path, data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, data)
    assert caught.value.field == "inception" and "is not a readable TensorFlow graph" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        field(4, X.tobytes()),  # tensor_content
        field(5, X.tobytes()),  # float_val, packed
        b"".join(varint(5 << 3 | 5) + value.tobytes() for value in X.reshape(-1)),  # float_val, one by one
    ],
)
def test_every_form_of_a_constant(tmp_path, values):
    data = field(99, b"unknown") + node("scope/x", tensor(X.shape, values)) + number(7, 3)
    (found,) = read(tmp_path, data).items()
    assert found[0] == "scope/x"
    np.testing.assert_array_equal(found[1], X)


def test_one_value_fills_its_shape(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, node("x", tensor((2, 2), field(4, X[0, 2:].tobytes()))))["x"], 2)


def test_other_nodes_and_types_are_skipped(tmp_path):
    whole = tensor(X.shape, field(4, X.tobytes()))
    others = [node("a", whole, op="Conv2D"), node("b", tensor((1,), field(7, b"\x01"), dtype=3))]
    others.append(node("c", whole, key="shape"))
    assert list(read(tmp_path, b"".join([*others, node("x", whole)]))) == ["x"]


WHOLE = constant("x", X)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it has no constants"),
        (WHOLE[:-1], "exceeds the"),
        (varint(1 << 3 | 2) + varint(2**62), "a field of 4611686018427387904 bytes exceeds the 0 that are left"),
        (b"\xff" * 30, "a number is cut"),
        (b"\x0b", "unknown wire type 3"),
        (node("x", tensor((2**20, 2**20), field(4, X.tobytes()))), "a constant of shape"),
        (node("x", tensor((2**40,), field(4, b"1234"))), "an axis of unknown size"),
        (node("x", tensor((2,) * 9, field(4, b"1234"))), "a constant of shape"),
        (node("x", tensor(X.shape, number(4, 5))), "a number is where a message is expected"),
        (number(1, 5), "it has no constants"),
    ],
)
def test_damaged_and_hostile_graphs_are_refused(tmp_path, data, expected):
    assert expected in refusal_of(tmp_path, data)


def test_one_value_of_a_huge_shape_takes_no_memory(tmp_path):
    found = read(tmp_path, node("x", tensor((2**20, 2**20), field(4, X[0, 1:2].tobytes()))))["x"]
    assert found.shape == (2**20, 2**20) and found.strides == (0, 0)


def test_a_file_of_tiny_fields_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_graph, "MAX_FIELDS", 1000)
    assert "more than 1000 fields" in refusal_of(tmp_path, number(7, 3) * 1001)


def test_what_is_no_file_or_too_large_is_refused_unread(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not a regular file"):
        read_constants("inception", tmp_path)
    monkeypatch.setattr(tf_graph, "MAX_GRAPH_BYTES", 10)
    assert "more than 10 bytes" in refusal_of(tmp_path, bytes(11))
