"""Writes the compact form of whole networks' cases beside this file: ``python -m tests.goldens.compact GOLDENS``.

Of every array it keeps a fixed sample of the entries and the norm, of images, targets and boxes everything; the names
and shapes of the weights go into the same file. Cases of detectors that kdjax does not have are left out.
"""

import sys
from pathlib import Path

from kdjax.models import MODELS
from tests.goldens.cases import HERE, load_case, save_compact
from tests.goldens.test_detectors import original


def main(goldens: Path) -> None:
    for path in sorted((goldens / "classification").glob("*.npz")):
        save_compact(load_case(path), HERE / "classification" / path.name)
        print(path.name)
    for path in sorted((goldens / "detectors").glob("*.npz")):
        case = load_case(path)
        model = original(case.meta).model
        if model and model["name"] in MODELS:
            save_compact(case, HERE / "detectors" / path.name)
            print(path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
