"""Data sets by one name, opened and checked."""

import os
import re
from collections.abc import Callable

from kdjax.data.class_folders import open_class_folders
from kdjax.data.coco import open_coco
from kdjax.data.derived import as_crops, as_maps
from kdjax.data.flaws import DEFAULT, Checks
from kdjax.data.indexed import IndexedSource
from kdjax.data.map_folders import open_cityscapes, open_index_maps, open_voc_maps
from kdjax.data.object_source import IndexedObjects
from kdjax.data.prepared import open_prepared, open_shapes
from kdjax.data.voc import open_voc
from kdjax.data.yolo import open_yolo
from kdjax.errors import UserError
from kdjax.options import imported
from kdjax.paths import Path, as_path, in_bucket

DataDir = str | os.PathLike[str] | None

Opener = Callable[[str, str, DataDir, Checks, bool], IndexedSource]
"""From what follows the colon in the name of a data set, the split, the data directory, the checks, and whether TFDS
may download, to the split."""


def _shapes(config: str, derived: Callable[[IndexedObjects], IndexedSource] = lambda source: source) -> Opener:
    return lambda _, split, data_dir, checks, download: derived(open_shapes(config, split, data_dir, checks))


def _folder(open_folder: Callable[[Path, str, Checks], IndexedSource]) -> Opener:
    return lambda folder, split, data_dir, checks, download: open_folder(_inside(data_dir, folder), split, checks)


def _inside(data_dir: DataDir, folder: str) -> Path:
    """A folder of data: a relative one is in the data directory."""
    path = as_path(folder)
    return path if in_bucket(path) or path.is_absolute() else as_path(data_dir or ".") / path


SOURCES: dict[str, Opener] = {
    "shapes": _shapes("full"),
    "shapes/tiny": _shapes("tiny"),
    "shapes/maps": _shapes("full", as_maps),
    "shapes/maps/tiny": _shapes("tiny", as_maps),
    "shapes/crops": _shapes("full", as_crops),
    "shapes/crops/tiny": _shapes("tiny", as_crops),
    "tfds:": open_prepared,
    "coco_json:": _folder(open_coco),
    "yolo:": _folder(open_yolo),
    "voc:": _folder(open_voc),
    "class_folders:": _folder(open_class_folders),
    "index_maps:": _folder(open_index_maps),
    "voc_maps:": _folder(open_voc_maps),
    "cityscapes:": _folder(open_cityscapes),
}
"""Every data set by its name, or every kind of data set by what stands before its name."""


def open_source(
    name: str,
    split: str,
    data_dir: DataDir = None,
    *,
    checks: Checks = DEFAULT,
    download: bool = False,
) -> IndexedSource:
    """Opens one split of a data set: every annotation is read and checked, and the header of every image.

    Args:
        name: ``shapes`` or ``shapes/tiny`` (generated on first use); ``tfds:<name>`` for a set that TFDS has prepared
            with the features of its COCO or VOC, such as ``tfds:coco/2017`` or ``tfds:voc/2007+2012``; or
            ``coco_json:<folder>``, ``yolo:<folder>`` or ``voc:<folder>`` for images with annotations in COCO's format
            (:func:`kdjax.data.coco.open_coco`), in YOLO's (:func:`kdjax.data.yolo.open_yolo`) or in Pascal VOC's
            (:func:`kdjax.data.voc.open_voc`); or ``package.module:function`` for an :data:`Opener` of somebody else's,
            which gets "" for the name.
        split: ``train`` or ``validation`` (or what the set calls its splits), or a slice such as ``train[:100]``.
        data_dir: TFDS's data directory, None for its default (``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``); or
            where a relative ``<folder>`` is, None for the working directory.
        checks: how flaws of the data are met.
        download: let TFDS download and prepare a set that is missing; nothing is downloaded otherwise.

    Raises:
        UserError: one sentence about what is unknown or missing.
        DataError: one about what is wrong with the data, with file and id.
    """
    kind, colon, rest = name.partition(":")
    checks = checks.of(_inside(data_dir, rest))
    opener = SOURCES.get(kind + colon)
    if opener and bool(colon) == bool(rest):
        return opener(rest, split, data_dir, checks, download)
    if "." in kind and re.fullmatch(r"\w+(\.\w+)+:\w+", name):
        return imported(name, "data source")("", split, data_dir, checks, download)
    raise UserError(
        f"unknown data source {name!r}: choose shapes, shapes/tiny, tfds:<name>, or coco_json:<folder of your data>, "
        "yolo:<folder> or voc:<folder> with boxes; shapes/crops or class_folders:<folder> with classes; shapes/maps, "
        f"index_maps:<folder>, voc_maps:<folder> or cityscapes:<folder> with label maps{_as_folder(name)}"
    )


_SIGNS = {
    "cityscapes": ("leftImg8bit",),
    "voc_maps": ("SegmentationClass",),
    "index_maps": ("labels/*/*.png",),
    "voc": ("*.xml", "*/*.xml"),
    "coco_json": ("*.json", "annotations/*.json", "*/*.json"),
    "yolo": ("*.y*ml", "labels", "*/labels", "classes.txt"),
    "class_folders": ("*/*/*.jpg", "*/*/*.jpeg", "*/*/*.png"),
}
"""Of kinds of folders, what only they have, the plainest first."""


def _as_folder(name: str) -> str:
    """What a name that is a folder was probably meant to be, for a sentence."""
    if ":" in name or not (folder := as_path(name)).is_dir():
        return ""
    kind = next((kind for kind, patterns in _SIGNS.items() if any(any(folder.glob(x)) for x in patterns)), "coco_json")
    return f"; for the folder {name}, {kind}:{name}"
