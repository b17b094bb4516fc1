"""The arrays that every floor of kdjax exchanges.

Boxes are everywhere ``(x1, y1, x2, y2)`` in pixels of the padded image, except inside ``kdjax.data`` readers and
``kdjax.evaluation``, which convert from and to what files and evaluators use. Images are NHWC, uint8, RGB until a
detector normalises them. The file is long because the contracts of models, methods, sources, tasks and judges are their
docstrings: next to nothing is computed here.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

Features = dict[str, jax.Array]
"""Feature maps by name: ``{"p3": (N, H, W, C), ...}``."""

Terms = dict[str, jax.Array]
"""Named, unweighted loss terms: name to float32 scalar."""

MethodTerms = dict[str, jax.Array | dict[str, jax.Array]]
"""A method's terms: as ``Terms``, or a term as its parts by level, ``{"mgd": {"p3": ..., "p4": ...}}``, whose sum it
is. A term has one weight; its parts are logged."""

OwnLoss = Callable[[Features], Terms]
"""The student's heads and loss as a judge of other features: it gives them a gradient, but none to the heads."""

PredictionLoss = Callable[[Any], Terms]
"""The student's loss as a judge of other predictions."""

TeacherHeads = Callable[[Any], Any]
"""From a student's predictions to what the teacher's heads say in the same places."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What a method sees of a model: its features, and what they mean.

    >>> View({"p3": jax.numpy.ones((1, 8, 8, 4))}, {"p3": 8}).stride("p3")
    8
    """

    features: Features
    strides: Mapping[str, int] | tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    """Pixels of the image from one position of a map to the next, by name; kept as pairs, which can be hashed."""
    predictions: Any = None
    """What the model's heads say; None of a teacher, whose heads run where a method asks for them alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(dict(self.strides).items()))

    def stride(self, level: str) -> int:
        """The stride of a map, in pixels."""
        return dict(self.strides)[level]


class Masks(NamedTuple):
    """The masks of M objects in each of N images, every one on an S x S grid of its own."""

    grid: jax.Array
    """(N, M, S, S) bool: which cells the object covers; False everywhere where not valid."""
    frame: jax.Array
    """(N, M, 4) float32: the region that the grid cuts into S x S equal cells, xyxy in pixels of the padded image.

    It begins at the object's first pixel. A cell is one pixel where the object fits into S pixels along that axis, and
    larger where it does not; nothing of the object is outside."""


class Targets(NamedTuple):
    """Ground truth of a batch of N images with room for M objects each."""

    boxes: jax.Array
    """(N, M, 4) float32, xyxy in pixels of the padded image; zeros where not valid."""
    labels: jax.Array
    """(N, M) int32 in [0, classes); zero where not valid."""
    valid: jax.Array
    """(N, M) bool: True for real objects, False for empty slots."""
    crowd: jax.Array | None = None
    """(N, M) bool: slots of ``boxes`` with a region to ignore, which holds a group of objects; they are not valid."""
    masks: Masks | None = None
    """Where detectors learn masks: those of the boxes."""


IGNORED = 255
"""The class of a pixel that counts neither in training nor in evaluation."""


class Labels(NamedTuple):
    """What N images show, or each of their pixels: the targets of classification and of semantic segmentation."""

    classes: jax.Array
    """(N,) int32 in [0, classes) of images; (N, H, W) uint8 of pixels, ``IGNORED`` in the padding too."""
    other: jax.Array | None = None
    """(N,) int32: of images that are mixed with another one (mixup), the class of that; None where none is."""
    share: jax.Array | None = None
    """(N,) float32 in [0, 1]: how much of the image is the other one."""


class Logits(NamedTuple):
    """The predictions of classifiers and segmenters, before any softmax."""

    main: jax.Array
    """(N, K) of images; (N, h, w, K) of the positions of a map, which is coarser than the image."""
    auxiliary: jax.Array | None = None
    """Likewise, of a second head on earlier features that is there for training alone."""


class Sampling(NamedTuple):
    """What heads draw by in a training step, such as the proposals that a two-stage detector learns from."""

    targets: Any
    keys: jax.Array
    """(N,) PRNG keys, one for each image."""


class PairedBoxes(NamedTuple):
    """Box regression of a student and of a teacher in the same places, map by map or RoI by RoI."""

    student: jax.Array
    """(N, ..., C)."""
    teacher: jax.Array
    """(N, ..., C)."""
    where: jax.Array
    """(N, ..., 1) bool: the places that count."""
    weight: float = 1.0
    """What the map counts among the others."""


class PairedSides(NamedTuple):
    """Where student and teacher say, as distributions, that the sides of boxes are, on one map."""

    student: jax.Array
    """(N, H, W, 4 * K), before the softmax over the K distances of each side, which vary fastest."""
    teacher: jax.Array
    """Likewise."""
    main: jax.Array
    """(N, H, W) float32 of at least 0: how much each place counts that learns an object, 0 of others; no gradient."""
    valuable: jax.Array
    """(N, H, W) float32 of at least 0: likewise of places that are near to objects; no gradient."""


PairedSidesOf = Callable[[Any], dict[str, PairedSides]]
"""From what the teacher's heads say to the sides of both, by level."""


class BoxPredictions(Protocol):
    """Predictions whose box regression can be compared with a teacher's."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """The box regression of both, by the name of the map that it is on, or "rois".

        Args:
            theirs: what the teacher's heads say in the same places.
            strides: of the student's maps, in pixels.
            image_size: (N, 2) height and width of the images without their padding.
            targets: what the images show.

        Raises:
            UserError: the two have no boxes that can be compared.
        """


class Module(Protocol):
    """What a linen module is asked for here."""

    def init(self, rngs: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Its variables."""

    def init_with_output(self, rngs: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What it computes, and its variables."""

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What it computes with its variables; of a model only :mod:`kdjax.operations` calls it."""

    def clone(self, *, parent: Any = None, **updates: Any) -> Any:
        """A copy with other fields."""


class Model(Module, Protocol):
    """A network for one task: a detector, a classifier, a segmenter.

    Its parameters are {"backbone": ..., ..., "head": ...}: parts that another one may inherit.
    """

    num_classes: int

    @property
    def task(self) -> str:
        """The name of the task that it is for."""

    @property
    def strides(self) -> dict[str, int]:
        """Of each map of its features, pixels of the image from one position to the next, fine to coarse."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of its loss terms."""

    def preprocess(self, images: jax.Array, image_size: jax.Array) -> jax.Array:
        """uint8 images (N, H, W, 3) of height and width ``image_size`` (N, 2) to float32 ones, zeros in the padding."""

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Preprocessed images to the features that a method sees."""

    def heads(self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None) -> Any:
        """Features to predictions; ``sampling`` is given in training."""

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> Any:
        """As a teacher: what the heads say in the places of a student's ``predictions``."""

    def loss(self, predictions: Any, targets: Any, image_size: jax.Array) -> Terms:
        """The terms; the mean over devices of what each returns is that of the whole batch."""

    def paired_sides(
        self, predictions: Any, theirs: Any, targets: Any, image_size: jax.Array
    ) -> dict[str, PairedSides]:
        """Where its predictions and a teacher's say that sides are, by level; UserError where they do not."""

    def predict(self, images: jax.Array, image_size: jax.Array) -> Any:
        """uint8 images to what the task is about: everything that inference is."""


class Method(Module, Protocol):
    """A distillation method, see :mod:`kdjax.methods`."""

    needs: ClassVar[tuple[str, ...]]
    """The keywords that it is called with."""
    requires: ClassVar[tuple[str, ...]]
    """What a stage must have."""

    @property
    def terms(self) -> dict[str, tuple[str, ...]]:
        """Of each term the parameters that it may move."""


class Detections(NamedTuple):
    """The D highest-scoring detections of each of N images."""

    boxes: jax.Array
    """(N, D, 4) float32, xyxy in pixels of the padded image, clipped to the image."""
    scores: jax.Array
    """(N, D) float32 in [0, 1], descending; zero where not valid."""
    labels: jax.Array
    """(N, D) int32 in [0, classes)."""
    valid: jax.Array
    """(N, D) bool: False for empty slots."""
    masks: jax.Array | None = None
    """(N, D, S, S) float32 in [0, 1], of detectors that find masks in boxes: the box cut into S x S equal cells."""
    whole_masks: jax.Array | None = None
    """(N, D, h, w) uint8, of detectors that find masks without boxes: 255 times the probability at each position of a
    map over the padded image, four pixels apart. Their boxes are those around the masks."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images of one global batch, or one device's or process's part of it, and what they show."""

    images: jax.Array
    """(N, H, W, 3) uint8, RGB, padded at the bottom and right with zeros."""
    size: jax.Array
    """(N, 2) int32: height and width of each image inside the padded array, in pixels."""
    index: jax.Array
    """(N,) int: in training the position of each image in the global batch, from which random numbers are folded; in
    evaluation its position in its source, -1 for the blank images that fill the last batch."""
    targets: Any = None
    """The task's truth, :class:`Targets` for one; None in evaluation."""


Metrics = Mapping[str, Any]
"""What a judge says: a number by name, or by name and class."""


FILES = "; files "
"""Between the two parts of a fingerprint."""


class Example(Protocol):
    """One annotated image."""

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""

    @property
    def image_id(self) -> int:
        """What its source knows it by; unique."""


class ImageSource(Protocol):
    """A sequence of images with random access, safe to read from several threads: what evaluation asks of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """An :class:`Example`, with the truth if there is any; of another image where this one cannot be decoded."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image at ``index``, without decoding it."""

    def image_id(self, index: int) -> int:
        """The id of the image at ``index``, without decoding it."""

    def name(self, index: int) -> str:
        """What a person knows the image at ``index`` by: its file's name."""


class Source(ImageSource, Protocol):
    """Images and their truth."""

    @property
    def origin(self) -> str:
        """What it is, in words: a file, a data set and its split."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """What the files call each label; () where they call it nothing."""

    @property
    def fingerprint(self) -> str:
        """Digest of what a run depends on: another one is other data.

        What stands behind ``FILES``, if anything, is about the bytes of the files, which version 0.1 did not look into.
        """

    def report_lines(self) -> list[str]:
        """What was found when it was opened, in a few lines for a person."""

    def report_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""


class Suggestion(NamedTuple):
    """What the training split of somebody's own data suggests."""

    data: dict[str, Any]
    """Keys of the config's section of data to their values."""
    sizes: Sequence[float]
    """Of objects, the square roots of their boxes' areas in pixels once images are scaled so; () where there are none.
    """


class Judge(Protocol):
    """Measures the outputs of one model on one source; of several processes each has one of its own."""

    def add(self, outputs: Any, batch: Batch) -> None:
        """Takes what ``Model.predict`` says of a batch, as NumPy arrays (N, ...), blank images included."""

    def state(self) -> dict[str, np.ndarray]:
        """All that was added, as arrays of any length and dtype."""

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> Metrics:
        """The metrics of the states of all processes together; every image counts once."""

    def kept(self, count: int) -> dict[int, Any]:
        """Of those of the source's first ``count`` images that were added, by position, what the task draws: JSON.

        ``count`` is at most ``MOST_PICTURES``.
        """

    def charts(self, states: Sequence[Mapping[str, np.ndarray]]) -> Sequence[Any]:
        """For the report of a run, :data:`kdjax.charts.Chart` of the states of all processes together.

        A judge without it has none.
        """


MOST_PICTURES = 64
"""Images of which is kept what a model said, for drawing."""


class Results(Protocol):
    """What a model of a task says of photographs, as a person wants it: made by :meth:`Task.results`."""

    def of(self, outputs: Any, row: int, size: tuple[int, int], original: tuple[int, int]) -> Any:
        """What is said of one photograph, in its own pixels: a NamedTuple.

        Args:
            outputs: what ``Model.predict`` says of a batch, as NumPy arrays (N, ...).
            row: of the photograph in the batch.
            size: its height and width in the padded array.
            original: its own height and width.
        """

    def drawn(self, image: np.ndarray, result: Any) -> Any:
        """A photograph (H, W, 3) uint8 and what was said of it: :class:`kdjax.visualize.Drawing`."""

    def save(self, folder: Any, images: ImageSource, results: Iterable[tuple[int, Any]]) -> None:
        """Writes results into a folder as they come, each with the position of its photograph.

        Args:
            folder: a path of :func:`kdjax.paths.as_path`.
            images: all photographs.
            results: those that could be read, in any order.
        """


class Column(NamedTuple):
    """What one model said of a source's first images, to be drawn."""

    kept: list[Any]
    """What :meth:`Judge.kept` gave, in the order of the positions."""
    metrics: Metrics
    """What the judge says of the model."""


class Judged(NamedTuple):
    """What a model said of one image, for a person."""

    score: float
    """How good it is, 0 to 100: by it a report finds the best and the worst images, and those that a student wins."""
    words: str
    drawing: Any
    """:class:`kdjax.visualize.Drawing`: the image, and what was said of it."""


class Task(Protocol):
    """What differs between detection, segmentation and classification outside of models.

    It is made of the config's section of data: ``Task.of(data)``.
    """

    name: ClassVar[str]
    """What models and methods say that they are for."""
    primary: ClassVar[str]
    """The metric by which students are compared, teachers admitted, and checkpoints kept."""
    higher_is_better: ClassVar[bool]
    """Of that metric."""
    columns: ClassVar[Mapping[str, str]]
    """Headings of the summary to metrics; one that nobody has is left out."""
    spoken: ClassVar[tuple[str, ...]]
    """Metrics that lines of progress name, the primary one first."""
    floors: ClassVar[Mapping[str, float]]
    """By the name of a data set: what every teacher reaches there of the primary metric."""

    def complete_model(self, model: dict[str, Any]) -> None:
        """Adds to a model's config, as ``build_model`` takes it, what the data's keys say of it and it leaves out."""

    def check_model(self, model: Any, where: str) -> None:
        """Raises UserError where the model cannot be trained on the data as the config has them.

        ``where`` begins the sentence: "config.student.model is 'mask_rcnn'".
        """

    def check_source(self, source: Any) -> None:
        """Raises UserError where a source cannot be trained on."""

    def targets(self, images: int, shape: tuple[int, int]) -> Any:
        """The truth of as many images that show nothing: a NamedTuple of NumPy arrays (N, ...), to be filled.

        ``shape`` is the height and width of the padded images.
        """

    def fill(self, targets: Any, row: int, example: Any, geometry: Any) -> None:
        """Fills a row with the truth of an example, moved by a :class:`kdjax.data.transforms.Geometry`."""

    def judge(self, source: Any) -> Judge:
        """A judge of models on a source."""

    def results(self, class_names: Sequence[str], category_ids: Sequence[int], threshold: float | None) -> Results:
        """How outputs become results; what :mod:`kdjax.predictor` alone asks for.

        Args:
            class_names: of the model.
            category_ids: what files call each of them.
            threshold: score from which on something counts; None for what the task takes.
        """

    def draw(self, path: str | os.PathLike[str], source: Any, columns: Mapping[str, Column]) -> None:
        """Saves a picture of the first images of a source with their truth and what each model said of them.

        ``columns`` has names of the models to what they said.
        """

    def remarks(self, source: Any, sizing: Any) -> list[str]:
        """What a person should know before training on a source at a :class:`kdjax.data.sizing.Sizing`, in lines."""

    def suggest(self, source: Any) -> Suggestion | None:
        """What a training split suggests for the keys of data; None where the task knows nothing to suggest."""

    def statistics(self, source: Any) -> Any:
        """What methods are given as "statistics"; None where the task has none."""

    def describe(self, source: Any) -> list[str]:
        """Counts and sizes of a source, in lines for a person."""

    def drawn(self, batch: Batch, row: int, class_names: Sequence[str]) -> Any:
        """An image of a training batch without its padding, and what it shows: :class:`kdjax.visualize.Drawing`."""

    def judged(self, example: Any, said: Any, class_names: Sequence[str]) -> Judged:
        """What a model said of one image, for the report of a run; one of a task without it shows no single images.

        Args:
            example: of a source.
            said: an entry of :meth:`Judge.kept`; None for the truth itself.
            class_names: of the source.
        """
