"""Every key of a config: its default, what it may be, and what it means, as the frozen dataclasses that configs become.

Sections ``model`` and ``method`` are declared by the detectors and methods themselves, which a stage names.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

from ml_collections import config_dict

from kdjax.data.sizing import MOST_PIXELS, RESIZES, Augmentation, Reading, Size, Sizing
from kdjax.options import FLAG, OPTIMIZERS, SCHEDULES, TEXT, WITHOUT_EFFECT, Rule, choice, number, tuple_of, whole
from kdjax.sinks import SINKS
from kdjax.weights import SOURCES

_NAMES = tuple_of(str, "texts, such as ('neck', 'head')")


def _is_pair(value: Any, rule: Rule) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(rule.holds, value))


def _is_size(value: Any) -> bool:
    return _is_pair(value, Rule("", lambda side: type(side) is int and side >= 32 and side % 32 == 0))


_SIZE = Rule(
    "a pair of multiples of 32, height and width in pixels, or a tuple of such pairs",
    lambda value: isinstance(value, tuple) and (_is_size(value) or (value != () and all(map(_is_size, value)))),
)
_PADDING = Rule("0 or a multiple of 32", lambda value: type(value) is int and value >= 0 and value % 32 == 0)
_SHORT_SIDES = Rule(
    "a tuple of whole numbers of at least 1",
    lambda value: isinstance(value, tuple) and all(map(whole(1).holds, value)),
)
_JITTER = Rule(
    "an empty tuple or a pair of numbers above 0, the smaller one first",
    lambda value: value == () or (_is_pair(value, number(0, above=True)) and value[0] <= value[1]),
)
_CROP = Rule(
    "an empty tuple or a pair of multiples of 32, height and width in pixels",
    lambda value: value == () or _is_size(value),
)
_SHARES = Rule(
    "an empty tuple or a pair of numbers above 0 and at most 1, the smaller one first",
    lambda value: value == () or (_JITTER.holds(value) and value[1] <= 1),
)
_RANGE = Rule("a pair of numbers above 0, the smaller one first", lambda value: value != () and _JITTER.holds(value))
_VALUES = Rule(
    "an empty tuple or a pair of numbers, the smaller one first",
    lambda value: value == () or (_is_pair(value, number(-math.inf)) and value[0] < value[1]),
)
_MILESTONES = Rule(
    "a tuple of numbers between 0 and 1, fractions of the run",
    lambda value: isinstance(value, tuple) and all(type(x) in (int, float) and 0 < x < 1 for x in value),
)
_FLOOR = Rule(
    "a number of at least 0 and at most 100, or None", lambda value: value is None or number(0, 100).holds(value)
)
_SEED = Rule("a whole number from 0 to 2**32 - 1", lambda value: type(value) is int and 0 <= value < 2**32)
_SEEDS = Rule(
    "a tuple of different whole numbers from 0 to 2**32 - 1",
    lambda value: isinstance(value, tuple) and all(map(_SEED.holds, value)) and len(set(value)) == len(value),
)
_SINK_NAMES = Rule(
    f"a tuple of different names out of {', '.join(SINKS)}",
    lambda value: isinstance(value, tuple) and all(value.count(x) == 1 and x in tuple(SINKS) for x in value),
)
LOSS_WEIGHT = number(0)
"""What the weight of a loss term may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How parameters move, see :func:`kdjax.optim.make_optimizer` and :func:`kdjax.optim.make_schedule`."""

    name: Annotated[str, choice(*OPTIMIZERS), "SGD, Adam and AdamW as PyTorch has them."] = "adamw"
    learning_rate: Annotated[float, number(0, above=True), "Peak of the rate, quoted for base_batch images."] = 2e-3
    schedule: Annotated[str, choice(*SCHEDULES), "How the rate falls."] = "cosine"
    milestones: Annotated[
        tuple[float, ...], _MILESTONES, 'Fractions of the run after which schedule "step" divides the rate by ten.'
    ] = (8 / 12, 11 / 12)
    final_factor: Annotated[float, number(0, 1), 'Share of the rate at which "cosine" and "poly" end.'] = 0.0
    power: Annotated[float, number(0, above=True), 'Of schedule "poly", by which segmentation trains.'] = 0.9
    end_at_last: Annotated[
        bool,
        FLAG,
        'Whether "poly" reaches its end at the last step, as in MMEngine, instead of after it, as in mmcv 1.x.',
    ] = False
    warmup_steps: Annotated[int, whole(0), "Steps until the schedule holds in full."] = 100
    warmup_factor: Annotated[float, number(0, 1), "Share of the rate at step 0."] = 0.001
    momentum: Annotated[float, number(0, 1, below=True), "Of SGD's accumulated gradient, or Adam's."] = 0.9
    beta2: Annotated[float, number(0, 1, below=True), "Of Adam's accumulated squares."] = 0.99
    weight_decay: Annotated[float, number(0), "Factor of the parameters that is added to the gradient or step."] = 1e-4
    decay_norm_and_bias: Annotated[bool, FLAG, "Decay scales of normalisation and biases too."] = False
    decay_bias: Annotated[bool, FLAG, "Of these, decay biases too, but for those of normalisation."] = True
    bias_rate: Annotated[float, number(0), "Factor of the rate of biases, but for those of normalisation."] = 1.0
    clip_norm: Annotated[float, number(0), "Largest global norm of the gradient; 0 for no limit."] = 10.0
    clip_value: Annotated[float, number(0), "Largest entry of the gradient, after that; 0 for no limit."] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSection:
    """A method of a stage, under a name that is its own unless ``name`` says otherwise."""

    name: str
    """A key of ``kdjax.methods.METHODS``, or package.module:Class."""
    options: Mapping[str, Any]
    """What the method itself declares."""
    optimizer: Optimizer | None = None
    """Of what the method learns; None where it learns as the student does."""
    levels: Annotated[
        tuple[str, ...],
        tuple_of(str, "levels, such as ('p3', 'p4')"),
        'Levels of the features that the method sees, such as ("p2", "p3"); () for all.',
    ] = ()
    init: Annotated[
        str,
        TEXT,
        'Name of an earlier stage, or path of its folder "method": the parts of the method that were learnt there are '
        "taken over and stay as they are. For MasKD also the path of a file of tokens from its authors' program.",
    ] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the train loop: a model, what it starts from, who teaches it, and for how long."""

    model: Mapping[str, Any]
    """The model, as :func:`kdjax.models.build_model` takes it."""
    methods: Mapping[str, MethodSection]
    """The methods by name, whose terms are added to the student's own; {} trains without any."""
    optimizer: Optimizer
    loss_weights: Mapping[str, float]
    """Weight of each loss term by name; 1 where absent."""

    method_share: Annotated[
        float,
        number(0),
        "Above 0, what the terms of the methods are together at the first step, as a multiple of the student's own "
        "loss: one factor scales all their weights so. 0 leaves the weights as they are.",
    ] = 0.0
    weights: Annotated[
        str, TEXT, "File of a PyTorch model's weights, or of a backbone's alone, to start from; \"\" for none."
    ] = ""
    weights_key: Annotated[
        str,
        TEXT,
        'Which entry of that file is taken where it holds several state dicts, such as "model_ema"; "" for the usual '
        "one.",
    ] = ""
    source: Annotated[str, choice("", *SOURCES), "Where that file is from."] = ""
    init: Annotated[
        str,
        TEXT,
        '"" trains from scratch; the name of an earlier stage, or the path of a model folder or of one step of a '
        "run's checkpoints, starts from it.",
    ] = ""
    init_strict: Annotated[
        bool,
        FLAG,
        "False takes from init or weights what fits and does not depend on other classes than the data's, and leaves "
        "the rest as it is initialised.",
    ] = True
    teacher: Annotated[
        str, TEXT, 'Name of an earlier stage, or path of a model folder; "" trains without a teacher.'
    ] = ""
    inherit: Annotated[
        tuple[str, ...],
        _NAMES,
        'Parts of the model that start from the teacher\'s where shapes match, such as ("neck", "head").',
    ] = ()
    freeze: Annotated[
        tuple[str, ...], _NAMES, 'Parameter paths that do not move, such as ("student/backbone/conv1",).'
    ] = ()
    batch_size: Annotated[int, whole(1), "Images of one step on all devices together."] = 8
    base_batch: Annotated[
        int,
        whole(1),
        "The batch that steps and learning rate are quoted for: the rate scales linearly with batch_size, the counts "
        "of steps inversely.",
    ] = 8
    steps: Annotated[int, whole(0), "0 takes over the weights as they are: evaluated, and ready to teach."] = 700
    accumulate: Annotated[int, whole(1), "Parts that each device works its share of the batch through in."] = 1
    ema_decay: Annotated[
        float, number(0, 1, below=True), "Decay of an exponential moving average of the weights; 0 for none."
    ] = 0.0
    dtype: Annotated[
        str,
        choice("float32", "bfloat16"),
        "Compute dtype, in which a teacher's kernels are kept; what is trained, statistics and losses are float32.",
    ] = "float32"
    eval_every: Annotated[
        int, whole(0), "Steps between evaluations on the way; 0 evaluates at the end only.", WITHOUT_EFFECT
    ] = 0
    checkpoint_every: Annotated[int, whole(1), "Steps between checkpoints.", WITHOUT_EFFECT] = 200
    keep_checkpoints: Annotated[
        int, whole(1), "Newest checkpoints that are kept, besides the best.", WITHOUT_EFFECT
    ] = 2
    export: Annotated[
        str,
        choice("last", "best"),
        'Weights that a finished stage keeps: the "last", or the "best" of its evaluations by the primary metric.',
    ] = "last"
    log_every: Annotated[int, whole(1), "Steps between lines of progress.", WITHOUT_EFFECT] = 20
    teacher_floor: Annotated[
        float | None,
        _FLOOR,
        "The stage does not start if its teacher's primary metric, such as AP, is worse than this. None is what "
        "is known of the teacher: 10 on shapes, one less than published where weights are taken over as they are, "
        "nothing on other data.",
        WITHOUT_EFFECT,
    ] = None
    published: Annotated[
        float,
        number(0, 100),
        "The primary metric that a model zoo states of the model in weights, on COCO or ImageNet; 0 where none does.",
        WITHOUT_EFFECT,
    ] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data set, how its flaws are met, and how large and how changed its images are."""

    name: Annotated[
        str,
        TEXT,
        "shapes, which is generated; tfds:<name>, such as tfds:coco/2017, tfds:voc/2007+2012 or tfds:imagenet2012; or "
        "coco_json:<folder>, yolo:<folder> or voc:<folder> for images with annotations in COCO's, YOLO's or Pascal "
        "VOC's format. Of classification shapes/crops or class_folders:<folder>; of segmentation shapes/maps, "
        "index_maps:<folder>, voc_maps:<folder> or cityscapes:<folder>.",
    ] = "shapes"
    data_dir: Annotated[
        str,
        TEXT,
        'Where data sets lie; "" is the default folder of tensorflow-datasets, or the working directory.',
        WITHOUT_EFFECT,
    ] = ""
    train_split: Annotated[
        str,
        TEXT,
        "With a part, if wanted, such as train[:1000], or train[kept] without train[held_out], a fifth of it; of "
        "coco_json also <json file>:<folder of its images>.",
    ] = "train"
    eval_split: Annotated[str, TEXT, "Likewise."] = "validation"
    download: Annotated[
        bool, FLAG, "Let tensorflow-datasets download and prepare a set that is missing.", WITHOUT_EFFECT
    ] = False
    strict: Annotated[
        bool, FLAG, "Refuse data with any flaw, instead of leaving out or repairing what is flawed.", WITHOUT_EFFECT
    ] = False
    lenient: Annotated[
        bool,
        FLAG,
        "Leave out images whose file is unusable and annotations of unknown images or classes, instead of refusing "
        "them.",
    ] = False
    follow_links: Annotated[
        bool,
        FLAG,
        "Take images that are links to files outside of their folder, as caches and stores make them.",
        WITHOUT_EFFECT,
    ] = False
    digest: Annotated[
        bool,
        FLAG,
        "Read all image files whole at every start, and refuse to go on where one has other bytes than at the first; "
        "False looks at sizes, times and some of the bytes.",
        WITHOUT_EFFECT,
    ] = False
    max_json_bytes: Annotated[
        int,
        whole(1),
        "Bytes of the largest annotation file that is read; it takes several times the memory.",
        WITHOUT_EFFECT,
    ] = 10**9
    max_pixels: Annotated[int, whole(1), "Pixels of the largest image that is decoded.", WITHOUT_EFFECT] = MOST_PIXELS
    upright: Annotated[
        bool,
        FLAG,
        "Turn images as their orientation mark (EXIF) says, for boxes of images as viewers show them; False leaves "
        "pixels as they are stored.",
    ] = False
    value_range: Annotated[
        tuple[float, float] | tuple[()],
        _VALUES,
        "Values that become black and white in images of more than 8 bits, such as (0, 4095) for 12 bits in 16; () "
        "takes the upper 8 of 16 bits.",
    ] = ()
    skip_empty: Annotated[bool, FLAG, "Leave images without objects out of the training."] = False
    image_size: Annotated[
        tuple,
        _SIZE,
        "Height and width of the padded images. Of several such pairs, as in ((800, 1344), (1344, 800)), each image "
        "has the one that fits it best; a step is compiled for each.",
    ] = (128, 128)
    short_sides: Annotated[
        tuple[int, ...],
        _SHORT_SIDES,
        "Lengths of the shorter side that images are scaled to, one of them drawn in training, the longest in "
        "evaluation, as long as the longer side stays within long_side; () scales each image to the largest size that "
        "fits.",
    ] = ()
    long_side: Annotated[int, whole(0), "Limit of the longer side in pixels; 0 for none."] = 0
    resize: Annotated[
        str,
        choice(*RESIZES),
        "How images are scaled: as the program does that a teacher's file is from. Sides become the nearest whole "
        'numbers ("kdjax", to even; "mmdet", "detectron2") or those below ("torchvision"), and shrinking images are '
        'antialiased ("kdjax", "detectron2") or not ("mmdet", "torchvision").',
    ] = "kdjax"
    eval_padding: Annotated[
        int,
        _PADDING,
        "Evaluation pads each image to the next multiple of this, 32 as published detectors are tested, and compiles "
        "anew for each shape that comes of it; 0 pads to image_size. What padding there is changes boxes a little.",
    ] = 0
    centre_crop: Annotated[
        bool,
        FLAG,
        "Evaluation cuts what does not fit into image_size, alike on both sides, where the shorter side is "
        "short_sides long or, with (), where the image covers the array; as classifiers are tested.",
    ] = False
    fit: Annotated[
        bool,
        FLAG,
        "On data of your own, choose from the training split what is left as it suits the embedded data: image_size, "
        "jitter, color, max_objects, the sizes that detectors look for, and evaluations on the way.",
        WITHOUT_EFFECT,
    ] = True
    max_objects: Annotated[int, whole(1), "Room for objects in an image; of more, the largest are kept."] = 16
    max_detections: Annotated[
        int,
        whole(10),
        "Detections of an image that are judged, the best ones; models return as many, unless max_detections "
        "of their heads says otherwise.",
    ] = 100
    masks: Annotated[
        bool, FLAG, "Also make batches of the objects' masks, as grids of mask_size x mask_size cells."
    ] = False
    mask_size: Annotated[int, whole(1), "Cells along a side of a mask's grid."] = 112
    flip: Annotated[float, number(0, 1), "Probability of mirroring an image in training."] = 0.5
    jitter: Annotated[
        tuple[float, float] | tuple[()],
        _JITTER,
        "Range of a factor on the scale at which images fit, in training, such as (0.1, 2.0): what is then too large "
        "is cropped. () for none.",
    ] = ()
    color: Annotated[float, number(0, 1), "Strength of changes of brightness, contrast, saturation and hue."] = 0.0
    crop: Annotated[
        tuple[int, int] | tuple[()],
        _CROP,
        "Height and width of training's images where they are not evaluation's: cut at a random place of the image, "
        "which is scaled as in evaluation, times jitter. () for image_size.",
    ] = ()
    jitter_steps: Annotated[
        int,
        Rule("0 or a whole number of at least 2", lambda value: value == 0 or whole(2).holds(value)),
        "Equally spaced factors of jitter, of which one is drawn; 0 for any in between.",
    ] = 0
    cat_max_ratio: Annotated[
        float,
        number(0, 1, above=True),
        "Of label maps: windows in which one class has more of the labelled pixels than this share are drawn anew, up "
        "to ten times.",
    ] = 1.0
    area: Annotated[
        tuple[float, float] | tuple[()],
        _SHARES,
        "Range of the share of an image's area that training cuts out at a random place and scales to the whole "
        "array, such as (0.08, 1.0), in place of jitter. () for none.",
    ] = ()
    ratio: Annotated[tuple[float, float], _RANGE, "Range of the ratio of width to height of what area cuts out."] = (
        3 / 4,
        4 / 3,
    )
    photometric: Annotated[
        bool,
        FLAG,
        "Change colours as SSD and MMSegmentation do, after scaling: brightness, contrast, saturation and hue, each "
        "with probability 1/2.",
    ] = False
    mixup: Annotated[
        float,
        number(0),
        "Of images of one class each: above 0, each is mixed with another one, whose share is drawn from the beta "
        "distribution with this as both parameters.",
    ] = 0.0
    threads: Annotated[int, whole(1), "Threads that prepare images.", WITHOUT_EFFECT] = 2
    processes: Annotated[
        int,
        whole(0),
        "Processes, beside each one of the run, that prepare the batches of training instead of threads. These share "
        "Python's lock: more than some 400 images a second they do not prepare, however many they are. Linux alone.",
        WITHOUT_EFFECT,
    ] = 0

    @property
    def sizing(self) -> Sizing:
        """How large images are."""
        shapes = (self.image_size,) if _is_size(self.image_size) else self.image_size
        return Sizing(shapes, self.short_sides, self.long_side, self.resize, self.eval_padding, self.centre_crop)

    @property
    def training_shapes(self) -> tuple[Size, ...]:
        """Of the arrays that training's images are padded to."""
        return (self.crop,) if self.crop else self.sizing.shapes

    @property
    def reading(self) -> Reading:
        """How image files are read."""
        return Reading(upright=self.upright, value_range=self.value_range or None, most_pixels=self.max_pixels)

    @property
    def augmentation(self) -> Augmentation:
        """What training changes at random."""
        return Augmentation(
            flip=self.flip,
            jitter=self.jitter or None,
            color=self.color,
            crop=self.crop or None,
            jitter_steps=self.jitter_steps,
            cat_max_ratio=self.cat_max_ratio,
            area=self.area or None,
            ratio=self.ratio,
            photometric=self.photometric,
            mixup=self.mixup,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a config says besides its data and its stages."""

    task: Annotated[
        str, TEXT, "What models learn: detection, classification, or package.module:Class of a task of yours."
    ] = "detection"
    seed: Annotated[int, _SEED, "Of weights, batches and masks."] = 0
    seeds: Annotated[
        tuple[int, ...],
        _SEEDS,
        "Repeat the whole run, compared with its twin, for each of these seeds, and judge the differences; () for one "
        "run of seed.",
    ] = ()
    stages: Annotated[tuple[str, ...], _NAMES, "Stages in order; each has its own section, under its name."] = (
        "teacher",
        "student",
    )
    compare: Annotated[
        bool,
        FLAG,
        "Also train the identical student, started alike, without the methods, and print the difference.",
    ] = False
    eval_batch_size: Annotated[int, whole(1), "Images of one batch of an evaluation on all devices together."] = 16
    pictures: Annotated[int, whole(0), "Validation images drawn with their predictions into predictions.png."] = 8
    sinks: Annotated[
        tuple[str, ...],
        _SINK_NAMES,
        'Where losses and metrics go besides metrics.jsonl, such as ("tensorboard", "wandb"); () for nowhere else.',
        WITHOUT_EFFECT,
    ] = ("tensorboard",)
    patience: Annotated[
        float,
        number(0),
        "Factor on how long nothing may be done before a run is taken for hung, and ends with exit code 75: 10 minutes "
        "in a step, 30 minutes in a checkpoint, 2 hours while a step is compiled or in a batch of an evaluation. 0 "
        "waits for ever.",
        WITHOUT_EFFECT,
    ] = 1.0


def placeholder(default: Any) -> Any:
    """A default for a ConfigDict: flags can set a key that is None so far to a number."""
    return config_dict.placeholder(float) if default is None else default
