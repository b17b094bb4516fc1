"""Pairs of teacher and student on COCO, of the kinds that papers report: ``--config=configs/<method>.py:<pair>``.

A pair is a config whose teacher comes from a file of MMDetection's model zoo and whose student starts from a backbone
that was trained on ImageNet. Nothing is downloaded: each pair names the two files that it expects, and
``--config.teacher.weights=PATH`` and ``--config.student.weights=PATH`` say where they are. The student, and its teacher
beside it, compute in bfloat16, which processors without it do slowly (``--config.student.dtype=float32``); a teacher
that is measured as it was published does in float32.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kdjax.config import base_config, base_stage, tiny
from kdjax.config.presets import SMALL_DETECTORS, learns_masks
from kdjax.errors import UserError
from kdjax.models import model_class
from kdjax.weights import SOURCES

Model = dict[str, Any]

EPOCH = 7330
"""Steps in which MMDetection sees the training images that have objects once, 16 at a time; schedule 2x has 24 of them.
"""

R18, R50, R101 = ({"depth": depth} for depth in (18, 50, 101))
R50_CAFFE, R101_CAFFE = ({"depth": depth, "style": "caffe"} for depth in (50, 101))
X101_32X4D, X101_64X4D = ({"depth": 101, "groups": groups, "base_width": 4} for groups in (32, 64))


def _detector(name: str, backbone: Model, neck: Model, **head: Any) -> Model:
    return {"name": name, "backbone": backbone, "neck": neck, "head": head, "frozen_norm": True}


def _retinanet(backbone: Model, extra_relu: bool = False) -> Model:
    return _detector("retinanet", backbone, {"extra_from": "c5", "extra_relu": extra_relu})


def _fcos(backbone: Model, **head: Any) -> Model:
    return _detector("fcos", backbone, {}, **head)


def _improved_fcos(backbone: Model, **head: Any) -> Model:
    improved = {"conv_bias": True, "norm_on_box": True, "centre_radius": 1.5, "box_loss": "giou", "iou_threshold": 0.6}
    return _fcos(backbone, **improved, **head)


def _gfl(backbone: Model) -> Model:
    return _detector("gfl", backbone, {})


def _reppoints(backbone: Model) -> Model:
    return _detector("reppoints", backbone, {})


def _two_stage(name: str, backbone: Model) -> Model:
    return _detector(name, backbone, {"min_level": 2, "max_level": 6, "extra_from": "pool"})


def _solo(backbone: Model) -> Model:
    return _detector("solo", backbone, {"min_level": 2, "max_level": 6, "extra_from": "pool"})


class Weights(NamedTuple):
    """A detector of a model zoo, MMDetection's where nothing else is said."""

    model: Model
    file: str
    ap: float
    """AP on COCO's validation set, of boxes where it finds some and of masks otherwise, as the model zoo states it; 0
    where nobody does."""
    source: str = "mmdet"
    """A key of ``kdjax.weights.SOURCES``."""

    @property
    def two_stage(self) -> bool:
        """Whether it has proposals; papers choose their settings by that."""
        return model_class(self.model["name"]).has_proposals

    @property
    def tau(self) -> float:
        """The temperature of its attention, for DMKD and DFMSD [recon]."""
        return 0.8 if self.model["name"] == "fcos" else 0.5


RETINANET_R18 = Weights(_retinanet(R18), "retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth", 31.7)
RETINANET_R50 = Weights(_retinanet(R50), "retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth", 37.4)
RETINANET_R101 = Weights(_retinanet(R101), "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth", 38.9)
RETINANET_X101 = Weights(
    _retinanet(X101_64X4D), "retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth", 41.6
)
FCOS_R101 = Weights(
    _fcos(R101_CAFFE),
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
    40.8,
    source="mmdet_detectron",
)
FCOS_X101 = Weights(_fcos(X101_64X4D), "fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8.pth", 42.6)
GFL_R101 = Weights(_gfl(R101), "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth", 44.7)
FASTER_R101 = Weights(
    _two_stage("faster_rcnn", R101), "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth", 39.8
)
MASK_R101 = Weights(
    _two_stage("mask_rcnn", R101),
    "mask_rcnn_r101_fpn_2x_coco_bbox_mAP-0.408__segm_mAP-0.366_20200505_071027-14b391c7.pth",
    40.8,
)
REPPOINTS_X101 = Weights(
    _reppoints(X101_32X4D | {"deformable": True}),
    "reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco_20200329-f87da1ea.pth",
    44.2,
)
"""With deformable convolutions."""
CASCADE_X101_DCN = Weights(
    _two_stage("cascade_mask_rcnn", X101_32X4D | {"deformable": True}),
    "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth",
    47.3,
)
"""MGD's, with deformable convolutions."""
CASCADE_X101 = Weights(
    _two_stage("cascade_mask_rcnn", X101_64X4D),
    "cascade_mask_rcnn_x101_64x4d_fpn_20e_coco_20200512_161033-bdb5126a.pth",
    45.6,
)
"""MasKD's."""
SOLO_R50 = Weights(_solo(R50), "solo_r50_fpn_1x_coco_20210821_035055-2290a6b8.pth", 33.1)
SOLO_R101 = Weights(_solo(R101), "Solo_r101_3x.pth", 0.0)
"""MGD's own file, of a detector that no model zoo has."""


COCO = {
    "name": "tfds:coco/2017",
    "train_split": "train",
    "eval_split": "validation",
    "image_size": ((800, 1344), (1344, 800)),
    "short_sides": (800,),
    "long_side": 1333,
    "eval_padding": 32,
    "skip_empty": True,
    "max_objects": 100,
    "threads": 16,
}
"""The section ``data`` of all pairs."""

IMAGENET = {18: ("resnet18-f37072fd.pth", "torchvision"), 50: ("resnet50-0676ba61.pth", "torchvision")}
"""Files of backbones by depth, and their source."""
IMAGENET_CAFFE = ("resnet50_caffe-788b5fa3.pth", "mmdet_detectron")
"""Of the ResNet-50 that strides in its 1x1 convolutions."""


class Pair(NamedTuple):
    """A teacher and a student."""

    teacher: Weights
    student: Model
    weaker: Weights = RETINANET_R50
    """DFMSD's first teacher."""
    short_sides: tuple[int, ...] = (800,)
    """Of the images that are trained on: one of them each time."""
    epochs: int = 24
    """That the student is trained for: 12 are schedule 1x."""


PAIRS: dict[str, Pair] = {
    "retinanet_x101_r50": Pair(RETINANET_X101, _retinanet(R50)),
    "retinanet_r101_r50": Pair(RETINANET_R101, _retinanet(R50)),
    "retinanet_r50_r18": Pair(RETINANET_R50, _retinanet(R18), weaker=RETINANET_R18),
    "faster_rcnn_r101_r50": Pair(FASTER_R101, _two_stage("faster_rcnn", R50)),
    "mask_rcnn_r101_r50": Pair(MASK_R101, _two_stage("mask_rcnn", R50)),
    "cascade_mask_rcnn_x101_faster_rcnn_r50": Pair(CASCADE_X101_DCN, _two_stage("faster_rcnn", R50)),
    "cascade_mask_rcnn_x101_mask_rcnn_r50": Pair(CASCADE_X101_DCN, _two_stage("mask_rcnn", R50)),
    "fcos_r101_r50": Pair(FCOS_R101, _improved_fcos(R50_CAFFE), short_sides=(640, 800)),
    "reppoints_x101_r50": Pair(REPPOINTS_X101, _reppoints(R50)),
    "fcos_x101_retinanet_r50": Pair(FCOS_X101, _retinanet(R50)),
    "retinanet_r101_fcos_r50": Pair(RETINANET_R101, _fcos(R50_CAFFE)),
    "gfl_r101_r18": Pair(GFL_R101, _gfl(R18)),
    "gfl_r101_r50": Pair(GFL_R101, _gfl(R50)),
    "solo_r101_r50": Pair(SOLO_R101, _solo(R50), weaker=SOLO_R50, epochs=12),
}
"""Every pair by the name of its variant."""


_SHORT_SIDES = (640, 672, 704, 736, 768, 800)
DETECTRON2: dict[str, Pair] = {
    "retinanet_r101_r50": Pair(
        Weights(_retinanet(R101_CAFFE, extra_relu=True), "model_final_971ab9.pkl", 40.4, source="detectron2"),
        _retinanet(R50_CAFFE, extra_relu=True),
        short_sides=_SHORT_SIDES,
    ),
    "faster_rcnn_r101_r50": Pair(
        Weights(_two_stage("faster_rcnn", R101_CAFFE), "model_final_f6e8b1.pkl", 42.0, source="detectron2"),
        _two_stage("faster_rcnn", R50_CAFFE),
        short_sides=_SHORT_SIDES,
    ),
    "mask_rcnn_r101_r50": Pair(
        Weights(_two_stage("mask_rcnn", R101_CAFFE), "model_final_a3ec72.pkl", 42.9, source="detectron2"),
        _two_stage("mask_rcnn", R50_CAFFE),
        short_sides=_SHORT_SIDES,
    ),
    "fcos_r101_r50": Pair(
        Weights(_improved_fcos(R101_CAFFE, centerness_on_box=True), "FCOS_MS_R_101_2x.pth", 43.1, source="detectron2"),
        _improved_fcos(R50_CAFFE, centerness_on_box=True),
        short_sides=_SHORT_SIDES,
    ),
}
"""Pairs of ICD's, whose detectors are Detectron2's and AdelaiDet's."""


def as_detectron2(student: ConfigDict) -> None:
    """Turns the stage of a student into one of ICD's: Detectron2's backbone and schedule 1x of 90000 steps."""
    student.update(weights="R-50.pkl", source="detectron2", steps=90_000, eval_every=10_000)
    student.optimizer.update(
        milestones=(2 / 3, 8 / 9),
        warmup_steps=1000,
        warmup_factor=0.001,
        clip_norm=0.0,
        clip_value=1.0,
        bias_rate=1.0,
        decay_bias=True,
    )


EMBEDDED: dict[str, str] = {"shapes" if name == "retinanet" else name: name for name in SMALL_DETECTORS}
"""Variants on the embedded data, to the detector that teacher and student are."""


def start(
    variant: str, pairs: Mapping[str, Pair] = PAIRS, embedded: Mapping[str, str] = EMBEDDED
) -> tuple[ConfigDict, Pair | None]:
    """The config that a method's config goes on from, and the pair that its settings depend on.

    Args:
        variant: what stands behind the colon of ``--config=configs/<method>.py:<variant>``: a key of ``embedded``, or
            of ``pairs``, which are on COCO; with ":tiny" behind it, two steps of it on the embedded data set. "tiny" is
            "shapes:tiny".
        pairs: by name.
        embedded: as :data:`EMBEDDED`.

    Raises:
        UserError: for another variant.
    """
    name = "shapes" if variant == "tiny" else variant.removesuffix(":tiny")
    if name in embedded:
        return base_config(embedded[name]), None
    if name not in pairs:
        raise UserError(
            f"There is no variant {variant!r} of this config; choose {', '.join(embedded)}, tiny, or a pair: "
            f"{', '.join(pairs)}."
        )
    pair = pairs[name]
    config = base_config()
    config.data.update(COCO)
    config.data.update(short_sides=pair.short_sides, resize=SOURCES[pair.teacher.source].resize)
    config.eval_batch_size = 16
    config.teacher = taken_over(pair.teacher)
    config.student = _trained(pair.student)
    config.data.masks = learns_masks(config.student.model)
    config.student.teacher = "teacher"
    config.student.model.neck.xavier = SOURCES[pair.teacher.source].resize == "mmdet"
    set_schedule(config.student, epochs=pair.epochs)
    return config, pair


def finish(config: ConfigDict, variant: str) -> ConfigDict:
    """The config of the variant, when the method is set: made tiny where the variant says so."""
    return tiny(config) if variant.endswith("tiny") else config


def taken_over(weights: Weights) -> ConfigDict:
    """The stage of a detector whose weights are taken over as they are; given steps, it is trained on from there."""
    stage = _as_published(weights.model)
    stage.update(weights=weights.file, source=weights.source, published=weights.ap, steps=0)
    return stage


def _caffe(model: Model) -> bool:
    return model["backbone"].get("style") == "caffe"


def set_schedule(stage: ConfigDict, epochs: int) -> None:
    """Trains a stage for 12 epochs (schedule 1x) or 24 (2x), as MMDetection does."""
    stage.steps = epochs * EPOCH
    stage.eval_every = 2 * EPOCH


def _trained(model: Model) -> ConfigDict:
    """The stage of a detector that is trained, computing in bfloat16, from a backbone that knows ImageNet."""
    stage = _as_published(model)
    depth = model["backbone"]["depth"]
    file, source = IMAGENET_CAFFE if _caffe(model) else IMAGENET[depth]
    stage.update(weights=file, source=source, dtype="bfloat16")
    return stage


def _as_published(model: Model) -> ConfigDict:
    """The stage of a detector with the optimiser, batch and frozen layers that MMDetection trains with.

    Of detectors with a Caffe backbone the scales and shifts of batch norm stay as they are too.
    """
    stage = base_stage(ConfigDict(model))
    blocks = 2 if model["backbone"]["depth"] == 18 else 3
    frozen = "conv1", "bn1", *(f"layer1_{block}" for block in range(blocks)), *(["*bn*"] if _caffe(model) else [])
    stage.update(
        freeze=tuple(f"student/backbone/{part}" for part in frozen),
        batch_size=16,
        base_batch=16,
        checkpoint_every=2500,
        log_every=50,
    )
    stage.loss_weights = ConfigDict()
    stage.optimizer.update(
        name="sgd",
        learning_rate=0.02 if model_class(model["name"]).has_proposals else 0.01,
        schedule="step",
        warmup_steps=500,
        momentum=0.9,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        clip_norm=0.0,
    )
    if model["name"] == "fcos":
        stage.optimizer.update(clip_norm=35.0, bias_rate=2.0, decay_bias=False, warmup_factor=1 / 3)
    return stage
