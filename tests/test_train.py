"""A stage that starts from a file: whose classes it knows, and what it takes over where they are not the data's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax import train
from kdjax.errors import UserError
from kdjax.models import build_detector
from kdjax.weights import COCO_NAMES, load_into
from tests.test_config import CONFIGS, load
from tests.weights.naming import to_state_dict, torchvision_names

MGD = next(path for path in CONFIGS if path.stem == "mgd")
# With the background, and the places of COCO's numbering that are empty.
OUTPUTS = 91


def drawn(model, classes):
    detector = build_detector(model, classes)
    like = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)


@pytest.fixture
def stage(tmp_path):
    """A stage that starts from a detector of COCO's classes in torchvision's format."""
    stage = load(MGD, "tiny").student
    arrays = flatten_dict(drawn(stage.model.to_dict(), OUTPUTS), sep="/")
    path = tmp_path / "coco.npz"
    np.savez(path, **to_state_dict(arrays, torchvision_names("retinanet", range(3, 7), norm=True)))
    stage.update(weights=str(path), source="torchvision")
    return stage


def test_a_file_of_the_datas_classes_is_taken_over(stage):
    assert train._import(stage, "student", COCO_NAMES).class_names == COCO_NAMES


def test_a_file_of_the_classes_in_another_order_is_refused_with_both_places(stage):
    with pytest.raises(
        UserError, match=r"config.student.weights: .*coco.npz and the data .* another order.*init_strict"
    ):
        train._import(stage, "student", COCO_NAMES[::-1])


def test_a_file_of_more_classes_is_refused_with_the_way_to_start_from_it(stage):
    with pytest.raises(
        UserError, match=r"tell 91 classes apart.* The data have 2 classes; .*student.init_strict=False"
    ):
        train._import(stage, "student", ("cat", "dog"))


def test_what_does_not_depend_on_classes_starts_a_detector_of_others(stage):
    stage.init_strict = False
    imported = train._import(stage, "student", ("cat", "dog"))
    fresh = drawn(stage.model.to_dict(), 2)
    filled, report = load_into(fresh, imported.variables, origin="coco.npz", strict=False)
    assert all("cls_logits" in path for path in report.mismatched)
    assert len(report.matched) + len(report.mismatched) == len(jax.tree.leaves(fresh))
    for path, array in flatten_dict(filled, sep="/").items():
        source = fresh if "cls_logits" in path else imported.variables
        np.testing.assert_array_equal(array, flatten_dict(source, sep="/")[path], err_msg=path)
