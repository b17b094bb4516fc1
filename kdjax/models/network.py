"""What the models of all tasks share: a backbone, how images become its input, and the facts that a model states."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, RGB, normalize
from kdjax.models.resnet import ResNet
from kdjax.options import COLOUR, FLAG, SPREAD, check_fields
from kdjax.types import Features, PairedSides, Sampling

Sections = Mapping[str, Mapping[str, Any]]
"""Fields of a model's parts by the section of a config that they stand in: {"backbone": {"depth": 10}, ...}."""


class Network(nn.Module, kw_only=True):
    """A backbone. A model adds its heads, what they learn from targets, and what it finds.

    That is ``heads`` and ``decode``, which this class calls, and ``loss``, ``heads_at`` and ``terms``, which the
    distillation step does. What else others must know of a model it states as a fact of its class, so that nobody asks
    for its name.

    Attributes:
        backbone: normalised images (N, H, W, 3) to named maps; takes ``train`` and states their ``strides``.
        num_classes: number of classes, without a background.
        axis_name: mapped axis over which counts are averaged; None outside of one.
        dtype: of the computation; parameters and losses are float32.
    """

    backbone: nn.Module
    num_classes: int
    pixel_mean: Annotated[RGB, COLOUR, "Of red, green and blue on the scale of 0 to 255."] = IMAGENET_MEAN
    pixel_std: Annotated[RGB, SPREAD, "Likewise."] = IMAGENET_STD
    frozen_norm: Annotated[
        bool,
        FLAG,
        "Whether batch norm uses its running statistics in training too and never updates them.",
    ] = False
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    task: ClassVar[str]
    """What it is for."""
    parts: ClassVar[Mapping[str, type[nn.Module]]] = {"backbone": ResNet}
    """The sections of its config that are parts of it, in the order in which images go through them, and the classes
    that declare their options. The options of the model itself are its section "head"."""
    part_defaults: ClassVar[Sections] = {}
    """Where its parts differ from their own defaults."""
    tiny: ClassVar[Sections] = {"backbone": {"depth": 10, "width": 0.125}}
    """What makes it so small that a step takes a moment, for checks of an installation or a config."""
    has_proposals: ClassVar[bool] = False
    """Whether its heads look at regions that it proposes itself: a detector of two stages."""
    decisive: ClassVar[tuple[str, ...]] = ()
    """Options of its heads that decide what their arrays mean, though no shape shows it."""
    class_axis: ClassVar[Mapping[str, str]] = {}
    """Names of the layers that have outputs for each class, and whether the class varies "fastest" among those, as
    where every anchor has one of each class, or "slowest". Outputs of no class, such as a background, are last."""
    still: ClassVar[tuple[str, ...]] = ()
    """Names in the paths of parameters that rightly get no gradient from any term."""

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """Options of the model, by name, that suit objects of these sizes in pixels; {} where none depends on them."""
        del sizes
        return {}

    @property
    def learns_masks(self) -> bool:
        """Whether its targets must have masks."""
        return False

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each map of the features to the next, fine to coarse."""
        return self.backbone.strides

    @nn.nowrap
    def paired_sides(
        self, predictions: Any, theirs: Any, targets: Any, image_size: jax.Array
    ) -> dict[str, PairedSides]:
        """The distributions of the sides of boxes in predictions and in a teacher's, and how much each place counts.

        Args:
            predictions: its own.
            theirs: what the teacher's heads say.
            targets: what the images show.
            image_size: (N, 2) height and width of the images without their padding.

        Raises:
            UserError: the two have no such distributions, or other grids.
        """
        del predictions, theirs, targets, image_size
        raise UserError(
            f"A {type(self).__name__} does not predict distributions of where the sides of boxes are, which this "
            "method compares: take gfl for the student and for the teacher."
        )

    @nn.nowrap
    def preprocess(self, images: jax.Array, image_size: jax.Array) -> jax.Array:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to float32 ones, exact zeros in the padding."""
        return normalize(images, image_size, self.pixel_mean, self.pixel_std)

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to the backbone's maps; ``train`` updates the batch norm unless frozen."""
        return self.backbone(images, train=train and not self.frozen_norm)

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array | None = None,
        train: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[Features, Any]:
        """Normalised images (N, H, W, 3) to the features and the predictions of ``heads``."""
        features = self.features(images, train)
        return features, self.heads(features, image_size, sampling)

    def predict(self, images: jax.Array, image_size: jax.Array) -> Any:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to what is found: everything that inference is."""
        _, predictions = self(self.preprocess(images, image_size), image_size)
        return self.decode(predictions, image_size)
