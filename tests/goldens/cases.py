"""The cases: in the folder that ``KDJAX_GOLDENS`` names, else beside the repository, else beside this file."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.slow import slow_but

HERE = Path(__file__).resolve().parent
FOLDER = "KDJAX_GOLDENS"
SAMPLE = 256
"""How many entries of an array the compact form keeps, and its norm; smaller ones and ``WHOLE`` it keeps whole."""
WHOLE = (
    "image",
    "keep_mask",
    "label",
    "logits$",
    "prediction",
    "slide/prediction",
    "target_",
    "detection_",
    "proposals_",
    "train_proposals_",
    "roi/",
)
"""What names begin with; those with a $ are whole names."""


def find_cases(kind: str) -> list[Path]:
    """The cases of a kind: "losses", "detectors", "segmentation", "classification"."""
    beside = HERE.parents[2] / "shared" / "goldens"
    folder = Path(os.environ.get(FOLDER, beside if beside.is_dir() else HERE))
    return sorted((folder / kind).glob("*.npz"))


def quick_of(quick: Iterable[str], cases: Iterable[Path]) -> list[Any]:
    """The cases as parameters of a test, marked slow but for those that ``quick`` names; of a named folder none is."""
    return list(cases) if FOLDER in os.environ else slow_but(quick, cases)


def no_cases(kind: str) -> str:
    return (
        f"No case {kind}/*.npz in {os.environ.get(FOLDER, 'the default folder')}: a folder without cases is a failure."
    )


class Sample(NamedTuple):
    """What the compact form keeps of an array."""

    shape: tuple[int, ...]
    index: np.ndarray
    """Of the entries that are kept, in the flattened array."""
    values: np.ndarray
    norm: float
    largest: float
    """Of the absolute values."""


class Case(NamedTuple):
    """What an original computed."""

    meta: dict[str, Any]
    spec: dict[str, list[int]]
    """Name of every tensor of the state dict to its shape."""
    arrays: Mapping[str, np.ndarray | Sample]

    def whole(self, name: str) -> np.ndarray:
        """An array that the compact form keeps whole."""
        array = self.arrays[name]
        assert isinstance(array, np.ndarray), name
        return array

    def indexed(self, pattern: str) -> list[np.ndarray | Sample]:
        """The arrays ``pattern.format(0)``, ``pattern.format(1)`` ... as far as there are any."""
        found = []
        while pattern.format(len(found)) in self.arrays:
            found.append(self.arrays[pattern.format(len(found))])
        return found


def _sample_index(name: str, size: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).choice(size, SAMPLE, replace=False)


def load_case(path: Path) -> Case:
    """A case in its full or its compact form; of one without weights the spec is empty."""
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {name: file[name] for name in file.files if name != "meta"}
    compact = meta.pop("compact", None)
    if compact is None:
        spec = path.with_suffix(".spec.json")
        return Case(meta, json.loads(spec.read_text()) if spec.is_file() else {}, arrays)
    for name, kept in compact["samples"].items():
        index = _sample_index(name, math.prod(kept["shape"]))
        arrays[name] = Sample(tuple(kept["shape"]), index, arrays[name], kept["norm"], kept["largest"])
    return Case(meta, compact["spec"], arrays)


def save_compact(case: Case, path: Path) -> None:
    """Writes the compact form of a full case."""
    arrays, samples = {}, {}
    for name, array in case.arrays.items():
        assert isinstance(array, np.ndarray)
        if array.size > SAMPLE and ("masks" in name or not f"{name}$".startswith(WHOLE)):
            flat = array.astype(np.float64).reshape(-1)
            samples[name] = {
                "shape": array.shape,
                "norm": float(np.linalg.norm(flat)),
                "largest": float(np.abs(flat).max()),
            }
            array = array.reshape(-1)[_sample_index(name, array.size)]
        arrays[name] = array
    meta = case.meta | {"compact": {"spec": case.spec, "samples": samples}}
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)


def assert_close(actual: Any, expected: np.ndarray | Sample, what: str, tolerance: float) -> None:
    """Every entry within ``tolerance`` of the largest one; of a sample the entries that there are, and the norm."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} for {expected.shape}"
    if isinstance(expected, Sample):
        norm = float(np.linalg.norm(actual))
        assert abs(norm - expected.norm) <= tolerance * expected.norm, f"{what}: norm {norm} for {expected.norm}"
        actual = actual.reshape(-1)[expected.index]
        largest, expected = expected.largest, expected.values
    else:
        largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest + 1e-12, err_msg=what)


def assert_near(actual: Any, expected: np.ndarray | Sample, what: str, tolerance: float) -> None:
    """The norm of the difference within ``tolerance`` of what is expected; of a sample that of its entries."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} for {expected.shape}"
    if isinstance(expected, Sample):
        actual, expected = actual.reshape(-1)[expected.index], expected.values
    difference = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    assert difference <= tolerance, f"{what}: differs by {difference}"
