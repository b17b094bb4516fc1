"""The converter: a state dict by other names becomes a folder like those that training leaves."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import kdjax
from kdjax.config import load_config
from kdjax.convert import convert, read_class_names
from kdjax.errors import Exit, UserError
from kdjax.models import build_model
from kdjax.saved import describe
from tests.weights.naming import resnet_names, to_state_dict, torchvision_names
from tests.weights.pickles import op_dict, op_texts, write_pth

ROOT = Path(__file__).parents[1]
CONFIG = f"{ROOT}/configs/mgd.py:tiny"
NAMES = ("cat", "dog", "hot dog")


@pytest.fixture(scope="module")
def expected():
    """Path to array of the tiny teacher."""
    detector = build_model(load_config(CONFIG).teacher.model.to_dict(), len(NAMES))
    like = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flatten_dict(like, sep="/").items()}


@pytest.fixture
def weights(expected, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **to_state_dict(expected, torchvision_names("retinanet", range(3, 8), norm=True)))
    return path


def test_the_command_writes_a_model_that_loads(weights, expected, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nhot dog\n")
    folder = tmp_path / "model"
    flags = {"config": CONFIG, "weights": weights, "source": "torchvision", "output": folder}
    flags["class_names"] = tmp_path / "names.txt"
    command = [sys.executable, "-m", "kdjax.convert", *(f"--{name}={value}" for name, value in flags.items())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{len(expected)} tensors taken" in run.stdout
    module, variables = kdjax.load_student(folder)
    assert module.num_classes == 3
    actual = flatten_dict(variables, sep="/")
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    described = describe(folder)
    assert described["class_names"] == list(NAMES)
    assert described["model"]["backbone"]["style"] == "pytorch"
    # A second time the folder is replaced; without the file's flag it is one sentence.
    run = subprocess.run(command[:4] + command[5:], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == Exit.USAGE
    assert run.stderr == "kdjax: --weights is missing; it names the file.\n"


def test_a_model_folder_is_replaced_and_another_one_is_not(weights, tmp_path):
    folder = tmp_path / "model"
    for _ in range(2):
        convert(load_config(CONFIG), "teacher", str(weights), "torchvision", NAMES, folder)
    with pytest.raises(UserError, match="exists and is no model folder"):
        convert(load_config(CONFIG), "teacher", str(weights), "torchvision", NAMES, tmp_path)
    assert weights.exists()


def test_the_classes_that_a_file_names_are_the_models_and_no_others(expected, tmp_path):
    config, folder, path = load_config(CONFIG), tmp_path / "model", tmp_path / "weights.pth"
    state = to_state_dict(expected, torchvision_names("retinanet", range(3, 8), norm=True))
    write_pth(path, state, dataset_meta=op_dict(classes=op_texts("Cat", "dog", "hot_dog")))
    with pytest.raises(UserError, match=r"another order: number 1 is 'Cat' here and 'dog' there"):
        convert(config, "teacher", str(path), "torchvision", ("dog", "Cat", "hot_dog"), folder)
    convert(config, "teacher", str(path), "torchvision", None, folder)
    assert describe(folder)["class_names"] == ["Cat", "dog", "hot_dog"]
    convert(config, "teacher", str(path), "torchvision", NAMES, folder)
    assert describe(folder)["class_names"] == list(NAMES)


def test_what_does_not_fit_is_one_sentence(weights, expected, tmp_path):
    config, folder = load_config(CONFIG), tmp_path / "model"
    with pytest.raises(UserError, match="--stage=teachr is no stage of the config; its stages are teacher, student"):
        convert(config, "teachr", str(weights), "torchvision", NAMES, folder)
    with pytest.raises(UserError, match=r"weights\.npz does not say what its classes are: name them by --class_names"):
        convert(config, "teacher", str(weights), "torchvision", read_class_names(""), folder)
    with pytest.raises(UserError, match="tell 3 classes apart"):
        convert(config, "teacher", str(weights), "torchvision", ("cat", "dog", "hot dog", "bun"), folder)
    with pytest.raises(UserError, match="no source of weights 'keras'"):
        convert(config, "teacher", str(weights), "keras", NAMES, folder)
    with pytest.raises(UserError, match=r"absent\.pth cannot be read"):
        convert(config, "teacher", str(tmp_path / "absent.pth"), "mmdet", NAMES, folder)
    backbone = {path: x for path, x in expected.items() if "/backbone/" in path}
    np.savez(tmp_path / "backbone.npz", **to_state_dict(backbone, resnet_names("")))
    with pytest.raises(UserError, match="holds a backbone alone, which is no whole model"):
        convert(config, "teacher", str(tmp_path / "backbone.npz"), "timm", NAMES, folder)
    assert not folder.exists()


def test_class_names_are_read_line_by_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n hot dog \n")
    assert read_class_names(str(path)) == ("cat", "hot dog")
    path.write_text("cat\ncat\n")
    with pytest.raises(UserError, match="one name in each line, none of them twice"):
        read_class_names(str(path))
    with pytest.raises(UserError, match=r"absent\.txt cannot be read"):
        read_class_names(str(tmp_path / "absent.txt"))
