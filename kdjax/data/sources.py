"""Annotated images by one name: a random-access sequence of examples and the names of their classes."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging
from PIL import Image

# tensorflow_datasets is imported where it is used: it is slow to import and talkative.


Segmentation = list[list[float]] | dict[str, Any]
"""The outline of one object as COCO files have it, in pixels of the image: polygons, each ``[x1, y1, x2, y2, ...]``, or
a run-length encoding ``{"size": [height, width], "counts": [...] or "..."}``."""


class Example(NamedTuple):
    """One annotated image with n objects."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    image_id: int
    """What evaluators know the image by; unique in its split."""
    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of ``image``."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(n,) bool: the box holds a group of objects; evaluation ignores what is found there."""
    area: np.ndarray
    """(n,) float32: pixels of the object itself (COCO's size classes are made of it), not of its box."""
    segmentation: tuple[Segmentation, ...] | None = None
    """One for each object; None where the data set has none."""


class Objects(NamedTuple):
    """The n objects of one image, which is not decoded for them: an :class:`Example` without its pixels."""

    image_id: int
    """As :class:`Example` has it."""
    size: tuple[int, int]
    """Height and width of the image in its file, in pixels."""
    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of the image in its file."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(n,) bool."""
    area: np.ndarray
    """(n,) float32, pixels."""
    segmentation: tuple[Segmentation, ...] | None = None
    """One for each object; None where the data set has none."""

    def in_image(self, image: np.ndarray) -> Example:
        """The example that has these objects in the given pixels."""
        fields = self._asdict()
        del fields["size"]
        return Example(image, **fields)


class Source(Protocol):
    """A sequence of examples with random access, safe to read from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def objects(self, index: int) -> Objects:
        """The objects of an example, without decoding its image."""


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared tensorflow-datasets data set with the features of COCO, as a :class:`Source`."""

    records: Any
    """TFDS data source of examples whose images are still encoded."""
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        with Image.open(io.BytesIO(record["image"])) as file:
            image = np.asarray(file.convert("RGB"))
        return self._objects(record, image.shape[:2]).in_image(image)

    def objects(self, index: int) -> Objects:
        """The objects of an example; of its image only the header is read, for the size."""
        record = self.records[index]
        with Image.open(io.BytesIO(record["image"])) as file:
            width, height = file.size
        return self._objects(record, (height, width))

    def _objects(self, record: Any, size: tuple[int, int]) -> Objects:
        objects, (height, width) = record["objects"], size
        relative = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
        return Objects(
            image_id=int(record["image/id"]),
            size=size,
            boxes=relative * np.array([width, height, width, height], np.float32),
            labels=np.asarray(objects["label"], np.int32),
            crowd=np.asarray(objects["is_crowd"], np.bool_),
            area=np.asarray(objects["area"], np.float32),
        )


def open_source(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Opens one split of a data set.

    Args:
        name: ``shapes`` or ``shapes/tiny`` (generated on first use), or ``tfds:<name>`` for a set that TFDS has
            prepared with the features of COCO, such as ``tfds:coco/2017``. Nothing is ever downloaded.
        split: ``train`` or ``validation`` (or what the set calls its splits), or a slice such as ``train[:100]``.
        data_dir: TFDS's data directory; None is TFDS's default (``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``).

    Raises:
        ValueError: unknown name or split, a set that is not prepared, or one without the features of COCO.
    """
    kind, _, rest = name.partition(":")
    with _quiet():
        if name in ("shapes", "shapes/tiny"):
            builder = _shapes(name.partition("/")[2] or "full", data_dir)
        elif kind == "tfds" and rest:
            builder = _prepared(rest, data_dir)
        else:
            raise ValueError(f"unknown data source {name!r}: choose shapes, shapes/tiny or tfds:<name>")
        return _read(name, builder, split)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars and routine messages off the terminal."""
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _shapes(config: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The builder of the embedded data set, prepared.

    TFDS writes into a temporary folder and renames it when it is complete: a killed preparation leaves nothing that
    could be taken for the data set, and of two concurrent ones the second to finish finds the folder there.
    """
    import tensorflow_datasets as tfds

    from kdjax.data import shapes

    builder = shapes.Shapes(config=config, data_dir=data_dir)
    if not builder.is_prepared():
        print(f"Generating the data set shapes in {builder.data_dir}, once.", file=sys.stderr, flush=True)
        try:
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except OSError:
            builder = shapes.Shapes(config=config, data_dir=data_dir)
            if not builder.is_prepared():
                raise
    return builder


def _prepared(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """A builder that reads the newest version of ``<data_dir>/<name>`` from its files alone."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import constants

    root = epath.Path(data_dir or constants.DATA_DIR).expanduser()
    versions = [
        folder
        for folder in ((root / name).iterdir() if (root / name).is_dir() else [])
        if tfds.core.Version.is_valid(folder.name) and (folder / "features.json").exists()
    ]
    if not versions:
        raise ValueError(
            f"tfds:{name} is not prepared in {root}: prepare it with "
            f"`tfds build {name} --data_dir={root} --file_format=array_record`"
        )
    return tfds.builder_from_directory(max(versions, key=lambda folder: tfds.core.Version(folder.name)))


def _read(name: str, builder: Any, split: str) -> TfdsSource:
    """One split of a prepared data set, after a look at its features and its file format."""
    import tensorflow_datasets as tfds

    features, splits = builder.info.features, builder.info.splits
    wanted = {"image", "image/id", "objects"}, {"area", "bbox", "is_crowd", "label"}
    missing = wanted[0] - set(features)
    if not missing:
        missing = {f"objects/{key}" for key in wanted[1] - set(features["objects"].feature)}
    if missing:
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}: it needs the features of TFDS's COCO")
    if split.partition("[")[0] not in splits:
        raise ValueError(f"{name} has no split {split!r}: choose {', '.join(sorted(splits))}")
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise ValueError(
            f"{name} in {builder.data_dir} is in the {builder.info.file_format.value} format: "
            "prepare it with --file_format=array_record"
        ) from None
    return TfdsSource(records, tuple(features["objects"].feature["label"].names))
