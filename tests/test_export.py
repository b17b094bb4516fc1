"""A trained model as a file for others: where kdjax and Flax are not, it says the same to the last bit."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import util
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
from kdjax.export import by_name, export, read_size
from kdjax.files import sha256_of
from kdjax.models import MODELS, build_model, complete, model_class
from kdjax.models.dense import undecided
from kdjax.saved import describe, describe_model, save_model
from kdjax.weights import import_state_dict, read_weights

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
CALL = """
import jax, jax.export, numpy as np

program = jax.export.deserialize(open("student", "rb").read())
for given in ("one", "three"):
    arrays = np.load(f"{given}.npz")
    np.savez(f"found_{given}.npz", **jax.jit(program.call)(arrays["images"], arrays["image_size"]))
"""
EXPECT = """
import jax, kdjax, numpy as np
from kdjax.export import by_name

module, variables = kdjax.load_student("model")
predict = jax.jit(lambda *arrays: by_name(module.apply(*arrays, method="predict"), module.task))
for given in ("one", "three"):
    arrays = np.load(f"{given}.npz")
    np.savez(f"expected_{given}.npz", **predict(variables, arrays["images"], arrays["image_size"]))
"""
ROUNDING = {"boxes": 2e-3, "whole_masks": 1}
"""How far outputs may be apart, floats by 1e-5 and whole numbers not unless said: on some processors no bit differs, on
others a program of any number of images sums in another order than one of so many. Boxes are in pixels."""
SAME = 0.9
"""Share of the numbers that are so near: of detections of nearly equal scores another one may come first."""
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
    like = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SHAPE, 3))))
    arrays = {
        path: rng.normal(size=x.shape) / math.sqrt(math.prod(x.shape[:-1]))
        if path[-1] in ("kernel", "bias")
        else np.full(x.shape, path[-1] in ("scale", "var"))
        for path, x in like.items()
    }
    arrays = {path: x.astype(np.float32) for path, x in arrays.items()}
    save_model(folder, unflatten_dict(arrays), describe_model(model, CLASSES, sizing, (3, 5, 8)))
    return folder


def images_of(count):
    rng = np.random.default_rng(count)
    size = np.array([SHAPE, (48, 96), (64, 40)], np.int32)[:count]
    images = rng.integers(0, 256, (count, *SHAPE, 3), dtype=np.uint8)
    for image, (height, width) in zip(images, size, strict=True):
        image[height:] = image[:, width:] = 0
    return {"images": images, "image_size": size}


def run(program, folder):
    """Runs a program in a folder, compiled as users' are; returns what it prints."""
    users = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=users)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny detector's."""
    return save(tmp_path_factory.mktemp("detector") / "student", model_of("retinanet"))


def installed(*packages):
    """A mark that skips where a package is missing."""
    missing = [package for package in packages if util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def command(folder, form, output):
    """Exports from the command line; returns what is printed."""
    flags = [f"--model={folder}", f"--format={form}", f"--output={output}"]
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.export", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def arrays_in(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.slow
@installed("flatbuffers")
@pytest.mark.parametrize("case", [*MODELS, *VARIANTS])
def test_a_program_says_the_same_without_kdjax_and_flax(case, tmp_path):
    saved = save(tmp_path / "model", model_of(case))
    described = export(str(saved), "stablehlo", tmp_path / "student")
    assert described == json.loads((tmp_path / "student.json").read_text())
    assert described["platforms"] == ["cpu", "cuda", "tpu"]
    assert described["inputs"]["images"]["shape"] == ["b", *SHAPE, 3]
    given = {"one": images_of(1), "three": images_of(3)}
    for name, arrays in given.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    run(EXPECT, tmp_path)
    run(ELSEWHERE + CALL, tmp_path)
    for name in given:
        expected, found = (arrays_in(tmp_path / f"{what}_{name}.npz") for what in ("expected", "found"))
        assert found.keys() == expected.keys() == described["outputs"].keys()
        for output, x in expected.items():
            said = described["outputs"][output]
            assert [["b", *x.shape[1:]], x.dtype.name] == [said["shape"], said["dtype"]]
            most = ROUNDING.get(output, 1e-5 if np.issubdtype(x.dtype, np.floating) else 0)
            near = np.abs(found[output].astype(np.float64) - x) <= most
            assert near.mean() >= (SAME if "valid" in expected else 1), (
                f"{output} of {name}: {near.mean():.1%} are near"
            )
        assert np.any(found.get("valid", True))


@pytest.mark.slow
@installed("flatbuffers")
def test_the_page_finds_in_a_photograph_what_the_student_finds(folder, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    photograph = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    said = command(folder, "stablehlo", tmp_path / "student.stablehlo")
    assert "student.stablehlo: detection, 3 classes" in said
    printed = run(ELSEWHERE + program, tmp_path).splitlines()

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


@installed("flatbuffers")
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
    use = "\n".join([*described["use"], "print(found['boxes'].shape)"])
    assert run(ELSEWHERE + use, tmp_path) == "(1, 100, 4)\n"
    assert described["sha256"] == sha256_of(tmp_path / "a.stablehlo")


@pytest.mark.slow
@installed("jax2onnx", "onnxruntime")
@pytest.mark.parametrize(
    "case",
    [
        *("resnet_classifier", "mobilenet_v1", "mobilenet_v2", "pspnet", "deeplabv3"),
        *("retinanet", "fcos", "atss", "gfl"),
    ],
)
def test_onnx_runtime_says_the_same(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    saved, output = save(tmp_path / "model", model_of(case)), tmp_path / "student.onnx"
    command(saved, "onnx", output)
    program = onnxruntime.InferenceSession(str(output))
    module, variables = kdjax.load_student(saved)
    described = json.loads((tmp_path / "student.onnx.json").read_text())
    for count in (1, 3) if case.startswith("mobilenet") else (1,):
        given = images_of(count)
        if module.task == "detection":
            expected = undecided(module, variables, *given.values())
        else:
            expected = by_name(module.apply(variables, **given, method="predict"), module.task)
        found = dict(zip(expected, program.run(list(expected), given), strict=True))
        for name, x in expected.items():
            assert found[name].dtype == described["outputs"][name]["dtype"]
            np.testing.assert_allclose(found[name], x, atol=1e-3 if name == "boxes" else 1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("faster_rcnn", "takes no faster_rcnn: non-maximum suppression, .* Take --format=stablehlo"),
        ("reppoints", "takes no reppoints with deformable convolutions: ONNX Runtime does not load"),
        ("fcos_deformable", "takes no fcos with deformable convolutions"),
    ],
)
def test_what_does_not_become_onnx_is_refused(case, words, tmp_path):
    saved = save(tmp_path / "model", model_of(case))
    with pytest.raises(UserError, match=words):
        export(str(saved), "onnx", tmp_path / "student.onnx")
    assert not (tmp_path / "student.onnx").exists()


@pytest.mark.slow
@installed("tensorflow", "flatbuffers")
@pytest.mark.parametrize("case", ["mobilenet_v1", "pspnet"])
def test_tensorflow_says_the_same(case, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    saved, output = save(tmp_path / "model", model_of(case)), tmp_path / "student"
    command(saved, "savedmodel", output)
    program = tensorflow.saved_model.load(str(output)).signatures["serving_default"]
    module, variables = kdjax.load_student(saved)
    for count in (1, 3):
        given = images_of(count)
        expected = by_name(module.apply(variables, **given, method="predict"), module.task)
        found = program(**{name: tensorflow.constant(x) for name, x in given.items()})
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, atol=1e-3, err_msg=name)


@pytest.mark.slow
@installed("tensorflow", "flatbuffers")
def test_a_detector_is_written_for_tensorflow_or_it_is_too_old(folder, tmp_path):
    said = ""
    try:
        export(str(folder), "savedmodel", tmp_path / "student")
    except UserError as error:
        said = str(error)
    too_old = re.fullmatch(r"TensorFlow .* does not run what JAX .* makes of a retinanet: take a newer .*", said)
    assert (tmp_path / "student").exists() == (tmp_path / "student.json").exists() == (not too_old)


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
    with pytest.raises(UsageError, match="--format=onyx is unknown; choose one of stablehlo, onnx"):
        export(str(folder), "onyx", tmp_path / "student")
    with pytest.raises(DataError, match="holds no kdjax model"):
        export(str(tmp_path), "stablehlo", tmp_path / "student")
    for text in ("64", "64x", "64x96x3", "31x64", "65536x64", "-64x64"):
        with pytest.raises(UsageError, match="must be height and width in pixels"):
            read_size(text)


@installed("flatbuffers")
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
