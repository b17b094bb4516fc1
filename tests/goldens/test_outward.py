"""What is written for PyTorch against the originals' own state dicts: the same names, and arrays to the bit."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax.models import build_model, complete
from kdjax.weights import expected_model, import_state_dict
from kdjax.weights.outward import NEVER, export_state_dict
from tests.goldens import test_classification, test_detectors, test_segmentation
from tests.goldens.cases import Case, find_cases, load_case
from tests.goldens.synthetic import synthetic_state_dict
from tests.slow import slow_but

# The smaller ones; small models of all programs are in tests/weights/test_outward.py.
QUICK = ("mmseg_deeplabv3_r18", "mgd_mobilenet_v1")


def original(path: Path, case: Case) -> tuple[str, dict[str, Any] | None, int]:
    """Of a case, the source, the config of our model (None where there is none), and the number of its classes."""
    if path.parent.name == "detectors":
        found = test_detectors.original(case)
        return found.source, found.model, found.num_classes
    if path.parent.name == "classification":
        return *test_classification.original(path.stem), case.meta["num_classes"]
    source = test_segmentation.SOURCE[path.stem.split("_")[0]]
    return source, test_segmentation.original(path.stem, case.spec), case.meta["num_classes"]


def cases(kind: str) -> list[Path]:
    """Those of networks that kdjax has, each by itself."""
    return [path for path in find_cases(kind) if load_case(path).spec and "distill" not in path.stem]


KINDS = ("detectors", "segmentation", "classification")
CASES = slow_but(QUICK, [path for kind in KINDS for path in cases(kind)])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_an_original_is_written_as_it_was(path):
    case = load_case(path)
    source, config, classes = original(path, case)
    if config is None:
        pytest.skip("of a detector that kdjax does not have")
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    model = expected_model(complete(config), source, state).model
    like = jax.eval_shape(build_model(model, classes).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = import_state_dict(state, source, model=model, like=like, num_classes=classes).variables

    written = export_state_dict(variables, source, model=model, num_classes=classes).state
    assert written.keys() == state.keys()
    again = import_state_dict(written, source, model=model, like=like, num_classes=classes).variables
    for name, array in flatten_dict(variables, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(again, sep="/")[name], array, err_msg=name, strict=True)
    for name, array in state.items():
        np.testing.assert_array_equal(of_classes(written[name], name, state, source), array, err_msg=name, strict=True)


def of_classes(array, name, state, source):
    """An array that was written as its original has it.

    Nobody reads the boxes and the masks of torchvision's background, which are written as zeros. Its dense heads have a
    background as well, and those of the cases were imported as if it were a class.
    """
    original = state[name]
    if "torchvision" not in source:
        return array
    if re.search(r"bbox_pred|mask_fcn_logits", name) and "rpn" not in name:
        first = 4 if "bbox_pred" in name else 1
        assert not array[:first].any()
        return np.concatenate([original[:first], array[first:]])
    if "classification_head.cls_logits" in name:
        anchors = state["head.regression_head.bbox_reg.bias"].size // 4
        split = array.reshape(anchors, -1, *array.shape[1:])
        assert (split[:, 0] == (NEVER if "bias" in name else 0)).all()
        return split[:, 1:].reshape(original.shape)
    return array
