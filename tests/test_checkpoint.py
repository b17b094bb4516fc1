"""Checkpoints and model folders: what is kept, what comes back, what is refused."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax
from kdjax.checkpoint import (
    Checkpoints,
    describe,
    describe_model,
    load_method,
    load_variables,
    save_method,
    save_model,
    sizing_of,
)
from kdjax.data.sizing import Sizing
from kdjax.errors import UserError
from kdjax.models import build_model
from kdjax.optim import make_optimizer
from kdjax.state import init_state

OPTIMIZER = make_optimizer(lambda step: 0.1)
MODEL = {
    "name": "retinanet",
    "backbone": {"depth": 18, "width": 0.125},
    "neck": {"channels": 8, "max_level": 5},
    "head": {"convs": 1},
}
CLASSES = ("dot", "dash")
DESCRIPTION = describe_model(MODEL, CLASSES, (64, 64))


def state(step: int, size: int = 3):
    variables = {"params": {"head": {"kernel": jnp.full(size, step, jnp.float32)}}, "batch_stats": {}}
    return init_state(variables, {}, OPTIMIZER).replace(step=jnp.int32(step))


def test_the_newest_and_the_best_are_kept_across_restarts(tmp_path):
    aps = {1: 10.0, 2: 30.0, 3: float("nan"), 4: 20.0, 5: None}
    checkpoints = Checkpoints(tmp_path, keep=1, metric="AP")
    for step, ap in aps.items():
        checkpoints.save(state(step), ap)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1, metric="AP")
    for step in (6, 7):
        checkpoints.save(state(step))
    checkpoints.close()
    assert sorted(name for name in os.listdir(tmp_path) if name.isdigit()) == ["2", "7"]


def test_the_newest_state_comes_back_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, metric="AP")
    assert checkpoints.latest() is None
    saved = state(7)
    checkpoints.save(saved)
    restored = checkpoints.restore(state(0))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(saved)))


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, metric="AP")
    checkpoints.save(state(7))
    with pytest.raises(UserError, match=r"step 7 .* another model.*head/kernel is float32\[3\], wanted float32\[5\]"):
        checkpoints.restore(state(0, size=5))
    checkpoints.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder, and what was put into it."""
    module = build_model(MODEL, num_classes=len(CLASSES))
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    folder = tmp_path_factory.mktemp("model") / "student"
    save_model(folder, variables, DESCRIPTION)
    return folder, module, variables


def test_a_student_is_loaded_by_one_public_function(trained):
    folder, module, variables = trained
    loaded, arrays = kdjax.load_student(folder)
    assert loaded == module
    jax.tree.map(np.testing.assert_array_equal, arrays, variables)
    images = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    found = jax.jit(lambda x: loaded.apply(x, images, jnp.array([[64, 64]]), method="detect"))(arrays)
    assert found.boxes.shape == (1, 100, 4)


def test_saving_again_replaces_the_folder(trained, tmp_path):
    _, _, variables = trained
    for _ in range(2):
        save_model(tmp_path / "student", variables, DESCRIPTION)
    assert os.listdir(tmp_path) == ["student"]
    assert describe(tmp_path / "student")["class_names"] == list(CLASSES)


def test_variables_come_from_a_model_folder_or_from_one_step_of_the_checkpoints(trained, tmp_path):
    folder, _, variables = trained
    jax.tree.map(np.testing.assert_array_equal, load_variables(folder), variables)
    with Checkpoints(tmp_path, metric="AP") as checkpoints:
        checkpoints.save(state(7))
    found = load_variables(tmp_path / "7")
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], [7, 7, 7])
    with pytest.raises(UserError, match="holds no kdjax model"):
        load_variables(tmp_path)


def test_a_folder_says_how_its_images_were_scaled_and_one_of_0_1_how_large_they_were(tmp_path):
    scaled = Sizing(((800, 1344), (1344, 800)), (640, 800), 1333)
    for folder, sizing in (("scaled", scaled), ("plain", (64, 96))):
        save_model(tmp_path / folder, {"params": {"x": np.zeros(1)}}, describe_model(MODEL, CLASSES, sizing))
    assert sizing_of(tmp_path / "scaled") == scaled
    assert describe(tmp_path / "scaled")["image_size"] == [800, 1344]
    path = tmp_path / "plain" / "model.json"
    known = json.loads(path.read_text())
    for description in (known, {key: x for key, x in known.items() if key != "sizing"}):
        path.write_text(json.dumps(description))
        assert sizing_of(tmp_path / "plain") == Sizing(((64, 96),))
    images, size = kdjax.prepare([np.ones((32, 96, 3), np.uint8), np.ones((128, 20, 3), np.uint8)], tmp_path / "plain")
    assert images.shape == (2, 64, 96, 3)
    assert size.tolist() == [[32, 96], [64, 10]]
    path.write_text(json.dumps(known | {"sizing": {"image_size": 3}}))
    with pytest.raises(UserError, match="is damaged: it does not say how its images were scaled"):
        sizing_of(tmp_path / "plain")


def test_two_trainings_of_one_config_have_different_digests(trained, tmp_path):
    folder, _, variables = trained
    save_model(tmp_path / "other", jax.tree.map(lambda x: x + 1, variables), DESCRIPTION)
    assert describe(folder)["sha256"] != describe(tmp_path / "other")["sha256"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no kdjax model"):
        kdjax.load_student(tmp_path)


def test_a_model_without_its_arrays_is_refused(trained, tmp_path):
    folder, _, _ = trained
    (tmp_path / "model.json").write_text((folder / "model.json").read_text())
    with pytest.raises(UserError, match=r"The arrays in .*variables cannot be read"):
        kdjax.load_student(tmp_path)


def test_arrays_of_another_model_are_refused(trained, tmp_path):
    _, _, variables = trained
    folder = tmp_path / "student"
    save_model(folder, variables, DESCRIPTION)
    description = json.loads((folder / "model.json").read_text())
    description["model"]["neck"]["channels"] = 16
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"not those of the model.*conv_0/bias is float32\[8\], wanted float32\[16\]"):
        kdjax.load_student(folder)


def files_of_arrays(folder):
    """The files that hold numbers, by size: the largest first."""
    found = [path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path)]
    return sorted(found, key=lambda path: -path.stat().st_size)


# TensorStore may finish what it gave up after its loop is closed.
ABANDONED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ABANDONED
def test_a_flipped_bit_in_the_arrays_is_refused_at_every_load(trained, tmp_path):
    folder, _, variables = trained
    save_method(tmp_path / "method", variables["params"]["neck"], {"name": "mgd"})
    for original, load in (
        (folder, lambda path: kdjax.load_student(path)[1]),
        (folder, load_variables),
        (tmp_path / "method", load_method),
    ):
        sound, refused = load(original), 0
        for place in range(8):
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            (path, *_) = files_of_arrays(copy)
            data = bytearray(path.read_bytes())
            data[len(data) * (2 * place + 1) // 16] ^= 1 << place
            path.write_bytes(data)
            try:
                read = load(copy)
            except UserError as error:
                refused += bool(re.search(r"The arrays in .*copy/variables (are damaged|cannot be read)", str(error)))
            else:  # Some bytes of a file are read by nobody.
                jax.tree.map(np.testing.assert_array_equal, read, sound)
            shutil.rmtree(copy)
        assert refused >= 3


@pytest.mark.parametrize("text", ["[]", "{", '{"model": {}}', "\udcff"])
def test_a_damaged_description_is_refused(trained, tmp_path, text):
    shutil.copytree(trained[0], tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"model/model.json (is damaged: it lacks|cannot be read)"):
        kdjax.load_student(tmp_path / "model")


@ABANDONED
def test_a_damaged_checkpoint_is_refused_with_its_step(tmp_path):
    with Checkpoints(tmp_path, metric="AP") as checkpoints:
        checkpoints.save(state(7, size=3000))
    for path in files_of_arrays(tmp_path / "7"):
        path.write_bytes(path.read_bytes()[:100])
    with (
        Checkpoints(tmp_path, metric="AP") as checkpoints,
        pytest.raises(UserError, match=r"The checkpoint of step 7 in .* cannot be read .*; move the folder of that"),
    ):
        checkpoints.restore(state(0, size=3000))
