"""People's own data: images in folders, with annotations in COCO's json format.

All ids may be any integers; classes are labelled in the ascending order of their category ids, images come in the order
of their ids and objects in that of their annotation ids, whatever the order in the file.
"""

import os
import re
from collections.abc import Sequence

import numpy as np

from kdjax.data.annotated import annotated_source, sliced
from kdjax.data.coco_json import parsed
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.folders import no_split, other_splits, readable, spellings, split_words
from kdjax.data.object_source import IndexedObjects
from kdjax.data.outlines import PolygonStore
from kdjax.errors import UserError
from kdjax.paths import Path


def open_coco(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedObjects:
    """Opens one split of a folder with annotations in COCO's format, after checking all of it.

    Args:
        folder: holds annotation files and images.
        split: ``train``, ``validation`` or ``test``, found by the usual names (``annotations/instances_train2017.json``
            and ``train2017/``; ``annotations_val.json`` and ``val/``; ``valid/_annotations.coco.json``; ...), where a
            folder's only annotation file is ``train`` whatever it is called; or ``<json>:<images>``, an annotation file
            and a folder of images, relative to ``folder``. With a part at the end, see
            :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, the id, and what is wrong.
    """
    folder = readable(folder, "coco_json")
    name, part = sliced(split)
    file, stem = annotation_file(folder, name)
    store = PolygonStore()
    content = parsed(file, store, checks)
    return annotated_source(
        content,
        lambda names: image_folder(folder, file, name, stem, names),
        folder=folder,
        part=part,
        report=DataReport(f"{file}{split.removeprefix(name)}", checks),
        store=store,
    )


def annotation_file(folder: Path, split: str) -> tuple[Path, str]:
    """The annotation file of a split, and the word in its name or its folder's that says so."""
    if ":" in split or split.endswith(".json"):
        path = folder / split.partition(":")[0]
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read.")
        return path, ""
    found = _annotation_files(folder, split_words(split))
    lone = [*folder.glob("*.json"), *(folder / "annotations").glob("*.json")]
    if not found and split == "train" and len(lone) == 1 and not _annotation_files(folder, other_splits(split)):
        found = {lone[0]: re.sub("^(instances_|annotations_)", "", lone[0].stem)}
    explicit = "name the file and the folder of its images, such as annotations/my.json:images"
    if not found:
        others = sorted(str(path.relative_to(folder)) for path in folder.glob("*.json")) + sorted(
            str(path.relative_to(folder)) for path in folder.glob("*/*.json")
        )
        there = f"; it has {', '.join(others[:5])}{', ...' * (len(others) > 5)}" if others else "; it has no json"
        raise no_split(folder, split, f"no annotation file for the split {split!r}{there}", explicit)
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(folder)) for path in found)
        raise UserError(f"{folder} has several annotation files for the split {split!r} ({several}): {explicit}.")
    return next(iter(found.items()))


def _annotation_files(folder: Path, words: Sequence[str]) -> dict[Path, str]:
    """The annotation files that are called by one of the words, or whose folders are, and the word that it is."""
    word = "|".join(map(re.escape, words))
    by_file = re.compile(rf"(?:instances_|annotations_)?((?:{word})(?:\d{{4}})?)(?:[_.](?:annotations|coco))*\.json")
    by_folder = re.compile(rf"((?:{word})(?:\d{{4}})?)")
    found: dict[Path, str] = {}
    for place in (folder, folder / "annotations"):
        for path in sorted(place.glob("*.json")):
            if match := by_file.fullmatch(path.name):
                found[path] = match[1]
    for place in sorted(folder.iterdir()):
        if match := by_folder.fullmatch(place.name):
            for name in ("_annotations.coco.json", "annotations.json", "instances.json", "labels.json"):
                if (place / name).is_file():
                    found[place / name] = match[1]
    return found


def image_folder(folder: Path, file: Path, split: str, stem: str, names: Sequence[str]) -> Path:
    """The folder that holds the images: of the usual ones, where the most of some of their names are."""
    if ":" in split:
        path = folder / split.partition(":")[2]
        if not path.is_dir():
            raise UserError(f"{path} is no folder that can be read.")
        return path
    words = dict.fromkeys(filter(None, (stem, *split_words(split))))
    usual = [
        *(place for word in words for place in (folder / word, folder / "images" / word)),
        *(folder / stem / inner for inner in ("images", "data")),
        file.parent,
        folder / "images",
        folder / "data",
        folder,
    ]
    places = [place for place in dict.fromkeys(usual) if place.is_dir()]
    probes = [names[row] for row in np.linspace(0, len(names) - 1, min(len(names), 16), dtype=int)] if names else []
    # Of equals, the first.
    return max(places, key=lambda place: sum(any((place / x).exists() for x in spellings(name)) for name in probes))
