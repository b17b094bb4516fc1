"""Files of weights: what PyTorch itself wrote, the same by hand, and a corpus of hostile and broken ones.

``files/`` holds two checkpoints that PyTorch 2.13 wrote, in its zip format and in the one before 1.6, with a state dict
beside things that training leaves in checkpoints.
"""

import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax.errors import UserError
from kdjax.weights import files, pickles, read_weights, torch_file
from tests.weights.pickles import op_dict, op_int, op_name, op_tensor, op_text, op_texts, write_pth, write_zip

FILES = Path(__file__).parent / "files"


def counted(start, *shape):
    return (np.arange(start, start + np.prod(shape), dtype=np.float32) / 8).reshape(shape)


# As the two files were made.
WRITTEN = {
    "conv.weight": counted(0, 2, 3, 1, 2),
    "norm.running_var": counted(20, 3),
    "norm.num_batches_tracked": np.array(7),
    "half": counted(30, 2, 2).astype(np.float16),
    "bfloat": counted(40, 2, 2).astype(jnp.bfloat16),
    "double": counted(50, 3).astype(np.float64),
    "transposed": counted(60, 2, 3).T,
    "slice": counted(100, 4, 6)[1:3, 2:5],
    "shared": counted(100, 4, 6),
    "parameter": counted(70, 2),
    "scalar": np.array(0.5, np.float32),
}


def assert_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name, strict=True)


def forbid(*args, **kwargs):
    raise AssertionError("A pickle was about to be executed.")


@pytest.mark.parametrize("name", ["torch_2_13_zip.pth", "torch_2_13_legacy.pth"])
def test_a_checkpoint_that_pytorch_wrote_is_read_without_unpickling(name, monkeypatch):
    for reader in ("Unpickler", "_Unpickler", "load", "loads", "_load", "_loads"):
        monkeypatch.setattr(pickle, reader, forbid)
    assert_states(read_weights(FILES / name).tensors, WRITTEN)


def test_safetensors_are_read_in_all_types_of_weights(tmp_path):
    plain = {name: np.ascontiguousarray(x) for name, x in WRITTEN.items() if x.dtype != jnp.bfloat16}
    save_file(plain, tmp_path / "plain.safetensors")
    assert_states(read_weights(tmp_path / "plain.safetensors").tensors, plain)
    # Written by hand: 8 bytes of length, a header in JSON, the data.
    header = b'{"bfloat":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'
    data = struct.pack("<Q", len(header)) + header + WRITTEN["bfloat"].tobytes()
    (tmp_path / "bfloat.safetensors").write_bytes(data)
    assert_states(read_weights(tmp_path / "bfloat.safetensors").tensors, {"bfloat": WRITTEN["bfloat"]})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read(tmp_path, save):
    plain = {name: x for name, x in WRITTEN.items() if x.dtype != jnp.bfloat16}
    save(tmp_path / "weights.npz", **plain)
    assert_states(read_weights(str(tmp_path / "weights.npz")).tensors, plain)


GOOD = op_tensor("0", 4, (2, 2), (2, 1))


def read_zip(path, *args, **kwargs):
    write_zip(path, *args, **kwargs)
    return read_weights(path).tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_a_state_dict_may_stand_alone_or_below_a_key(path, key):
    state = op_dict(weight=GOOD)
    pickled = op_dict(**{key: state, "epoch": op_int(3)}) if key else state
    assert_states(read_zip(path, pickled), {"weight": np.arange(4, dtype=np.float32).reshape(2, 2)})


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "system": (os.system, ("touch canary",), rf"{os.system.__module__}\.system"),
    "eval": (eval, ("open('canary', 'w')",), r"_*builtins?_*\.eval"),
    "exec": (exec, ("open('canary', 'w')",), r"_*builtins?_*\.exec"),
    "getattr": (getattr, ("", "join"), r"_*builtins?_*\.getattr"),
    "open": (open, ("canary", "w"), r"_?io\.open"),
    "import": (__import__, ("os",), r"_*builtins?_*\.__import__"),
}
"""What is called, with what, and the name that the refusal must tell."""


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrapped", ["alone", "in the state dict", "in the meta"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_calls_something_is_refused_by_its_name_and_nothing_runs(
    tmp_path, monkeypatch, name, wrapped, protocol
):
    monkeypatch.chdir(tmp_path)
    function, arguments, words = HOSTILE[name]
    evil = Canary(function, *arguments)
    content = {
        "alone": evil,
        "in the state dict": {"weight": evil},
        "in the meta": {"state_dict": {}, "meta": {"config": [evil]}},
    }[wrapped]
    pickled = pickle.dumps(content, protocol=protocol)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    start = b"".join(pickle.dumps(x, 2) for x in (*torch_file._LEGACY_START, {"little_endian": True}))
    (tmp_path / "legacy.pth").write_bytes(start + pickled + pickle.dumps([], 2))
    (tmp_path / "plain.pth").write_bytes(pickled)
    for kind in ("zip", "legacy", "plain"):
        with pytest.raises(
            ValueError, match=f"{kind}.pth cannot be read: .*it names {words}, which weights do not need"
        ):
            read_weights(tmp_path / f"{kind}.pth")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["legacy.pth", "plain.pth", "zip.pth"]


def test_what_training_leaves_beside_a_state_dict_becomes_nothing_and_is_not_called(path):
    made = op_name("mmengine.logging.history_buffer", "HistoryBuffer") + b")" + b"\x81" + op_dict(x=op_int(1)) + b"b"
    config = op_name("mmengine.config.config", "ConfigDict") + b")R" + b"(" + op_text("a") + op_int(1) + b"u"
    pickled = op_dict(state_dict=op_dict(weight=GOOD), meta=op_dict(log=made, config=config))
    assert_states(read_zip(path, pickled), {"weight": np.arange(4, dtype=np.float32).reshape(2, 2)})
    with pytest.raises(
        ValueError, match=r"entry 'log' of its state dict is mmengine\.logging\.history_buffer\.History"
    ):
        read_zip(path, op_dict(log=made))


def test_a_training_checkpoint_of_mmengine_is_read_whatever_its_histories_mention(monkeypatch):
    """Its HistoryBuffers pickle their own methods as ``getattr(HistoryBuffer, "min")``."""
    for reader in ("Unpickler", "_Unpickler", "load", "loads", "_load", "_loads"):
        monkeypatch.setattr(pickle, reader, forbid)
    file = read_weights(FILES / "mmengine_0_10_epoch_2.pth")
    shapes = {name: x.shape for name, x in file.tensors.items()}
    norms = {f"bn.{name}": (2,) for name in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == {"backbone.weight": (2, 3), "backbone.bias": (2,), **norms, "bn.num_batches_tracked": ()}
    assert all(np.isfinite(x).all() for x in file.tensors.values())
    assert file.tensors["bn.num_batches_tracked"] == 8
    assert file.class_names == ("bolt", "nut")


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (op_name("mmengine.logging", "HistoryBuffer"), op_text("__globals__")),
        (op_name("mmengine.logging", "HistoryBuffer"), op_text("_secret")),
        (op_name("mmengine.logging", "HistoryBuffer"), op_text("min.__globals__")),
        (op_name("mmengine.logging", "HistoryBuffer"), op_name("mmengine.logging", "name")),
        (op_name("builtins", "object"), op_text("mro")),
        (op_name("builtins", "dict"), op_text("fromkeys")),
        (op_text("text"), op_text("join")),
        (op_name("builtins", "getattr"), op_text("real")),
    ],
)
@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_getattr_of_anything_else_is_refused(path, owner, attribute, module):
    asked = op_name(module, "getattr") + owner + attribute + b"\x86R"
    with pytest.raises(UserError, match=rf"it names {module}\.getattr, which weights do not need"):
        read_zip(path, op_dict(state_dict=op_dict(weight=GOOD), meta=op_dict(x=asked)))


def test_getattr_with_other_arguments_is_refused(path):
    for arguments in (b")", b"N", op_text("x") + b"\x85"):
        with pytest.raises(UserError, match=r"it names builtins\.getattr"):
            read_zip(path, op_dict(weight=op_name("builtins", "getattr") + arguments + b"R"))


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": op_texts("a", "b")}, ("a", "b")),
        ({"dataset_meta": op_dict(classes=op_texts("a", "b"))}, ("a", "b")),
        ({"dataset_meta": op_dict(CLASSES=op_texts("a"))}, ("a",)),
        ({"CLASSES": op_text("ab")}, None),
        ({"CLASSES": op_texts()}, None),
        ({"dataset_meta": op_int(3)}, None),
        ({}, None),
    ],
)
def test_the_classes_that_a_file_names_are_read(path, meta, names):
    write_pth(path, {"weight": np.ones((2, 3), np.float32)}, **meta)
    file = read_weights(path)
    np.testing.assert_array_equal(file.tensors["weight"], np.ones((2, 3)))
    assert file.class_names == names


def test_long_texts_are_not_kept_and_too_long_pickles_not_read(path, monkeypatch):
    monkeypatch.setattr(pickles, "LONGEST_KEPT", 100)
    found = pickles.interpret(io.BytesIO(op_dict(log=op_text("x" * 101), name=op_text("x" * 100)) + b"."))
    assert found == {"log": pickles.Block(start=15, length=101, utf8=True), "name": "x" * 100}
    monkeypatch.setattr(torch_file, "MOST_PICKLE_BYTES", 100)
    with pytest.raises(UserError, match="its pickle is longer than 100 bytes"):
        read_zip(path, op_dict(weight=GOOD, log=op_text("x" * 100)))


def nested(depth):
    return b"(" * depth + b"t" * depth


def doubled(times):
    """A tuple of two equal tuples of two equal tuples ...: small as a pickle, endless for whoever walks through it."""
    return b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(times))


BROKEN = {
    "a list": (b"]", r"it holds a list instead of a dict of tensors"),
    "a module": (op_name("torch.nn", "Module") + b")\x81", r"it holds torch\.nn\.Module instead of a dict"),
    "a number in the state dict": (op_dict(step=op_int(3)), r"the entry 'step' of its state dict is a int"),
    "no tensors": (op_dict(), r"it has no tensors"),
    "no end": (b"}(", r"its pickle is broken|no end|exhausted"),
    "empty stack": (b"u", r"its pickle is broken"),
    "unknown memo": (b"h\x09", r"its pickle is broken"),
    "unhashable": (b"}]" + op_int(1) + b"s", r"it has no tensors"),
    "a tensor without arguments": (op_name("torch._utils", "_rebuild_tensor_v2") + b")R", r"cannot be read"),
    "a tensor of a number": (
        op_name("torch._utils", "_rebuild_tensor_v2") + b"(" + op_int(1) + op_int(0) + b"))tR",
        r"it keeps tensors in a way that this version does not know",
    ),
    "an extension": (b"\x82\x01", r"instruction EXT1"),
    "a call with keywords": (op_name("torch", "device") + b")}\x92", r"instruction NEWOBJ_EX"),
    "missing data": (op_dict(weight=op_tensor("7", 4, (2, 2), (2, 1))), r"data of the tensor 'weight' are missing"),
    "data of another entry": (op_dict(weight=op_tensor("../data.pkl", 4, (2,), (1,))), r"'weight' are missing"),
    "beyond its data": (op_dict(weight=op_tensor("0", 4, (2, 2), (2, 1), 1)), r"'weight' is larger than its data"),
    "a bomb of strides": (
        op_dict(weight=op_tensor("0", 4, (2**30, 2**30), (0, 0))),
        r"'weight' has an impossible shape",
    ),
    "a bomb beside nothing": (
        op_dict(weight=op_tensor("0", 4, (2**30, 2**30, 0), (0, 0, 0))),
        r"'weight' has an impossible shape",
    ),
    "negative": (op_dict(weight=op_tensor("0", 4, (2, 2), (-2, 1))), r"'weight' has an impossible shape"),
    "a shape without strides": (op_dict(weight=op_tensor("0", 4, (2, 2), ())), r"'weight' has an impossible shape"),
    "unknown numbers": (
        op_dict(weight=op_tensor("0", 4, (2,), (1,), storage="QInt8Storage")),
        r"it has tensors of torch\.QInt8Storage; they must be one of torch\.DoubleStorage",
    ),
    "two types of one storage": (
        op_dict(a=op_tensor("0", 4, (2,), (1,)), b=op_tensor("0", 2, (2,), (1,), storage="DoubleStorage")),
        r"the data '0' have two types",
    ),
    "deep": (nested(200_000), r"it holds a tuple instead"),
    "doubled": (doubled(100), r"it holds a tuple instead"),
    "doubled as a key": (doubled(100) + b"}h\x64" + op_int(1) + b"s", r"it has no tensors"),
    "a name over lines": (op_dict(**{"a\nb": GOOD}), r"the impossible name 'a\\nb'"),
    "a long name": (op_dict(**{"x" * 1000: GOOD}), r"the impossible name 'x{256}'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pickle_is_refused_in_one_sentence(path, kind):
    pickled, words = BROKEN[kind]
    with pytest.raises(UserError, match=words) as raised:
        read_zip(path, pickled)
    assert str(raised.value).startswith(f"The weights in {path} ")
    assert "\n" not in str(raised.value)


def test_too_many_instructions_are_refused(path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 100)
    with pytest.raises(UserError, match="more than 100 instructions"):
        read_zip(path, b"N0" * 100 + op_dict(weight=GOOD))


def test_archives_that_torch_never_writes_are_refused(path, monkeypatch):
    state = op_dict(weight=GOOD)
    with pytest.raises(UserError, match="it is a compressed zip archive"):
        read_zip(path, state, data={"0": bytes(10**7)}, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="big-endian"):
        read_zip(path, state, byteorder="big")
    with pytest.raises(UserError, match="'weight' are missing or cut off"):
        read_zip(path, state, data={"0": bytes(15)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("code/model.py", "print()")
    with pytest.raises(UserError, match=r"it has no data\.pkl"):
        read_weights(path)
    write_zip(path, state)
    path.write_bytes(path.read_bytes().replace(np.arange(4, dtype="<f4").tobytes(), bytes(16)))
    with pytest.raises(UserError, match="CRC"):
        read_weights(path)
    monkeypatch.setattr(files, "MOST_BYTES", 15)
    with pytest.raises(UserError, match="its tensors have more than 15 bytes"):
        read_zip(path, state)


def test_zip_entries_that_share_bytes_are_refused(path):
    """A small archive whose directory names the same bytes many times."""
    write_zip(path, op_dict(weight=GOOD), data={"0": bytes(4000)})
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.getinfo("archive/data/0")
        for index in range(1, 50):
            again = zipfile.ZipInfo(f"archive/data/{index}")
            again.header_offset, again.CRC = entry.header_offset, entry.CRC
            again.compress_size, again.file_size = entry.compress_size, entry.file_size
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(UserError, match="its parts are larger than the file"):
        read_weights(path)


def test_no_name_in_an_archive_is_used_as_a_path(tmp_path, path):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "../data.pkl", b"\x80\x02" + op_dict(**{"../../x": op_tensor("../../y", 4, (4,), (1,))}) + b"."
        )
        archive.writestr("../data/../../y", np.arange(4, dtype="<f4").tobytes())
    assert_states(read_weights(path).tensors, {"../../x": np.arange(4, dtype=np.float32)})
    assert [x.name for x in tmp_path.iterdir()] == ["inside"]


def test_the_oldest_format_and_other_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(__file__, "pickle")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>404</title>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes((FILES / "torch_2_13_legacy.pth").read_bytes()[:-100])
    (tmp_path / "folder.pth").mkdir()
    for name, what in (("tar", "it is a tar archive"), ("page", "it is a web page"), ("empty", "it is empty")):
        with pytest.raises(UserError, match=what):
            read_weights(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="it is cut off"):
        read_weights(tmp_path / "cut.pth")
    with pytest.raises(UserError, match="it is a folder"):
        read_weights(tmp_path / "folder.pth")
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "absent.pth")


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


NPZ = {
    "objects": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps([1])), "Python objects"),
    "more than it has": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "larger than its"),
    "code": (npy("__import__('os').system('touch canary')"), "malformed"),
    "no array": (b"text", "magic string"),
    "another version": (b"\x93NUMPY\x07\x00", "unknown version|we only support"),
}


@pytest.mark.parametrize("kind", NPZ)
def test_a_broken_npz_is_refused(tmp_path, kind):
    content, words = NPZ[kind]
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(UserError, match=f"file.npz cannot be read: .*{words}"):
        read_weights(tmp_path / "file.npz")


def test_an_npz_that_unfolds_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 10**6)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(10**6, np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**5
    with pytest.raises(UserError, match="its arrays have more than 1000000 bytes"):
        read_weights(tmp_path / "bomb.npz")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "deflated.npz", x=np.zeros(2**23, np.float32))
    assert (tmp_path / "deflated.npz").stat().st_size < 2**16
    for name, way in (("lzma", zipfile.ZIP_LZMA), ("bzip2", zipfile.ZIP_BZIP2)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", way) as archive:
            archive.writestr("x.npy", bytes(2**20))
    monkeypatch.setattr(zipfile.ZipFile, "open", forbid)
    with pytest.raises(UserError, match="its arrays would become more than 16 times as large as the file"):
        read_weights(tmp_path / "deflated.npz")
    for name in ("lzma", "bzip2"):
        with pytest.raises(UserError, match=r"it is packed in a way that numpy\.savez never packs"):
            read_weights(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.pth"])
def test_a_directory_of_too_many_entries_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    np.savez(tmp_path / "x.npz", **{str(k): np.zeros(1) for k in range(20)})
    write_zip(tmp_path / "x.pth", op_dict(weight=GOOD), data={str(k): bytes(16) for k in range(20)})
    monkeypatch.setattr(files, "MOST_INDEX_BYTES", 1000)
    with pytest.raises(UserError, match="its list of entries has more than 1000 bytes"):
        read_weights(tmp_path / name)


SAFETENSORS = {
    "header": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "no whole file of safetensors"),
    "type": (b'{"x":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}', "'x' is of F8_E5M2"),
    "cut": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "no whole file of safetensors"),
    "long": (b'{"x":' + b" " * 2**24, "its header has more than 16777216 bytes"),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_broken_safetensors_are_refused(tmp_path, kind):
    header, words = SAFETENSORS[kind]
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match=f"file.safetensors cannot be read: .*{words}"):
        read_weights(tmp_path / "file.safetensors")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.pth").mkdir()
    for name, what in (("pipe.npz", "no file"), ("folder.pth", "a folder")):
        with pytest.raises(UserError, match=f"{name} cannot be read: it is {what}"):
            read_weights(tmp_path / name)


def test_a_shape_of_flags_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((1,), np.float32))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        array = archive.read("a.npy").replace(b"(1,), }   ", b"(True,), }")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", array)
    with pytest.raises(UserError, match=r"'a.npy' has the impossible shape \(True,\)"):
        read_weights(tmp_path / "x.npz")


def samples(folder):
    plain = {name: np.ascontiguousarray(x) for name, x in WRITTEN.items() if x.dtype != jnp.bfloat16}
    save_file(plain, folder / "a.safetensors")
    np.savez(folder / "a.npz", **plain)
    yield from ((folder / name).read_bytes() for name in ("a.safetensors", "a.npz"))
    yield from ((FILES / f"torch_2_13_{kind}.pth").read_bytes() for kind in ("zip", "legacy"))
    yield from (pickle.dumps({"model": plain}, protocol) for protocol in (2, 5))


@pytest.mark.parametrize("index", range(6))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, index):
    content = list(samples(tmp_path))[index]
    path = tmp_path / ("x.safetensors", "x.npz", "x.pth", "x.pth", "x.pkl", "x.pkl")[index]
    rng = random.Random(index)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            damaged = damaged[: rng.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except UserError:
            refused += 1
    assert refused > 20


ODD = (b"-1", b"True", b"None", b"1e9", b"9" * 30, b"4294967296", b"()", b"{}", b"'x'", b"|O", b"|V8", b"<c16", b"F64")


def with_odd_word(rng, header):
    """A header in which something odd stands for a number, a type or a key."""
    found = list(re.finditer(rb"\d+|<f4|F32|True|False|fortran_order|shape|dtype|data_offsets|descr", header))
    place = rng.choice(found)
    return header[: place.start()] + rng.choice(ODD) + header[place.end() :]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_header_that_says_something_odd_is_read_or_refused_and_nothing_else(tmp_path, kind):
    """As above, but behind sound checksums and lengths."""
    array, rng, refused = np.ones((2, 3), np.float32), random.Random(0), []
    for _ in range(100):
        if kind == "npz":
            header = with_odd_word(rng, b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }").decode()
            with zipfile.ZipFile(tmp_path / "x", "w") as archive:
                archive.writestr("x.npy", npy(header, array.tobytes()))
        else:
            header = with_odd_word(rng, b'{"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}')
            (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + array.tobytes())
        try:
            read_weights(tmp_path / "x")
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert max(map(len, refused)) < 700


ANY_NAME = ("epoch=3.ckpt", "model_best.pth.tar", "model_final.pkl", "weights", "checkpoint.npz", "x.safetensors")


@pytest.mark.parametrize("name", ANY_NAME)
def test_a_file_is_known_by_its_content_whatever_its_name(tmp_path, name):
    path, plain = tmp_path / name, {"a": counted(0, 2, 3), "b": counted(9, 4)}
    for kind in ("zip", "legacy"):
        path.write_bytes((FILES / f"torch_2_13_{kind}.pth").read_bytes())
        assert_states(read_weights(path).tensors, WRITTEN)
    path.write_bytes(pickle.dumps(plain))
    assert_states(read_weights(path).tensors, plain)
    with path.open("wb") as file:
        np.savez(file, **plain)
    assert_states(read_weights(path).tensors, plain)
    save_file(plain, path)
    assert_states(read_weights(path).tensors, plain)


OTHERS = {
    "a text": (b"hello", "it is none of safetensors, an index of several, .npz, a file of torch.save, a pickle"),
    "a page": (b"\n<html><body>Sign in", "it is a web page instead of the file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a pointer of Git LFS"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "it is compressed by gzip: unpack it"),
    "an array": (b"\x93NUMPY\x01\x00", "it is a single array of NumPy"),
    "keras": (b"\x89HDF\r\n\x1a\n", "it is a file of HDF5, as Keras writes"),
    "no index": (b'{"weights": {}}', "it is JSON without a weight_map"),
    "no JSON": (b'{"weights', "Unterminated string"),
    "deep JSON": (b'{"a":' * 10**5, "recursion"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_files_turn_out_to_be_is_said(path, kind):
    content, words = OTHERS[kind]
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot be read: .*{words}"):
        read_weights(path)


def test_a_torchscript_program_is_called_one(path):
    module = op_name("__torch__.torchvision.models.resnet", "ResNet") + b")\x81}(" + op_text("conv") + GOOD + b"ub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"model/{name}", b"\x80\x02" + module + b".")
        archive.writestr("model/code/__torch__/torchvision/models/resnet.py", "class ResNet(Module): ...")
    with pytest.raises(UserError, match=r"is a TorchScript program, which would have to be run; save model\.state_dic"):
        read_weights(path)


SHARDS = {"model-00001-of-00002.safetensors": ("a",), "model-00002-of-00002.safetensors": ("b", "c")}


@pytest.fixture
def index(tmp_path):
    """The index of two files of safetensors, and the tensors in them."""
    plain = {name: counted(place, 2, 3) for place, name in enumerate("abc")}
    for shard, names in SHARDS.items():
        save_file({name: plain[name] for name in names}, tmp_path / shard)
    places = {name: shard for shard, names in SHARDS.items() for name in names}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": places}, indent=2))
    return path, plain


def test_weights_in_several_files_are_read_by_their_index(index):
    path, plain = index
    assert_states(read_weights(path).tensors, plain)


def test_a_part_that_is_missing_elsewhere_or_too_much_is_refused(index, monkeypatch):
    path, _ = index
    text = path.read_text()
    for name in ("../model-00002-of-00002.safetensors", str(path)):
        path.write_text(text.replace("model-00002-of-00002.safetensors", name))
        with pytest.raises(UserError, match="which is no file beside it"):
            read_weights(path)
    path.write_text(text.replace("model-00002-of", "model-00003-of"))
    with pytest.raises(UserError, match=r"its part model-00003-of-00002\.safetensors: there is no such file"):
        read_weights(path)
    path.write_text(text.replace("model-00002-of", "model-00001-of"))
    with pytest.raises(UserError, match=r"its part model-00001-of-00002\.safetensors has no tensor 'b'"):
        read_weights(path)
    path.write_text(text)
    monkeypatch.setattr(files, "MOST_BYTES", 190)
    with pytest.raises(UserError, match=r"its part model-00002-of-00002\.safetensors: it has more than \d+ bytes"):
        read_weights(path)
    monkeypatch.setattr(files, "MOST_INDEX_BYTES", 10)
    with pytest.raises(UserError, match="it has more than 10 bytes"):
        read_weights(path)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_TENSORS", 2)
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1), c=np.zeros(1))
    with pytest.raises(UserError, match=r"x\.npz are 3 tensors, more than 2"):
        read_weights(tmp_path / "x.npz")


def test_a_tensor_of_many_dimensions_is_refused(path):
    with pytest.raises(UserError, match="'weight' has an impossible shape"):
        read_zip(path, op_dict(weight=op_tensor("0", 4, (1,) * 70, (1,) * 70)))
