"""The schema of a run: every key with its default, and what each may be.

A config file in ``configs/`` is a short diff of :func:`base_config`. The defaults are the laptop protocol on the
embedded data set ``shapes``.
"""

import fnmatch
import importlib.util
import json
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from kdjax.data.sizing import Augmentation, Sizing
from kdjax.errors import UserError
from kdjax.methods import METHODS, build_method, method_options, term_names
from kdjax.models import build_detector
from kdjax.options import OPTIMIZERS, SCHEDULES
from kdjax.paths import local_path
from kdjax.weights import SOURCES


def retinanet(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of a RetinaNet for images of about 128 pixels: half-sized anchors, short heads with group norm.

    Args:
        depth: of the ResNet, 18, 34, 50 or 101.
        width: factor on the ResNet's channels.
        channels: of the feature pyramid and the heads.
    """
    return ConfigDict(
        dict(
            name="retinanet",
            backbone=dict(depth=depth, width=width),
            neck=dict(channels=channels, min_level=3, max_level=7, extra_from="p5"),
            head=dict(convs=2, norm="group", anchor_scale=2.5),
            frozen_norm=False,
            pixel_mean=(123.675, 116.28, 103.53),
            pixel_std=(58.395, 57.12, 57.375),
        )
    )


def fcos(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of an improved FCOS for images of about 128 pixels: ranges of small objects, short heads.

    Args:
        depth: of the ResNet, 18, 34, 50 or 101.
        width: factor on the ResNet's channels.
        channels: of the feature pyramid and the heads.
    """
    head = dict(
        convs=2,
        norm_on_box=True,
        centerness_on_box=True,
        range_scale=3.0,
        centre_radius=1.5,
        box_loss="giou",
        iou_threshold=0.6,
    )
    return ConfigDict(retinanet(depth, width, channels).to_dict() | dict(name="fcos", head=head))


def base_stage(model: ConfigDict) -> ConfigDict:
    """One run of the train loop: a detector, what it starts from, who teaches it, and for how long."""
    return ConfigDict(
        dict(
            model=model,
            # File of a PyTorch detector's weights, or of a backbone's alone, to start from; "" for none.
            weights="",
            # Where that file is from: torchvision, mmdet, detectron2 or timm.
            source="",
            # "" trains from scratch; the name of an earlier stage, or the path of a model folder or of one step of a
            # run's checkpoints, starts from it.
            init="",
            # False takes from init what fits by path and shape, and leaves the rest as it is initialised.
            init_strict=True,
            # Name of an earlier stage, or path of a model folder; "" trains without a teacher.
            teacher="",
            # Parts of the detector that start from the teacher's where shapes match, such as ("neck", "head").
            inherit=(),
            method=dict(name="none"),
            # Name of an earlier stage, or path of its folder "method": the parts of the method that were learnt there
            # are taken over and stay as they are.
            method_init="",
            # Levels of the pyramids that the method sees, such as ("p2", "p3"); () for all.
            levels=(),
            # Also learn the teacher's box regression, map by map: the term "box_imitation", beside any method.
            imitate_boxes=False,
            # Weight of each loss term by name; 1 where absent.
            loss_weights=dict(cls=1.0, box=1.0),
            # Parameter paths that do not move, such as ("student/backbone/conv1",).
            freeze=(),
            # Images of one step on all devices together.
            batch_size=8,
            # The batch that steps and learning rate are quoted for: the rate scales linearly with batch_size, the
            # counts of steps inversely.
            base_batch=8,
            # 0 takes over the weights as they are: evaluated, and ready to teach.
            steps=700,
            # Parts that each device works its share of the batch through in.
            accumulate=1,
            # A section "method_optimizer" like this one gives what the method learns an optimiser of its own.
            optimizer=dict(
                name="adamw",
                learning_rate=2e-3,
                schedule="cosine",
                # Fractions of the run after which schedule "step" divides the rate by ten.
                milestones=(8 / 12, 11 / 12),
                # Share of the rate at which schedule "cosine" ends.
                final_factor=0.0,
                warmup_steps=100,
                warmup_factor=0.001,
                # Of SGD's accumulated gradient, or Adam's; beta2 is of Adam's accumulated squares.
                momentum=0.9,
                beta2=0.99,
                weight_decay=1e-4,
                decay_norm_and_bias=False,
                # Largest global norm of the gradient; 0 for no limit.
                clip_norm=10.0,
            ),
            # Decay of an exponential moving average of the weights; 0 for none.
            ema_decay=0.0,
            # Compute dtype; parameters, statistics and losses are always float32.
            dtype="float32",
            # Steps between evaluations on the way; 0 evaluates at the end only.
            eval_every=0,
            checkpoint_every=200,
            # Newest checkpoints that are kept, besides the best.
            keep_checkpoints=2,
            log_every=20,
            # The stage does not start if its teacher's AP is below this. None is what is known of the teacher: 10 on
            # shapes, one below the published AP of weights that are taken over as they are, nothing on other data.
            teacher_floor=config_dict.placeholder(float),
            # AP on COCO that a model zoo states of the detector in weights; 0 where none does.
            published_ap=0.0,
        )
    )


def method_config(name: str, **options: Any) -> ConfigDict:
    """Config of a method: every option it has, at its default unless given."""
    return ConfigDict(dict(name=name) | method_options(name) | options)


def loss_terms(model: ConfigDict) -> tuple[str, ...]:
    """Names of the loss terms of a detector, from its section of a config."""
    return build_detector(model.to_dict(), num_classes=1).terms


def base_config() -> ConfigDict:
    """Teacher, then student, on the embedded data: what every config starts from."""
    config = ConfigDict(
        dict(
            seed=0,
            # Stages in order; each has its own section below, under its name.
            stages=("teacher", "student"),
            # Also train the identical student without a teacher, and print the difference.
            compare=False,
            data=dict(
                # shapes, which is generated; tfds:<name>, such as tfds:coco/2017 or tfds:voc/2007+2012; or
                # coco_json:<folder> for images with annotations in COCO's format.
                name="shapes",
                # Where data sets lie; "" is the default folder of tensorflow-datasets, or the working directory.
                data_dir="",
                # With a slice, if wanted, such as train[:1000]; of coco_json also <json file>:<folder of its images>.
                train_split="train",
                eval_split="validation",
                # Let tensorflow-datasets download and prepare a set that is missing.
                download=False,
                # Refuse data with any flaw, instead of leaving out or repairing what is flawed.
                strict=False,
                # Leave out images whose file is unusable and annotations of unknown images or classes, instead of
                # refusing them.
                lenient=False,
                # Leave images without objects out of the training.
                skip_empty=False,
                # Height and width of the padded images. Of several such pairs, as in ((800, 1344), (1344, 800)), each
                # image has the one that fits it best; a step is compiled for each.
                image_size=(128, 128),
                # Lengths of the shorter side that images are scaled to, one of them drawn in training, the longest in
                # evaluation, as long as the longer side stays within long_side (0 for no limit); () scales each image
                # to the largest size that fits.
                short_sides=(),
                long_side=0,
                max_objects=16,
                # Also make batches of the objects' masks, as grids of mask_size x mask_size cells.
                masks=False,
                mask_size=112,
                flip=0.5,
                # Range of a factor on the scale at which images fit, in training, such as (0.1, 2.0): what is then too
                # large is cropped. () for none.
                jitter=(),
                # Strength of changes of brightness, contrast, saturation and hue.
                color=0.0,
                threads=2,
            ),
            eval_batch_size=16,
            # Validation images drawn with their predictions into predictions.png.
            pictures=8,
            teacher=base_stage(retinanet(depth=18, width=0.5)),
            student=base_stage(retinanet(depth=18, width=0.125)),
        )
    )
    config.teacher.steps = 800
    config.student.teacher = "teacher"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """A config with small detectors that take two steps on tiny data, to check an installation or a config."""
    config.data.update(name="shapes/tiny", image_size=(64, 64), short_sides=(), long_side=0, threads=2)
    config.eval_batch_size = 8
    for stage in (config[name] for name in config.stages):
        stage.model.backbone = ConfigDict(dict(depth=10, width=0.125))
        stage.model.neck.update(channels=16, max_level=6)
        stage.model.head.update(TINY_HEADS[stage.model.name])
        # Nothing is known to the backbones, and they have fewer blocks.
        stage.freeze = tuple(path for path in stage.freeze if not path.startswith("student/backbone/"))
        stage.update(weights="", source="", batch_size=8, base_batch=8, steps=2)
    return config


_TINY_DENSE = dict(convs=1)
_TINY_RCNN = dict(
    head_channels=32,
    anchor_scale=2.0,
    train_candidates=32,
    train_proposals=32,
    candidates=32,
    proposals=32,
    anchor_samples=32,
    roi_samples=16,
)
TINY_HEADS: dict[str, dict[str, Any]] = {
    "retinanet": _TINY_DENSE,
    "fcos": _TINY_DENSE,
    "faster_rcnn": _TINY_RCNN,
    "mask_rcnn": _TINY_RCNN,
    "cascade_rcnn": _TINY_RCNN,
    "cascade_mask_rcnn": _TINY_RCNN,
}
"""What makes the head of each detector small."""


def load_config(spec: str) -> ConfigDict:
    """The config of a file ``path`` or ``path:variant``, before any override.

    Raises:
        UserError: there is no such file or variant, or the file fails.
    """
    path, *variant = spec.split(":", 1)
    if not local_path(path).is_file():
        raise UserError(f"--config={spec} cannot be read: there is no file {path}.")
    module_spec = importlib.util.spec_from_file_location("config", local_path(path))
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec} is no Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(*variant)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={spec} fails with {type(error).__name__}: {error}") from error


BASELINE = "baseline"
"""The stage that ``compare`` adds: the identical student without the method's terms. Those that come before it, where
the student starts from another one, are called ``baseline_<name of that stage>``."""


def stage_number(config: ConfigDict, name: str) -> int:
    """The number in [0, 2**32) that a stage's batches and random numbers are drawn from, beside the seed.

    It is made of the stage's name: two stages of one run see other batches, and a stage goes on as it began when others
    are added before it. A baseline has the number of its twin, and sees what that sees.
    """
    twin = config.stages[-1] if name == BASELINE else name.removeprefix(f"{BASELINE}_")
    return zlib.crc32(twin.encode())


PARTS = ("backbone", "neck", "head")
"""What every detector is made of, and what a student may inherit."""


class Rule(NamedTuple):
    """What a key may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _whole(low: int) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda value: type(value) is int and value >= low)


def _number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    words = f"a number above {low:g}" if above else f"a number of at least {low:g}"
    if math.isfinite(high):
        words += f" and below {high:g}" if below else f" and at most {high:g}"

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    return Rule(words, holds)


def _choice(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def _tuple_of(kind: type | tuple[type, ...], words: str) -> Rule:
    return Rule(
        f"a tuple of {words}",
        lambda value: isinstance(value, tuple) and all(isinstance(x, kind) and type(x) is not bool for x in value),
    )


def _is_pair(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(holds, value))


def _is_size(value: Any) -> bool:
    return _is_pair(value, lambda side: type(side) is int and side >= 32 and side % 32 == 0)


_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_TEXT = Rule("a text", lambda value: isinstance(value, str))
_NAMES = _tuple_of(str, "texts, such as ('neck', 'head')")

RULES: dict[str, Rule] = {
    "seed": Rule("a whole number from 0 to 2**32 - 1", lambda value: type(value) is int and 0 <= value < 2**32),
    "stages": _NAMES,
    "compare": _FLAG,
    "eval_batch_size": _whole(1),
    "pictures": _whole(0),
    "data.name": _TEXT,
    "data.data_dir": _TEXT,
    "data.train_split": _TEXT,
    "data.eval_split": _TEXT,
    "data.download": _FLAG,
    "data.strict": _FLAG,
    "data.lenient": _FLAG,
    "data.skip_empty": _FLAG,
    "data.image_size": Rule(
        "a pair of multiples of 32, height and width in pixels, or a tuple of such pairs",
        lambda value: isinstance(value, tuple) and (_is_size(value) or (value != () and all(map(_is_size, value)))),
    ),
    "data.short_sides": Rule(
        "a tuple of whole numbers of at least 1",
        lambda value: isinstance(value, tuple) and all(map(_whole(1).holds, value)),
    ),
    "data.long_side": _whole(0),
    "data.jitter": Rule(
        "an empty tuple or a pair of numbers above 0, the smaller one first",
        lambda value: value == () or (_is_pair(value, _number(0, above=True).holds) and value[0] <= value[1]),
    ),
    "data.color": _number(0, 1),
    "data.max_objects": _whole(1),
    "data.masks": _FLAG,
    "data.mask_size": _whole(1),
    "data.flip": _number(0, 1),
    "data.threads": _whole(1),
    "*.weights": _TEXT,
    "*.source": _choice("", *SOURCES),
    "*.init": _TEXT,
    "*.init_strict": _FLAG,
    "*.teacher": _TEXT,
    "*.method_init": _TEXT,
    "*.inherit": _NAMES,
    "*.levels": _tuple_of(str, "levels, such as ('p3', 'p4')"),
    "*.imitate_boxes": _FLAG,
    "*.freeze": _NAMES,
    "*.method.name": _choice(*METHODS),
    "*.method.mask_ratio": _number(0, 1),
    "*.method.mask": _choice("spatial", "channel"),
    "*.method.spatial_ratio": _number(0, 1),
    "*.method.channel_ratio": _number(0, 1),
    "*.method.tau": _number(0, above=True),
    "*.method.select": _choice("ratio", "threshold"),
    "*.method.threshold": _number(0),
    "*.method.hide": _choice("high", "low"),
    "*.method.keep_probability": _number(0, 1),
    "*.method.heads": _whole(1),
    "*.method.layers": _whole(1),
    "*.method.temperature": _number(0, above=True),
    "*.method.queries": _whole(1),
    "*.method.tokens": _whole(2),
    "*.method.weighted": _FLAG,
    "*.method.warmup_steps": _whole(0),
    "*.method.stage": _whole(1),
    "*.method.enhance": _choice("ratio", "objects"),
    "*.method.eta": _number(0),
    "*.method.alignment": _choice("norm", "separate"),
    "*.loss_weights.*": _number(0),
    "*.batch_size": _whole(1),
    "*.base_batch": _whole(1),
    "*.steps": _whole(0),
    "*.accumulate": _whole(1),
    "*optimizer.name": _choice(*OPTIMIZERS),
    "*optimizer.learning_rate": _number(0, above=True),
    "*optimizer.schedule": _choice(*SCHEDULES),
    "*optimizer.milestones": Rule(
        "a tuple of numbers between 0 and 1, fractions of the run",
        lambda value: isinstance(value, tuple) and all(type(x) in (int, float) and 0 < x < 1 for x in value),
    ),
    "*optimizer.final_factor": _number(0, 1),
    "*optimizer.warmup_steps": _whole(0),
    "*optimizer.warmup_factor": _number(0, 1),
    "*optimizer.momentum": _number(0, 1, below=True),
    "*optimizer.beta2": _number(0, 1, below=True),
    "*optimizer.weight_decay": _number(0),
    "*optimizer.decay_norm_and_bias": _FLAG,
    "*optimizer.clip_norm": _number(0),
    "*.ema_decay": _number(0, 1, below=True),
    "*.dtype": _choice("float32", "bfloat16"),
    "*.eval_every": _whole(0),
    "*.checkpoint_every": _whole(1),
    "*.keep_checkpoints": _whole(1),
    "*.log_every": _whole(1),
    "*.teacher_floor": Rule(
        "a number of at least 0 and at most 100, or None", lambda value: value is None or _number(0, 100).holds(value)
    ),
    "*.published_ap": _number(0, 100),
}
"""What each key may be, by pattern; the sections ``model`` are checked by the detectors that they build."""


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config by its dotted path, with its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def rule(path: str) -> Rule | None:
    """The rule of a key, or None where its section checks itself (or nothing knows it)."""
    return RULES.get(path) or next((rule for pattern, rule in RULES.items() if fnmatch.fnmatch(path, pattern)), None)


def check_config(config: ConfigDict, devices: int) -> None:
    """Refuses a config that cannot run, before anything is loaded or compiled.

    Args:
        config: the whole config.
        devices: number of devices that share a batch.

    Raises:
        UserError: one sentence with the key, its value and what is allowed.
    """
    for path, value in leaves(config):
        if ".model." in path:
            continue
        allowed = rule(path)
        if allowed is None:
            raise UserError(f"config.{path} is not a key that kdjax knows.")
        if not allowed.holds(value):
            raise UserError(f"config.{path} is {value!r}; it must be {allowed.words}.")
    if not config.stages:
        raise UserError("config.stages is empty; it must name at least one stage.")
    if config.eval_batch_size % devices:
        raise UserError(
            f"config.eval_batch_size is {config.eval_batch_size}, which the {devices} devices cannot share evenly; it "
            f"must be a multiple of {devices}."
        )
    for position, name in enumerate(config.stages):
        if not isinstance(config.get(name), ConfigDict) or "model" not in config[name]:
            raise UserError(f"config.stages names {name!r}, but there is no stage config.{name}.")
        if name in config.stages[:position] or name.startswith(BASELINE):
            raise UserError(
                f"config.stages is {config.stages!r}; each name must be there once, and none be '{BASELINE}'."
            )
        _check_stage(name, config[name], earlier=config.stages[:position], devices=devices, masks=config.data.masks)
    if config.compare and not config[config.stages[-1]].teacher:
        raise UserError(
            f"config.compare is True, but the last stage, {config.stages[-1]!r}, has no teacher to leave out."
        )


def make_sizing(data: ConfigDict) -> Sizing:
    """How large images are, from the section ``data``."""
    shapes = (data.image_size,) if _is_size(data.image_size) else data.image_size
    return Sizing(shapes, data.short_sides, data.long_side)


def make_augmentation(data: ConfigDict) -> Augmentation:
    """What training changes at random, from the section ``data``."""
    return Augmentation(flip=data.flip, jitter=data.jitter or None, color=data.color)


def _check_stage(name: str, stage: ConfigDict, earlier: tuple[str, ...], devices: int, masks: bool) -> None:
    try:
        model = build_detector(stage.model.to_dict(), num_classes=1)
    except UserError as error:
        raise UserError(f"config.{name}.model: {error}") from error
    try:
        method = build_method(stage.method.to_dict())
    except UserError as error:
        raise UserError(f"config.{name}.method: {error}") from error
    learns_masks = any(term == "mask" or term.endswith("_mask") for term in model.terms)
    if stage.steps and learns_masks and not masks:
        raise UserError(
            f"config.data.masks is False, but config.{name}.model is {stage.model.name!r}, which learns masks: set "
            "config.data.masks=True, with data that have outlines."
        )
    share = devices * stage.accumulate
    if stage.batch_size % share:
        raise UserError(
            f"config.{name}.batch_size is {stage.batch_size}, which {devices} devices in {stage.accumulate} part(s) "
            f"each cannot share evenly; it must be a multiple of {share}."
        )
    terms = (*model.terms, *term_names(method, model.terms), *(["box_imitation"] * stage.imitate_boxes))
    for term in stage.loss_weights:
        if term not in terms:
            raise UserError(
                f"config.{name}.loss_weights has the term {term!r}, but this stage's loss has: {', '.join(terms)}."
            )
    for field, kind in (("init", "model"), ("teacher", "model"), ("method_init", "method")):
        origin = stage[field]
        if origin and origin not in earlier and not ("/" in origin and local_path(origin).is_dir()):
            raise UserError(
                f"config.{name}.{field} is {origin!r}; it must be empty, the path of a {kind} folder that exists (with "
                f"a slash, such as ./{kind}), or an earlier stage ({', '.join(earlier) or 'there is none'})."
            )
    if stage.weights and not stage.source:
        raise UserError(
            f"config.{name}.source is empty, but config.{name}.weights names a file: say where it is from, one of "
            f"{', '.join(SOURCES)}."
        )
    if stage.weights and not local_path(stage.weights).is_file():
        raise UserError(f"config.{name}.weights is {stage.weights!r}, but there is no such file; give its path.")
    if stage.weights and stage.init:
        raise UserError(f"config.{name} has both weights and init; a stage starts from one of them.")
    if not stage.steps and not (stage.weights or stage.init):
        raise UserError(f"config.{name}.steps is 0, which takes over weights: give config.{name}.weights or init.")
    for part in stage.inherit:
        if part not in PARTS:
            raise UserError(f"config.{name}.inherit has {part!r}; the parts of a detector are {', '.join(PARTS)}.")
    for field in method.needs:
        if field in stage and not stage[field]:
            raise UserError(f"config.{name}.method is {stage.method.name!r}, which needs config.{name}.{field}.")
    for field in ("inherit", "imitate_boxes"):
        if stage[field] and not stage.teacher:
            raise UserError(f"config.{name}.{field} is {stage[field]!r}, which needs config.{name}.teacher.")


class Scaled(NamedTuple):
    """A stage's schedule at its actual batch size."""

    method: dict[str, Any]
    """The stage's section ``method``."""
    steps: int
    learning_rate: float
    warmup_steps: int
    eval_every: int
    checkpoint_every: int


def scaled_schedule(stage: ConfigDict, optimizer: str = "optimizer") -> Scaled:
    """Scales the learning rate linearly with the batch, and all counts of steps inversely (Goyal et al., 2017).

    Args:
        stage: the section of a stage.
        optimizer: name of the section of the optimiser, "optimizer" or "method_optimizer".
    """
    factor = stage.batch_size / stage.base_batch

    def count(steps: int) -> int:
        return max(1, round(steps / factor)) if steps else 0

    method = stage.method.to_dict()
    if "warmup_steps" in method:
        method["warmup_steps"] = count(method["warmup_steps"])
    return Scaled(
        method=method,
        steps=count(stage.steps),
        learning_rate=stage[optimizer].learning_rate * factor,
        warmup_steps=count(stage[optimizer].warmup_steps),
        eval_every=count(stage.eval_every),
        checkpoint_every=count(stage.checkpoint_every),
    )


def differences(saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What changed between two plain configs, one ``key: old -> new`` for each key."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{prefix}.{key}").items()}

    old, new = flat(saved), flat(json.loads(json.dumps(config)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key[1:]}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}" for key in changed]
