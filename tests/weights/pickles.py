"""Files of torch.save, written instruction by instruction: sound ones and others."""

import struct
import zipfile

import numpy as np


def op_name(module, name):
    return f"c{module}\n{name}\n".encode()


def op_text(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def op_int(number):
    return b"J" + struct.pack("<i", number)


def op_tensor(key, size, shape, strides, offset=0, storage="FloatStorage"):
    """A call of torch._utils._rebuild_tensor_v2, with a persistent id inside."""
    numbers = [b"(" + b"".join(map(op_int, numbers)) + b"t" for numbers in (shape, strides)]
    persistent = (
        b"(" + op_text("storage") + op_name("torch", storage) + op_text(key) + op_text("cpu") + op_int(size) + b"t"
    )
    arguments = b"(" + persistent + b"Q" + op_int(offset) + numbers[0] + numbers[1] + b"\x89N" + b"t"
    return op_name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def op_dict(**entries):
    return b"}(" + b"".join(op_text(name) + value for name, value in entries.items()) + b"u"


def write_zip(path, pickled, data=None, compress=zipfile.ZIP_STORED, **extra):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        for key, content in ({"0": np.arange(4, dtype="<f4").tobytes()} if data is None else data).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in extra.items():
            archive.writestr(f"archive/{name}", content)


def op_texts(*texts):
    return b"(" + b"".join(map(op_text, texts)) + b"t"


def op_state(arrays):
    """A state dict of float32 arrays in pickle's terms, and the data of its storages."""
    data = {str(place): np.ascontiguousarray(x, "<f4").tobytes() for place, x in enumerate(arrays.values())}
    tensors = {}
    for place, (name, x) in enumerate(arrays.items()):
        strides = [int(np.prod(x.shape[axis + 1 :])) for axis in range(x.ndim)]
        tensors[name] = op_tensor(str(place), x.size, x.shape, strides)
    return op_dict(**tensors), data


def write_pth(path, arrays, **meta):
    """A checkpoint of MMDetection: a state dict of float32 arrays, and what else is known of it, in pickle's terms."""
    state, data = op_state(arrays)
    write_zip(path, op_dict(meta=op_dict(**meta), state_dict=state), data)
