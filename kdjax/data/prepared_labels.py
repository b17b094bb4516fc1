"""Data sets that tensorflow-datasets has prepared whose images have a class, or a label map."""

import functools
import io
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from kdjax.data.check import check_images
from kdjax.data.classified import IndexedClasses, classified_source
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.images import Header, ImageError, decode_indices, for_all, read_header
from kdjax.data.mapped import IndexedMaps, mapped_source
from kdjax.data.records import Records, open_records
from kdjax.data.sizing import Reading
from kdjax.data.vocabularies import Vocabulary, cityscapes, vocabulary
from kdjax.types import IGNORED

_IMAGES = ("image", "image_left")
_NAMES = ("file_name", "image/filename", "filename", "image_id")
"""Features that may say what an image is called."""
_MAPS = ("segmentation_mask", "segmentation_label", "annotation", "label_map")
"""And features that hold label maps, in the sets that there are; besides every one that says so."""


class Kind(NamedTuple):
    """What a set is about."""

    image: str
    """The feature of the image."""
    label: str
    """That of its class, or of its label map."""
    mapped: bool


def kind_of(features: Any) -> Kind | None:
    """What a set with such features is about: label maps, classes, or neither.

    A set that has objects is about these, and one with label maps and classes about label maps.
    """
    features = dict(features.items())
    image = next((key for key in _IMAGES if isinstance(features.get(key), tfds.features.Image)), None)
    inner = getattr(features.get("objects"), "feature", None)
    if image is None or (isinstance(inner, tfds.features.FeaturesDict) and "label" in dict(inner.items())):
        return None
    maps = [key for key, f in features.items() if isinstance(f, tfds.features.LabeledImage)]
    maps += [key for key in _MAPS if isinstance(features.get(key), tfds.features.Image)]
    if maps:
        return Kind(image, maps[0], mapped=True)
    return Kind(image, "label", mapped=False) if isinstance(features.get("label"), tfds.features.ClassLabel) else None


def open_labelled(records: Records, kind: Kind, report: DataReport) -> IndexedClasses | IndexedMaps:
    """The images of records with their classes or their label maps, after reading all of them once.

    Args:
        records: of a split.
        kind: what the set is about.
        report: counts or refuses.

    Raises:
        DataError: one sentence with the record, and what is wrong.
    """
    features = records.features
    called = next((key for key in _NAMES if isinstance(features.get(key), tfds.features.Text)), "")

    def seen(row: int) -> tuple[Header | ImageError, str, int]:
        record = records[row]
        name = record[called] if called else f"record {row}"
        label = 0 if kind.mapped else int(record[kind.label])
        return (
            _header(record[kind.image], report.checks.reading),
            name.decode(errors="replace") if isinstance(name, bytes) else str(name),
            label,
        )

    found = for_all(seen, len(records), together=report.checks.together)
    headers, names, labels = zip(*found, strict=True)
    sizes = np.zeros((len(records), 2), np.int64)
    images, rows = check_images(np.arange(len(records)), names, sizes, headers, report)

    def read(row: int) -> bytes:
        return records[int(rows[row])][kind.image]

    if kind.mapped:
        words = _vocabulary(records, kind, report)
        return mapped_source(
            images,
            [f"the {kind.label} of {name}" for name in images.names],
            words,
            read=read,
            read_map=lambda row: records[int(rows[row])][kind.label],
            report=report,
        )
    class_names = features[kind.label].names
    label = np.array(labels)[rows]
    wrong = np.flatnonzero((label < 0) | (label >= len(class_names)))
    flaw = Flaw(f"labels that are none of its {len(class_names)} classes", "image", "refused")
    report.settle(flaw, images.identity[wrong], lambda k: f"{label[wrong[k]]} of {images.describe(int(wrong[k]))}")
    return classified_source(images, label, class_names, read, report)


def _header(data: bytes, reading: Reading) -> Header | ImageError:
    try:
        return read_header(io.BytesIO(data), reading)
    except ImageError as error:
        return error


def _vocabulary(records: Records, kind: Kind, report: DataReport) -> Vocabulary:
    """What the values of label maps mean.

    Where the builder names no classes they have numbers, up to the highest value in any split: there is no other way to
    know how many there are.
    """
    if kind.image == "image_left":
        return cityscapes()
    if names := getattr(records.features[kind.label], "names", None):
        return vocabulary(names)

    def highest(every: Records, row: int) -> int:
        try:
            values, _ = decode_indices(every[row][kind.label], report.checks.reading)
        except ImageError:
            return 0  # It is said where maps are held against their images.
        return int(values[values != IGNORED].max(initial=0))

    most = 0
    for split in records.builder.info.splits:
        every = open_records(records.name, records.builder, split, records.again)
        found = for_all(functools.partial(highest, every), len(every), together=report.checks.together)
        most = max([most, *found])
    return vocabulary([str(value) for value in range(most + 1)])
