"""People's own images in folders that are called as their classes are, one for each class, in one for each split."""

import os
from collections import defaultdict

import numpy as np

from kdjax.data import flaws
from kdjax.data.annotated import sliced
from kdjax.data.check import check_images
from kdjax.data.classified import IndexedClasses, classified_source
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.folders import SPLITS, headers_of, no_split, pictures, readable, split_words
from kdjax.errors import DataError
from kdjax.paths import Path

_NO_CLASS = ("__MACOSX",)
"""What tools leave behind; likewise whatever begins with a dot."""


def open_class_folders(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedClasses:
    """Opens one split of ``<folder>/<split>/<class>/<image>``, after checking the headers of all images.

    Classes come in the order of the alphabet, of all splits together. Images come by turns, the first of each class
    and then the second, so that the first hundred are of all classes.

    Args:
        folder: holds a folder for each split; or one for each class, which is then the split ``train``.
        split: ``train``, ``validation`` or ``test``, found by the usual names (``val``, ``valid``), or the name of the
            folder. With a part at the end, see :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, and what is wrong.
    """
    folder = readable(folder, "class_folders")
    name, part = sliced(split)
    place = _split_folder(folder, name)
    others = (
        [] if place == folder else [path for words in SPLITS.values() for x in words if (path := folder / x).is_dir()]
    )
    class_names = sorted({kind for path in {place, *others} for kind in _classes(path)})
    label_of = {kind: label for label, kind in enumerate(class_names)}
    report = DataReport(f"{folder} {split}", checks)

    images = [tuple(name.split("/", 1)) for name in pictures(place, place)]
    stray = [image[0] for image in images if len(image) == 1]
    if stray and len(stray) == len(images):
        raise DataError(
            f"{report.origin} has images, such as {stray[0]}, in no folder of a class: an image is "
            f"{place.name}/<class>/{stray[0]}."
        )
    report.settle(flaws.STRAY, range(len(stray)), stray.__getitem__, stray)
    of_class: dict[str, list[str]] = defaultdict(list)
    for kind, *rest in images:
        if rest and kind in label_of:
            of_class[kind].append(rest[0])
    turns = [(turn, kind, image) for kind, found in of_class.items() for turn, image in enumerate(found)]
    names = [f"{kind}/{image}" for _, kind, image in sorted(turns)]
    rows = part(names)
    identity, names = rows + 1, [names[row] for row in rows.tolist()]

    names, found = headers_of(folder, place, identity, names, report)
    kept, _ = check_images(identity, names, np.zeros((len(names), 2), np.int64), found, report)
    labels = np.array([label_of[name.partition("/")[0]] for name in kept.names], np.int64)
    return classified_source(
        kept,
        labels,
        class_names,
        lambda row: (place / kept.names[row]).read_bytes(),
        report,
        lambda row: place / kept.names[row],
    )


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, which may be all of it."""
    for word in split_words(split):
        if (folder / word).is_dir():
            return folder / word
    there = _classes(folder)
    splits = [word for words in SPLITS.values() for word in words if word in there]
    if split == "train" and not splits and any(name.count("/") == 1 for name in pictures(folder, folder)):
        return folder
    raise no_split(
        folder,
        split,
        f"no folder for the split {split!r}, such as {split}/<class>/<image>",
        f"name one of the folders that it has ({', '.join(there[:8]) or 'none'})",
    )


def _classes(place: Path) -> list[str]:
    """The folders in a folder, by their names."""
    names = (path.name for path in sorted(place.iterdir()) if path.is_dir())
    return [name for name in names if not name.startswith(".") and name not in _NO_CLASS]
