"""People's own data: images in folders, with annotations in COCO's json format.

All ids may be any integers; classes are labelled in the ascending order of their category ids, images come in the order
of their ids and objects in that of their annotation ids, whatever the order in the file.
"""

import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import check_images, check_objects, same_files, united
from kdjax.data.coco_files import annotation_file, headers_of, image_folder
from kdjax.data.coco_json import annotations_of, categories_of, images_of, parsed
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.indexed import IndexedSource, check_counts, check_values
from kdjax.data.outlines import PolygonStore, outline_boxes, usable_outlines
from kdjax.data.tables import Annotations, settle_objects
from kdjax.errors import UserError
from kdjax.paths import local_path


def open_coco(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedSource:
    """Opens one split of a folder with annotations in COCO's format, after checking all of it.

    Args:
        folder: holds annotation files and images.
        split: ``train``, ``validation`` or ``test``, found by the usual names (``annotations/instances_train2017.json``
            and ``train2017/``; ``annotations_val.json`` and ``val/``; ``valid/_annotations.coco.json``; ...); or
            ``<json>:<images>``, an annotation file and a folder of images, relative to ``folder``. With a slice at the
            end, such as ``train[:100]`` or ``train[50%:]``, some of its images in the order of their ids.
        checks: how flaws are met.

    Raises:
        UserError: one sentence with the file, the id, and what is wrong.
    """
    folder = local_path(folder)
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"coco_json:{folder} is no folder that can be read.")
    name, part = _sliced(split)
    file, stem = annotation_file(folder, name)
    report = DataReport(str(file), checks)
    store = PolygonStore()
    content = parsed(file, store, checks)
    class_names, category_ids, categories = categories_of(content, report)
    identity, names, annotated = images_of(content, report)
    annotations, segmentations = annotations_of(content, identity, names, categories, report)
    del content

    rows = np.arange(len(identity))[part(len(identity))]
    identity, names, annotated = identity[rows], [names[row] for row in rows.tolist()], annotated[rows]
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    root = image_folder(folder, file, name, stem, names)
    names, found = headers_of(folder, root, identity, names, report)
    images, rows = check_images(identity, names, annotated, found, report)
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    first = same_files(images, annotations, lambda row: (root / images.names[row]).read_bytes(), report)
    images, _, annotations, rows = united(images, annotations, first)
    segmentations = [segmentations[row] for row in rows.tolist()]

    boxes = outline_boxes(segmentations, store, images.size[annotations.image])
    kept, rows = check_objects(images, annotations, report, boxes)
    segmentations = [segmentations[row] for row in rows.tolist()]
    outlines, boxed = usable_outlines(segmentations, store, kept.boxes, images.size[kept.image])
    if outlines:
        settle_objects(flaws.NO_OUTLINE, boxed, images, kept, report)
    images, annotations, _ = check_counts(images, kept, report)
    paths = images.names
    source = IndexedSource(
        images=images,
        annotations=annotations,
        outlines=outlines,
        class_names=class_names,
        category_ids=category_ids,
        read=lambda row: (root / paths[row]).read_bytes(),
        report=report,
    )
    check_values(source)
    return source


def _sliced(split: str) -> tuple[str, Callable[[int], slice]]:
    """The name of a split, and the slice of its images by their number."""
    match = re.fullmatch(r"(?P<name>.+?)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?", split)
    # What has a colon between brackets at its end is meant as a slice.
    if not match or re.search(r"\[[^\[\]]*:[^\[\]]*\]$", match["name"]):
        raise UserError(f"{split!r} is no split; it must be a name, or a name and a slice such as train[:100].")

    def bound(text: str | None, length: int) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)

    low, high = match["low"], match["high"]
    return match["name"], lambda length: slice(bound(low, length), bound(high, length))


def _of_images(annotations: Annotations, segmentations: list[Any], rows: np.ndarray) -> tuple[Annotations, list[Any]]:
    """The objects of some images, which become the images 0, 1, ...; ``rows`` ascends."""
    chosen = np.isin(annotations.image, rows)
    kept = annotations.take(chosen)
    return kept._replace(image=np.searchsorted(rows, kept.image)), list(itertools.compress(segmentations, chosen))
