"""Arrays of NumPy in pickles, as Detectron2's model zoo and Caffe2 keep them, and what such pickles may not claim."""

import io
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.weights import pickles, read_weights, torch_file
from kdjax.weights.pickles import _pairs
from tests.weights.pickles import op_dict, op_int, op_name, op_tensor, op_text, write_zip

RNG = np.random.default_rng(0)
ARRAYS = {
    "long": RNG.normal(size=(64, 3, 7, 7)).astype(np.float32),
    "short": RNG.normal(size=(5,)).astype(np.float32),
    "column major": np.asfortranarray(RNG.normal(size=(40, 50))),
    "big-endian": RNG.normal(size=(3, 2)).astype(">f4"),
    "half": RNG.normal(size=(2000, 2)).astype(np.float16),
    "scalar": np.array(0.5, np.float32),
    "counter": np.array(7),
    "bytes": np.arange(256, dtype=np.uint8),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
}


def assert_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
        assert actual[name].dtype == array.dtype


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_final_280758.pkl"


def forbid(*args, **kwargs):
    raise AssertionError("A pickle was about to be executed.")


@pytest.fixture
def no_unpickling(monkeypatch):
    for reader in ("Unpickler", "_Unpickler", "load", "loads", "_load", "_loads"):
        monkeypatch.setattr(pickle, reader, forbid)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_arrays_is_read_without_unpickling(path, protocol, no_unpickling):
    content = {"model": ARRAYS, "__author__": "Detectron2", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol))
    assert_states(read_weights(path).tensors, ARRAYS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_may_stand_in_a_file_of_torch_save_too(path, protocol):
    pickled = pickle.dumps({"state_dict": ARRAYS}, protocol)
    write_zip(path, pickled[2:-1])
    assert_states(read_weights(path).tensors, ARRAYS)
    start = b"".join(pickle.dumps(x, 2) for x in (*torch_file._LEGACY_START, {"little_endian": True}))
    path.write_bytes(start + pickled + pickle.dumps([], 2))
    assert_states(read_weights(path).tensors, ARRAYS)


def op_bytes(content):
    """A str of Python 2."""
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def op_array(array, module="numpy.core.multiarray", dtype=None, shape=None, data=None):
    """An array as Python 2 wrote it, or with something else in it."""
    shape = b"".join(map(op_int, array.shape if shape is None else shape))
    kind = op_name("numpy", "dtype") + op_bytes((dtype or array.dtype.str[1:]).encode()) + op_int(0) + op_int(1)
    kind += b"\x87R(" + op_int(3) + op_bytes(b"<") + b"NNN" + op_int(-1) + op_int(-1) + op_int(0) + b"tb"
    made = op_name(module, "_reconstruct") + op_name("numpy", "ndarray") + op_int(0) + b"\x85" + op_bytes(b"b")
    state = b"(" + op_int(1) + b"(" + shape + b"t" + kind + b"\x89"
    return made + b"\x87R" + state + (op_bytes(array.tobytes()) if data is None else data) + b"tb"


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_pickle_of_python_2_is_read(path, module):
    plain = {name: np.asarray(ARRAYS[name], order="C") for name in ("long", "short", "half", "counter", "empty")}
    entries = b"".join(op_bytes(name.encode()) + op_array(x, module) for name, x in plain.items())
    path.write_bytes(b"\x80\x02}" + op_bytes(b"blobs") + b"}(" + entries + b"us.")
    file = read_weights(path)
    assert_states(file.tensors, plain)
    assert file.notes == ("its entry blobs is taken",)


def test_one_array_by_two_names_is_read_once(path):
    array = np.zeros(10**6, np.float32)
    path.write_bytes(pickle.dumps({f"x{index}": array for index in range(1000)}, 4))
    tracemalloc.start()
    file = read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * array.nbytes
    tracemalloc.stop()
    assert len(file.tensors) == 1000


def test_what_is_no_weight_stays_in_the_file(path):
    """As the histories of MMEngine: arrays of which nothing but their place is kept."""
    history = np.arange(4 * 10**6, dtype=np.float64)
    content = {"state_dict": {"x": ARRAYS["long"]}, "message_hub": {"loss": [history, b"x" * 10**7, "x" * 10**7]}}
    path.write_bytes(pickle.dumps(content, 2))
    tracemalloc.start()
    file = read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert_states(file.tensors, {"x": ARRAYS["long"]})


SMALL = np.arange(4, dtype=np.float32)
BROKEN = {
    "a billion numbers": (op_array(SMALL, shape=(1000, 1000, 1000)), "tensors have more than|missing or cut off"),
    "10^18 numbers": (op_array(SMALL, shape=(10**9, 10**9)), "'x' has an impossible shape"),
    "10^12 numbers": (op_array(SMALL, shape=(10**6, 10**6)), "its tensors have more than"),
    "a negative side": (op_array(SMALL, shape=(-2, -2)), "'x' has an impossible shape"),
    "a side of 0 beside too large ones": (op_array(SMALL, shape=(2**30, 2**30, 0)), "'x' has an impossible shape"),
    "too many sides": (op_array(SMALL, shape=(1,) * 70), "'x' has an impossible shape"),
    "objects": (op_array(SMALL, dtype="O8"), "'x' is not of plain numbers"),
    "texts": (op_array(SMALL, dtype="S4"), "'x' is not of plain numbers"),
    "too few data": (op_array(SMALL, data=op_bytes(b"abc")), "data of the array 'x' are missing or cut off"),
    "too many data": (op_array(SMALL, data=op_bytes(b"a" * 5000)), "data of the array 'x' are larger than itself"),
    "no data": (op_array(SMALL, data=b"N"), "data of the array 'x' are missing or cut off"),
    "data beyond the end": (op_array(SMALL, data=b"T" + struct.pack("<i", 2**31 - 1)), "its pickle has no end"),
    "data of -1 bytes": (op_array(SMALL, data=b"T" + struct.pack("<i", -1)), "something in it has -1 bytes"),
    "data of 2^63 bytes": (op_array(SMALL, data=b"\x8e" + struct.pack("<Q", 2**63)), "something in it has 92233720"),
    "data of other characters": (
        op_array(np.zeros(2000, np.float32), data=op_text("\u4e00" * 5000)),
        "a text stands where bytes should be",
    ),
    "short data of other characters": (op_array(SMALL, data=op_text("\u4e00")), "a text stands where bytes should be"),
    "no state": (
        op_name("numpy.core.multiarray", "_reconstruct") + op_name("numpy", "ndarray") + b"N" + b"N" + b"\x87R",
        "'x' is not of plain numbers",
    ),
    "a number of NumPy": (
        op_name("numpy.core.multiarray", "scalar") + b")R",
        r"'x' of its state dict is numpy\.core\.multiarray\.scalar instead",
    ),
    "loads of bytes": (
        op_name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + op_name("torch.storage", "_load_from_bytes")
        + op_bytes(b"x")
        + b"\x85R"
        + op_int(0)
        + b"))tR",
        "it keeps tensors in a way",
    ),
    "an unknown instruction": (b"\xff", "unknown instruction"),
    "deep": (b"(" * 200_000 + b"t" * 200_000, "'x' of its state dict is a tuple"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_an_array_may_not_be_is_refused_in_one_sentence(path, kind):
    content, words = BROKEN[kind]
    path.write_bytes(b"\x80\x02" + op_dict(model=op_dict(x=content)) + b".")
    tracemalloc.start()
    with pytest.raises(UserError, match=words) as raised:
        read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()
    assert "\n" not in str(raised.value)


def test_the_texts_of_a_pickle_are_bounded(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_KEPT", 1000)
    pickled = b"(" + op_text("x" * 100) * 11 + b"l."
    with pytest.raises(UserError, match="texts in its pickle have more than 1000 characters"):
        pickles.interpret(io.BytesIO(pickled))
    with pytest.raises(UserError, match="it ends too early"):
        pickles.interpret(io.BytesIO(b"X\x01"))
    # A line without an end is not searched for one.
    with pytest.raises(UserError, match="its pickle is broken"):
        pickles.interpret(io.BytesIO(b"c" + b"x" * 10**6))


TENSOR = op_tensor("0", 4, (2, 2), (2, 1))
NESTED = op_dict(a=TENSOR)
CHOICES = {
    "net": (dict(net=NESTED, acc=op_int(3)), "", {"a"}, ()),
    "model_state_dict": (
        dict(model_state_dict=NESTED, epoch=op_int(3), optimizer=op_dict(state=op_dict())),
        "",
        {"a"},
        (),
    ),
    "of any name": (dict(weights=NESTED, epoch=op_int(3)), "", {"a"}, ("its entry weights is taken",)),
    "averaged beside": (
        dict(model=NESTED, model_ema=op_dict(b=TENSOR)),
        "",
        {"a"},
        ("its entry model is taken, not model_ema",),
    ),
    "the averaged": (
        dict(model=NESTED, model_ema=op_dict(b=TENSOR)),
        "model_ema",
        {"b"},
        ("its entry model_ema is taken, not model",),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_state_dict_is_found_and_a_choice_is_said(path, case):
    entries, key, names, notes = CHOICES[case]
    write_zip(path, op_dict(**entries))
    file = read_weights(path, key)
    assert file.tensors.keys() == names
    assert file.notes == notes


def test_a_choice_that_cannot_be_made_is_refused(path):
    write_zip(path, op_dict(first=NESTED, second=NESTED))
    with pytest.raises(UserError, match="several dicts of tensors, first, second: name the one to take"):
        read_weights(path)
    with pytest.raises(UserError, match="no dict of tensors 'third'; it has first, second"):
        read_weights(path, "third")
    np.savez(path.with_suffix(".npz"), x=np.zeros(1))
    with pytest.raises(UserError, match="one set of tensors and no entries, such as 'model_ema'"):
        read_weights(path.with_suffix(".npz"), "model_ema")


def test_a_dict_made_of_its_items_is_one_and_of_anything_else_is_none():
    assert _pairs(([("a", 1), ["b", 2]],)) == [("a", 1), ("b", 2)]
    for arguments in ((), ([("a",)],), ({"a": 1},), ([1],), ([("a", 1)], 2)):
        assert _pairs(arguments) is None
