"""What version 0.1 wrote is read for good: ``files/kdjax_0_1.tar.gz``, made by that version at commit c5c374f."""

import copy
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax
from kdjax.plan import resolve
from kdjax.run.data import open_splits
from kdjax.run.record import _as_far_as, _completed, differences, identity
from kdjax.saved import describe, load_method, load_variables
from kdjax.types import FILES
from tests.runs import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ROOT / "tests" / "files" / "kdjax_0_1.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_model_loads_and_detects(old):
    described = describe(old / "model")
    assert described["kdjax"] == "0.1.0"
    assert described["class_names"] == ["dot", "dash"]
    module, variables = kdjax.load_student(old / "model")
    jax.tree.map(np.testing.assert_array_equal, load_variables(old / "model"), variables)
    images = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    found = module.apply(variables, images, jnp.array([[64, 64]]), method="detect")
    assert found.boxes.shape == (1, 100, 4)


def test_a_method_loads(old):
    (learnt,) = load_method(old / "method").values()
    assert learnt["kernel"].shape[-1] == 8


def test_a_stage_is_known_by_what_it_was_known_by(old, data_dir):
    """But for the data's fingerprints and the teacher's folder, which were made elsewhere, and today's weight."""
    saved = json.loads((old / "stage_config.json").read_text())
    config = tiny(ROOT / "configs" / "mgd.py", data_dir)
    config.student.loss_weights.mgd, config.student.method_share = 5e-4, 0.0
    plan = resolve(config, devices=8)
    changed = differences(_completed(saved), identity(plan, plan["student"], open_splits(plan)))
    assert not [change for change in changed if ".train:" not in change and ".eval:" not in change]


def test_what_a_stage_of_0_1_said_of_its_method_is_where_it_is_said_today():
    """MasKD with imitated boxes, tokens of an earlier stage and an optimiser of its own; and one without a method."""
    optimizer = {"name": "adam", "learning_rate": 0.01}
    tokens = {"stage": {"method": {"name": "none"}, "method_init": "", "optimizer": {}}, "data": {}, "from": {}}
    stage = {"method": {"name": "maskd", "tokens": 4}, "method_init": "tokens", "imitate_boxes": True}
    stage |= {"levels": ["p3"], "method_optimizer": optimizer, "optimizer": {}}
    found = _completed({"stage": stage, "data": {}, "from": {"method_init": tokens}})
    maskd = found["stage"]["methods"]["maskd"]
    assert (maskd["tokens"], maskd["weighted"], maskd["init"], maskd["levels"]) == (4, True, "tokens", ["p3"])
    assert (maskd["optimizer"]["name"], maskd["optimizer"]["beta2"]) == ("adam", 0.99)
    assert list(found["stage"]["methods"]) == ["box_imitation", "maskd"]
    assert found["from"]["methods"]["maskd"]["stage"]["methods"] == {}
    assert found["task"] == "detection"
    gone = {"method", "method_init", "method_optimizer", "imitate_boxes", "levels"}
    assert not gone & found["stage"].keys()


def test_a_stage_of_dfmsd_that_chose_between_the_stage_and_objects_is_another_config():
    """Today both strengthen the masks, and a layer adapts the student: what it learnt is not what it would learn."""
    stage = {"methods": {"dfmsd": {"name": "dfmsd", "enhance": "ratio"}}, "optimizer": {}}
    saved = _completed({"stage": stage, "data": {}, "from": {}})
    known = copy.deepcopy(saved)
    del known["stage"]["methods"]["dfmsd"]["enhance"]
    assert differences(saved, known) == ["stage.methods.dfmsd.enhance: 'ratio' -> 'absent'"]


def test_data_that_0_1_knew_without_their_files_are_still_the_same():
    saved = {"data": {"train": "1a"}, "from": {"teacher": {"data": {"train": "1a"}}}}
    known = {"data": {"train": f"1a{FILES}2b"}, "from": {"teacher": {"data": {"train": f"3c{FILES}2b"}}}}
    assert differences(saved, _as_far_as(saved, known)) == [f"from.teacher.data.train: '1a' -> '3c{FILES}2b'"]
    # Once the files are known, others are others.
    assert differences({"train": f"1a{FILES}2b"}, _as_far_as({"train": f"1a{FILES}2b"}, {"train": f"1a{FILES}3c"}))
