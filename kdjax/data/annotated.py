"""From what annotation files say, in COCO's terms, to a source: everything that is alike whatever their format."""

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import check_images, check_objects, same_files, united
from kdjax.data.coco_json import annotations_of, categories_of, images_of
from kdjax.data.flaws import DataReport
from kdjax.data.folders import headers_of
from kdjax.data.indexed import check_values
from kdjax.data.object_source import IndexedObjects, check_counts
from kdjax.data.outlines import PolygonStore, outline_boxes, usable_outlines
from kdjax.data.tables import Annotations, settle_objects
from kdjax.errors import UserError
from kdjax.paths import Path

_HELD_OUT = 0.2
"""Share of the images."""

Part = Callable[[Sequence[str]], np.ndarray]
"""From the names of the images, in their order, to the positions of those that are taken, ascending."""


def annotated_source(
    content: dict[str, Any],
    root_of: Callable[[Sequence[str]], Path],
    *,
    folder: Path,
    part: Part,
    report: DataReport,
    store: PolygonStore,
    fractions: bool = False,
) -> IndexedObjects:
    """The images and objects of annotation files, held against each other and against the files of the images.

    Args:
        content: ``images``, ``annotations`` and ``categories`` as COCO's json has them, polygons in ``store``; an image
            may be ``unlabelled``.
        root_of: the folder that file names are relative to, from some of the names.
        folder: of all the data; links may lead to all of it.
        part: which images are taken, of all by their ids.
        report: names the data in sentences, knows how flaws are met, and counts them.
        store: holds the points of polygons.
        fractions: boxes and polygons are in fractions of their image's width and height, not in pixels.

    Raises:
        DataError: one sentence with the data, the id, and what is wrong.
    """
    class_names, category_ids, categories = categories_of(content, report)
    identity, names, annotated = images_of(content, report)
    annotations, segmentations = annotations_of(content, identity, names, categories, report)
    unlabelled = [entry["id"] for entry in content["images"] if entry.get("unlabelled")]
    del content

    rows = part(names)
    identity, names, annotated = identity[rows], [names[row] for row in rows.tolist()], annotated[rows]
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    root = root_of(names)
    names, found = headers_of(folder, root, identity, names, report)
    images, rows = check_images(identity, names, annotated, found, report)
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    bare = np.flatnonzero(np.isin(images.identity, unlabelled))
    files = [images.names[row] for row in bare.tolist()]
    report.settle(flaws.UNLABELLED, images.identity[bare], lambda k: images.describe(int(bare[k])), files)
    first = same_files(images, annotations, lambda row: (root / images.names[row]).read_bytes(), report)
    images, _, annotations, rows = united(images, annotations, first)
    segmentations = [segmentations[row] for row in rows.tolist()]
    if fractions:
        scale = images.size[annotations.image][:, ::-1].astype(float)
        store.scale(segmentations, scale)
        annotations = annotations._replace(
            boxes=annotations.boxes * np.tile(scale, 2), area=annotations.area * scale.prod(axis=1)
        )

    boxes = outline_boxes(segmentations, store, images.size[annotations.image])
    kept, rows = check_objects(images, annotations, report, boxes)
    segmentations = [segmentations[row] for row in rows.tolist()]
    outlines, boxed = usable_outlines(segmentations, store, kept.boxes, images.size[kept.image])
    if outlines:
        settle_objects(flaws.NO_OUTLINE, boxed, images, kept, report)
    images, annotations, _ = check_counts(images, kept, report)
    paths = images.names
    source = IndexedObjects(
        images=images,
        annotations=annotations,
        outlines=outlines,
        class_names=class_names,
        category_ids=category_ids,
        read=lambda row: (root / paths[row]).read_bytes(),
        report=report,
        path=lambda row: root / paths[row],
    )
    check_values(source)
    return source


def sliced(split: str) -> tuple[str, Part]:
    """The name of a split, and the part of its images that its end asks for.

    ``train[:100]`` and ``train[50%:]`` are images in the order of their ids; ``train[held_out]`` is a fifth of them,
    drawn by their names, and ``train[kept]`` those that remain.

    >>> name, part = sliced("train[1:]")
    >>> name, part(["a.jpg", "b.jpg", "c.jpg"])
    ('train', array([1, 2]))

    Raises:
        UserError: it is no split.
    """
    match = re.fullmatch(r"(?P<name>.+?)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\]|\[(?P<word>held_out|kept)\])?", split)
    # What has a colon between brackets at its end is meant as a slice.
    if not match or re.search(r"\[[^\[\]]*:[^\[\]]*\]$", match["name"]):
        raise UserError(
            f"{split!r} is no split; it must be a name, or a name and a slice such as train[:100], train[held_out] or "
            "train[kept]."
        )

    def bound(text: str | None, length: int) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)

    low, high, word = match["low"], match["high"], match["word"]
    if word:
        return match["name"], lambda names: np.flatnonzero(_held_out(names) == (word == "held_out"))
    return match["name"], lambda names: np.arange(len(names))[slice(bound(low, len(names)), bound(high, len(names)))]


def _held_out(names: Sequence[str]) -> np.ndarray:
    """Which images are held out of training, (n,) bool: about a fifth, at least one, drawn by the digests of names.

    Roboflow writes a photograph several times, as ``<name>.rf.<digest>.jpg``, each changed at random: all are in one
    part, or the same photograph would be in both.
    """
    photographs = [PurePosixPath(name).name.partition(".rf.")[0] for name in names]
    order = sorted(set(photographs), key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
    chosen = set(order[: max(1, round(_HELD_OUT * len(order)))])
    return np.array([photograph in chosen for photograph in photographs], bool)


def _of_images(annotations: Annotations, segmentations: list[Any], rows: np.ndarray) -> tuple[Annotations, list[Any]]:
    """The objects of some images, which become the images 0, 1, ...; ``rows`` ascends."""
    chosen = np.isin(annotations.image, rows)
    kept = annotations.take(chosen)
    return kept._replace(image=np.searchsorted(rows, kept.image)), list(itertools.compress(segmentations, chosen))
