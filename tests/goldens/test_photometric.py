"""The photometric distortion against MMSegmentation's own, step by step, with the amounts that it drew."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdjax.data.distortion import Step, distort
from tests.goldens.cases import find_cases, no_cases

CASES = [path for path in find_cases("segmentation") if path.stem.startswith("mmseg_photometric")]
MEAN, NEAR = 0.25, 2
"""Grey levels; 99 % of the values are as near as the second."""


def test_there_are_cases():
    assert CASES, no_cases("segmentation")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_images_become_what_the_original_made_of_them(path: Path):
    with np.load(path) as file:
        cases = json.loads(str(file["meta"]))["cases"]
        # The original's channels are blue, green and red.
        images, results = ([file[f"{name}_{k}"][..., ::-1] for k in range(len(cases))] for name in ("image", "result"))
    for steps, image, result in zip(cases, images, results, strict=True):
        found = distort(image, [Step(name, amount) for name, amount in steps if amount is not None])
        difference = np.abs(found.astype(int) - result)
        assert difference.mean() < MEAN
        assert np.mean(difference <= NEAR) >= 0.99
