"""Data sets of objects that tensorflow-datasets has prepared, and the embedded one, which it prepares here.

The file is long because features and records of tensorflow-datasets can each be other than a detector needs, and each
is met here.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants

from kdjax.data import shapes
from kdjax.data.check import check_images, check_objects, same_files, united
from kdjax.data.flaws import Checks, DataReport, Flaw
from kdjax.data.images import Header, ImageError, for_all, read_header
from kdjax.data.indexed import IndexedSource, check_values
from kdjax.data.object_source import IndexedObjects, check_counts, joined
from kdjax.data.outlines import Outlines, PolygonStore, usable_outlines
from kdjax.data.prepared_labels import kind_of, open_labelled
from kdjax.data.records import ARRAY_RECORD, builder_of, command, open_records, quiet
from kdjax.data.sizing import Reading
from kdjax.data.tables import Annotations, Images, settle_objects
from kdjax.errors import DataError, StorageError, UserError, reason
from kdjax.paths import as_path, in_bucket

_BAD_RUNS = Flaw(
    "objects whose run_lengths are not those of their image",
    "annotation",
    "refused",
    "they must be the counts of COCO's compressed run lengths and cover every pixel of the image",
)


class _Record(NamedTuple):
    """One example as the files have it."""

    header: Header | ImageError
    image_id: int | None
    name: str
    boxes: np.ndarray
    """(n, 4) float64: ymin, xmin, ymax, xmax, relative."""
    labels: Any
    crowd: Any
    area: Any
    identity: Any
    runs: Any
    """The counts of COCO's compressed run lengths, or None where the set has none."""


def open_shapes(config: str, split: str, data_dir: str | os.PathLike[str] | None, checks: Checks) -> IndexedObjects:
    """Opens a split of the embedded data set, which is generated on first use.

    TFDS writes into a temporary folder and renames it when it is complete: a killed preparation leaves nothing that
    could be taken for the data set, and of two concurrent ones the second to finish finds the folder there.
    """
    if data_dir:
        data_dir = as_path(data_dir)
    with quiet():
        builder = shapes.Shapes(config=config, data_dir=data_dir)
        if not builder.is_prepared():
            if data_dir and in_bucket(data_dir):
                raise UserError(
                    f"The data set shapes is not in {builder.data_dir}, where its files cannot be written: "
                    "generate it in a local config.data.data_dir, and copy that into the bucket."
                )
            print(f"Generating the data set shapes in {builder.data_dir}, once.", file=sys.stderr, flush=True)
            try:
                builder.download_and_prepare(
                    file_format=ARRAY_RECORD,
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                )
            except OSError as error:
                builder = shapes.Shapes(config=config, data_dir=data_dir)
                if not builder.is_prepared():
                    raise StorageError(
                        f"The data set shapes cannot be generated in {builder.data_dir} ({reason(error)}); "
                        "set config.data.data_dir to a folder that can be written."
                    ) from error
        source = _opened(f"shapes/{config}", builder, split, checks, "delete that folder, and it is made anew")
        return dataclasses.replace(source, generated=True)


def open_prepared(
    name: str, split: str, data_dir: str | os.PathLike[str] | None, checks: Checks, download: bool
) -> IndexedSource:
    """Opens a split of a data set that TFDS has prepared, after reading all of it once.

    What it is about is decided by its features: ``objects`` with boxes, an image with a label map
    (``segmentation_mask``), or an image with a ``label``.

    Args:
        name: such as ``imagenet2012``, ``coco/2017``, or ``voc/2007+2012`` for two configurations one after the other.
        split: a split of it or of each of them, with TFDS's slices and sums.
        data_dir: TFDS's data directory, or None for its default.
        checks: how flaws are met.
        download: let TFDS download and prepare what is missing.

    Raises:
        DataError: one sentence with the data set, the record, and what is wrong.
    """
    folder, slash, configs = name.rpartition("/")
    root = epath.Path(as_path(data_dir or constants.DATA_DIR))
    with quiet():
        parts: list[IndexedObjects] = []
        for config in configs.split("+"):
            part = f"{folder}{slash}{config}"
            builder = builder_of(part, root, download)
            again = f"prepare it again with `{command(part, root)} --overwrite`"
            if kind := kind_of(builder.info.features):
                if config != configs:
                    raise UserError(f"tfds:{name}: only sets of objects are taken one after the other; choose one.")
                records = open_records(f"tfds:{part}", builder, split, again)
                return open_labelled(records, kind, DataReport(f"tfds:{part} {split}", checks))
            first_id = int(parts[-1].images.identity.max()) + 1 if parts else 0
            parts.append(_opened(f"tfds:{part}", builder, split, checks, again, first_id))
        return parts[0] if len(parts) == 1 else joined(f"tfds:{name} {split}", parts)


def _opened(name: str, builder: Any, split: str, checks: Checks, again: str, first_id: int = 0) -> IndexedObjects:
    """One split of a prepared data set; ``again`` says how to make damaged files anew.

    Images without ids of their own are numbered from ``first_id``.
    """
    report = DataReport(f"{name} {split}", checks)
    _check_features(name, builder.info.features)
    records = open_records(name, builder, split, again)
    found = for_all(lambda row: _read(records[row], checks.reading), len(records), together=checks.together)
    identity = np.array([first_id + row if r.image_id is None else r.image_id for row, r in enumerate(found)], np.int64)
    if len(np.unique(identity)) != len(identity):
        raise DataError(f"{report.origin} has several images with the same image/id; ids must be unique.")
    names = [r.name or f"record {row}" for row, r in enumerate(found)]
    headers = [r.header for r in found]
    images, rows = check_images(identity, names, np.zeros((len(found), 2), np.int64), headers, report)
    class_names = tuple(builder.info.features["objects"].feature["label"].names)
    found = [found[row] for row in rows.tolist()]
    annotations = _annotations(found, images.size, len(class_names), report)
    first = same_files(images, annotations, lambda row: records[int(rows[row])]["image"], report)
    images, own, annotations, order = united(images, annotations, first)
    annotations, objects = check_objects(images, annotations, report)
    outlines = _outlines(found, order[objects], images, annotations, report)
    images, annotations, kept = check_counts(images, annotations, report)
    positions = rows[own[kept]]
    source = IndexedObjects(
        images=images,
        annotations=annotations,
        outlines=outlines,
        class_names=class_names,
        category_ids=tuple(range(len(class_names))),
        read=lambda row: records[int(positions[row])]["image"],
        report=report,
    )
    check_values(source)
    return source


def _check_features(name: str, features: Any) -> None:
    """Refuses a data set whose features cannot be read as TFDS's COCO and VOC have them."""
    number, flag = (lambda f: f.np_dtype in (np.int64, np.int32, np.float32)), (lambda f: f.np_dtype == np.bool_)
    features = dict(features.items())
    sequence = features.get("objects")
    inner = sequence.feature if isinstance(sequence, tfds.features.Sequence) else None
    inner = dict(inner.items()) if isinstance(inner, tfds.features.FeaturesDict) else {}
    needed: list[tuple[Any, str, Callable[[Any], bool], str]] = [
        (features, "image", lambda f: isinstance(f, tfds.features.Image), "an image"),
        (inner, "bbox", _is_relative, "a BBoxFeature of relative ymin, xmin, ymax, xmax"),
        (inner, "label", lambda f: isinstance(f, tfds.features.ClassLabel), "a ClassLabel"),
    ]
    optional: list[tuple[Any, str, Callable[[Any], bool], str]] = [
        (features, "image/id", lambda f: f.np_dtype in (np.int64, np.int32), "an integer"),
        (features, "image/filename", lambda f: isinstance(f, tfds.features.Text), "a text"),
        (inner, "is_crowd", flag, "a bool"),
        (inner, "is_difficult", flag, "a bool"),
        (inner, "area", number, "a number"),
        (inner, "id", lambda f: f.np_dtype in (np.int64, np.int32), "an integer"),
        (inner, "run_lengths", lambda f: isinstance(f, tfds.features.Text), "a text"),
    ]

    def called(group: Any, key: str) -> str:
        return key if group is features else f"objects/{key}"

    if missing := sorted(called(group, key) for group, key, _, _ in needed if key not in group):
        raise DataError(
            f"{name} has no {', '.join(missing)}: it needs the features of TFDS's COCO or VOC, "
            "or an image with a label (a ClassLabel) or with a segmentation_mask (an image)."
        )
    for group, key, holds, words in needed + optional:
        if key in group and not holds(group[key]):
            raise DataError(f"{name}: the feature {called(group, key)} is {group[key]!r}; it must be {words}.")


def _is_relative(feature: Any) -> bool:
    """Whether boxes are in TFDS's default format; sets from before there were others do not say it."""
    if not isinstance(feature, tfds.features.BBoxFeature):
        return False
    return feature.bbox_format is None or getattr(feature.bbox_format, "value", feature.bbox_format) == "REL_YXYX"


def _read(record: Any, reading: Reading) -> _Record:
    """What is needed of an example; of its image only the header."""
    try:
        header: Header | ImageError = read_header(io.BytesIO(record["image"]), reading)
    except ImageError as error:
        header = error
    objects, name = record["objects"], record.get("image/filename", "")
    return _Record(
        header=header,
        image_id=int(record["image/id"]) if "image/id" in record else None,
        name=name.decode(errors="replace") if isinstance(name, bytes) else str(name),
        boxes=np.array(objects["bbox"], np.float64).reshape(-1, 4),
        labels=objects["label"],
        crowd=objects.get("is_crowd", objects.get("is_difficult")),
        area=objects.get("area"),
        identity=objects.get("id"),
        runs=objects.get("run_lengths"),
    )


def _annotations(records: Sequence[_Record], sizes: np.ndarray, classes: int, report: DataReport) -> Annotations:
    """The objects of all records, with boxes in pixels."""
    count = np.array([len(record.labels) for record in records], np.int64)
    image = np.repeat(np.arange(len(records)), count)

    def column(values: Sequence[Any], dtype: Any, default: np.ndarray) -> np.ndarray:
        if any(value is None for value in values):
            return default
        return np.concatenate([default[:0], *(np.asarray(value, dtype) for value in values)])

    none = np.zeros(len(image))
    identity = column([r.identity for r in records], np.int64, np.arange(len(image)))
    relative = np.concatenate([np.zeros((0, 4)), *(record.boxes for record in records)])
    labels = column([r.labels for r in records], np.int64, none.astype(np.int64))
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    names = [record.name for record in records]
    flaw = Flaw(f"labels that are none of its {classes} classes", "annotation", "refused")
    report.settle(flaw, identity[wrong], lambda k: f"{labels[wrong[k]]} in {names[image[wrong[k]]]}")
    _check_relative(relative, identity, image, names, report)
    size = sizes[image].astype(np.float64)
    boxes = relative[:, [1, 0, 3, 2]] * np.tile(size[:, ::-1], 2)
    return Annotations(
        image=image,
        identity=identity,
        boxes=boxes,
        labels=labels.astype(np.int32),
        crowd=column([r.crowd for r in records], bool, none.astype(bool)),
        area=column([r.area for r in records], np.float64, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)),
    )


def _outlines(
    records: Sequence[_Record], rows: np.ndarray, images: Images, annotations: Annotations, report: DataReport
) -> Outlines | None:
    """The pixels of the objects that remain, ``rows`` of all that the records have; None where the set has none."""
    if any(record.runs is None for record in records):
        return None
    counts = [bytes(text).decode(errors="replace") for record in records for text in record.runs]
    sizes = images.size[annotations.image]
    runs = [{"size": size, "counts": counts[row]} for size, row in zip(sizes.tolist(), rows.tolist(), strict=True)]
    outlines, bad = usable_outlines(runs, PolygonStore(), annotations.boxes, sizes)
    settle_objects(_BAD_RUNS, bad, images, annotations, report)
    return outlines


def _check_relative(
    boxes: np.ndarray, identity: np.ndarray, image: np.ndarray, names: Sequence[str], report: DataReport
) -> None:
    """Refuses boxes that cannot be fractions of the image in the order ymin, xmin, ymax, xmax."""
    beyond = ~((boxes > -0.01) & (boxes < 1.01)).all(axis=1)
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    for chosen, share, what, hint in (
        (beyond, 0.5, "boxes beyond their image", "they must be fractions of the image's sides, not pixels"),
        (
            inverted,
            0.1,
            "boxes that end before they begin",
            "they must be ymin, xmin, ymax, xmax, not a corner and a size",
        ),
    ):
        rows = np.flatnonzero(chosen)
        if len(rows) > share * len(boxes):
            flaw = Flaw(f"{len(rows)} of {len(boxes)} {what}", "annotation", "refused", hint)
            found = [f"{boxes[row].tolist()} in {names[image[row]]}" for row in rows[:5].tolist()]
            report.settle(flaw, identity[rows], found.__getitem__)
