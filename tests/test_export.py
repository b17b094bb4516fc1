"""A trained model as a file for others: where kdjax and Flax are not, it says the same to the last bit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

import kdjax
from kdjax.data.sizing import Sizing
from kdjax.errors import DataError, Exit, StorageError, UsageError, UserError
from kdjax.export import Trained, export, inference, read_size
from kdjax.files import sha256_of
from kdjax.models import MODELS, build_model, complete, model_class
from kdjax.saved import describe, describe_model, save_model, sizing_of
from kdjax.weights import import_state_dict, read_weights
from tests.slow import slow_but

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "hot dog")
SHAPE = 64, 96
ELSEWHERE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kdjax", "flax", "orbax", "optax"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
"""
"""What stands before a program that must do without kdjax and Flax."""
LEVEL = "xla_backend_optimization_level"
OPTIMISED = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"{LEVEL}=0", f"{LEVEL}=3")}
"""Programs are compared as XLA compiles them for users; unoptimised ones round otherwise where weights are constant."""
CALL = """
import jax, jax.export, numpy as np

program = jax.export.deserialize(open("student", "rb").read())
for given in ("one", "three"):
    arrays = np.load(f"{given}.npz")
    found = jax.jit(program.call)(arrays["images"], arrays["image_size"])
    np.savez(f"found_{given}.npz", **found)
"""
VARIANTS = {
    "retinanet_resnext": {"name": "retinanet", "backbone": {"depth": 50, "groups": 4, "base_width": 8}},
    "fcos_deformable": {"name": "fcos", "backbone": {"depth": 50, "deformable": True}},
    "pspnet_windows": {"name": "pspnet", "head": {"window": (48, 48), "window_stride": (32, 32)}},
}
"""Models besides the tiny ones of every name, each with something that those have not."""


def model_of(case):
    """The config of a tiny model."""
    given = VARIANTS.get(case, {"name": case})
    small = model_class(given["name"]).tiny
    return {"name": given["name"]} | {
        part: small.get(part, {}) | given.get(part, {}) for part in {*small, *given} - {"name"}
    }


def save(folder, model, sizing=SHAPE):
    """Writes the folder of a model that finds something, though it has learnt nothing."""
    module, rng = build_model(model, len(CLASSES)), np.random.default_rng(0)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *SHAPE, 3)))
    arrays = {
        path: rng.normal(size=x.shape).astype(np.float32) if path[-1] == "bias" else np.asarray(x)
        for path, x in flatten_dict(variables).items()
    }
    save_model(folder, unflatten_dict(arrays), describe_model(model, CLASSES, sizing, (3, 5, 8)))
    return folder


def images_of(count):
    rng = np.random.default_rng(count)
    size = np.array([SHAPE, (48, 96), (64, 40)], np.int32)[:count]
    images = rng.integers(0, 256, (count, *SHAPE, 3), dtype=np.uint8)
    for image, (height, width) in zip(images, size, strict=True):
        image[height:] = image[:, width:] = 0
    return {"images": images, "image_size": size}


def elsewhere(program, folder):
    """Runs a program in a folder, in a process without kdjax and Flax; returns what it prints."""
    command = [sys.executable, "-c", ELSEWHERE + program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | OPTIMISED)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny detector's."""
    return save(tmp_path_factory.mktemp("detector") / "student", model_of("retinanet"))


needs_flatbuffers = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('flatbuffers')")


@needs_flatbuffers
@pytest.mark.parametrize("case", slow_but(("mobilenet_v1",), [*MODELS, *VARIANTS]))
def test_a_program_says_the_same_without_kdjax_and_flax(case, tmp_path):
    saved = save(tmp_path / "model", model_of(case))
    described = export(str(saved), "stablehlo", tmp_path / "student")
    assert described == json.loads((tmp_path / "student.json").read_text())
    assert described["platforms"] == ["cpu", "cuda", "tpu"]
    assert described["inputs"]["images"]["shape"] == ["b", *SHAPE, 3]
    given = {"one": images_of(1), "three": images_of(3)}
    for name, arrays in given.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    elsewhere(CALL, tmp_path)
    module, variables = kdjax.load_student(saved)
    model = Trained(module, variables, describe(saved), sizing_of(saved))

    def predict(variables, images, image_size):
        return inference(model._replace(variables=variables))(images, image_size)

    for name, arrays in given.items():
        expected = jax.jit(predict).lower(variables, **arrays).compile({LEVEL: 3})(variables, **arrays)
        found = np.load(tmp_path / f"found_{name}.npz")
        assert found.keys() == expected.keys() == described["outputs"].keys()
        for output, x in expected.items():
            said = described["outputs"][output]
            assert ["b", *x.shape[1:]], x.dtype.name == (said["shape"], said["dtype"])
            np.testing.assert_array_equal(found[output], x, err_msg=f"{output} of {name}")
        assert np.any(found.get("valid", True))


@needs_flatbuffers
def test_the_page_finds_in_a_photograph_what_the_student_finds(folder, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    photograph = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    command = [sys.executable, "-m", "kdjax.export", f"--model={folder}", "--format=stablehlo"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'student.stablehlo'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "student.stablehlo: detection, 3 classes" in done.stdout
    printed = elsewhere(program, tmp_path).splitlines()

    module, variables = kdjax.load_student(folder)
    images, size = kdjax.prepare([photograph], folder)
    found = jax.tree.map(lambda x: np.asarray(x)[0], module.apply(variables, images, size, method="predict"))
    boxes = found.boxes / np.tile(size[0, ::-1] / [90, 100], 2)
    assert len(printed) == found.valid.sum() > 10
    for line, label, score, box in zip(printed, found.labels, found.scores, boxes, strict=False):
        name, printed_score, printed_box = re.fullmatch(r"(.*) (\S+) \[(.*)\]", line).groups()
        assert name == CLASSES[label]
        assert float(printed_score) == pytest.approx(score, abs=1e-3)
        assert [float(x) for x in printed_box.split(",")] == pytest.approx(box, abs=0.06)


@needs_flatbuffers
def test_the_description_says_what_a_stranger_needs(folder, tmp_path):
    described = export(str(folder), "stablehlo", tmp_path / "a.stablehlo", (32, 64))
    assert described["class_names"] == list(CLASSES)
    assert described["category_ids"] == [3, 5, 8]
    assert described["kdjax"] == kdjax.__version__
    assert described["sizing"]["image_size"] == [[32, 64]]
    assert described["sizing"]["antialias"] is True
    assert described["outputs"]["boxes"] == {
        "shape": ["b", 100, 4],
        "dtype": "float32",
        "meaning": "xyxy in pixels of the scaled image, best first",
    }
    assert "classes: 3" in elsewhere(
        "\n".join([*described["use"], "print('classes:', 1 + int(found['labels'].max()))"]), tmp_path
    )
    assert described["sha256"] == sha256_of(tmp_path / "a.stablehlo")


def test_a_model_that_saw_several_shapes_wants_one_to_be_said(tmp_path):
    saved = save(tmp_path / "model", model_of("mobilenet_v1"), Sizing((SHAPE, SHAPE[::-1])))
    with pytest.raises(UsageError, match="say --image_size=64x96 or --image_size=96x64"):
        export(str(saved), "stablehlo", tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_package_is_named_with_what_installs_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"flatbuffers: install it with `pip install 'kdjax\[export\]'`"):
        export(str(folder), "stablehlo", tmp_path / "student")


def test_what_cannot_be_exported_is_refused_in_words(folder, tmp_path):
    with pytest.raises(UsageError, match="--format=onyx is unknown; choose one of stablehlo"):
        export(str(folder), "onyx", tmp_path / "student")
    with pytest.raises(DataError, match="holds no kdjax model"):
        export(str(tmp_path), "stablehlo", tmp_path / "student")
    for text in ("64", "64x", "64x96x3", "31x64", "65536x64", "-64x64"):
        with pytest.raises(UsageError, match="must be height and width in pixels"):
            read_size(text)


@needs_flatbuffers
def test_an_output_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    with pytest.raises(StorageError, match=r"--output=.*/no/such cannot be written \(No such file or directory\)"):
        export(str(folder), "stablehlo", tmp_path / "no" / "such")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model is missing; name a folder"),
        (["--model=a", "--formt=onnx"], "Unknown command line flag 'formt'. Did you mean: format ?"),
        (["--model", "a", "--format=stablehlo", "student"], "'student' is no flag"),
    ],
    ids=("nothing", "misspelt", "stray"),
)
def test_a_mistake_is_one_sentence_and_an_exit_code(flags, words):
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.export", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.USAGE, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_weights_for_pytorch_come_with_the_lines_that_load_them(tmp_path):
    model = {"name": "retinanet", "backbone": {"depth": 18, "width": 0.125}, "neck": {"channels": 16}}
    folder = save(tmp_path / "model", {**model, "head": {"convs": 1}})
    described = export(str(folder), "mmdet", tmp_path / "student.safetensors")
    assert described == json.loads((tmp_path / "student.safetensors.json").read_text())
    assert described["first_label"] == 0
    assert described["class_names"] == list(CLASSES)
    assert "'base_channels': 8" in "\n".join(described["use"])
    file = read_weights(tmp_path / "student.safetensors")
    variables = kdjax.load_student(folder)[1]
    config = complete(describe(folder)["model"])
    back = import_state_dict(file.tensors, "mmdet", model=config, like=variables, num_classes=len(CLASSES))
    expected = flatten_dict(variables)
    for path, array in flatten_dict(back.variables).items():
        np.testing.assert_array_equal(array, expected.pop(path))
    assert not expected
