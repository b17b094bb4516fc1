"""Writes the compact form of the models' cases beside this file: ``python -m tests.goldens.compact GOLDENS``.

Of every array it keeps a fixed sample of the entries and the norm, of images, targets and boxes everything; the names
and shapes of the weights go into the same file. Cases of models that kdjax does not have are left out.
"""

import sys
from pathlib import Path

from kdjax.models import MODELS
from tests.goldens.cases import HERE, Case, load_case, save_compact
from tests.goldens.test_detectors import original
from tests.goldens.test_segmentation import LOSS, NETWORK


def has_detector(path: Path, case: Case) -> bool:
    model = original(case).model
    return model is not None and model["name"] in MODELS


def is_of_segmenters(path: Path, case: Case) -> bool:
    return bool(NETWORK.fullmatch(path.stem) or LOSS.fullmatch(path.stem))


def is_of_classifiers(path: Path, case: Case) -> bool:
    return True


KINDS = {"detectors": has_detector, "segmentation": is_of_segmenters, "classification": is_of_classifiers}
"""Folder to which of its cases are kept."""


def main(goldens: Path) -> None:
    for kind, is_kept in KINDS.items():
        (HERE / kind).mkdir(exist_ok=True)
        for path in sorted((goldens / kind).glob("*.npz")):
            case = load_case(path)
            if is_kept(path, case):
                save_compact(case, HERE / kind / path.name)
                print(kind, path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
