"""What all detectors share: the way from images to a pyramid of features, and from there to detections."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import flax.linen as nn
import jax

from kdjax.errors import UserError
from kdjax.models.fpn import FPN
from kdjax.models.network import Network, Sections
from kdjax.models.resnet import ResNet
from kdjax.options import number, whole
from kdjax.types import Detections, Features


class Detector(Network, kw_only=True):
    """A backbone and a neck. A detector adds its heads, what they learn from targets, and what they find.

    Besides the attributes of :class:`kdjax.models.network.Network` it has:

    Attributes:
        neck: the backbone's maps to a pyramid of features; states their ``strides``.
    """

    neck: nn.Module
    score_threshold: Annotated[float, number(0, 1), "Candidates scored above it go to non-maximum suppression."] = 0.05
    iou_threshold: Annotated[
        float,
        number(0, 1),
        "Overlap at which non-maximum suppression drops the lower-scored box.",
    ] = 0.5
    max_detections: Annotated[int, whole(1), "D, how many boxes an image returns at most."] = 100

    task: ClassVar[str] = "detection"
    parts: ClassVar[Mapping[str, type[nn.Module]]] = {"backbone": ResNet, "neck": FPN}
    tiny: ClassVar[Sections] = {**Network.tiny, "neck": {"channels": 16, "max_level": 6}}

    def __post_init__(self) -> None:
        if (stride := getattr(self.backbone, "output_stride", 32)) != 32:
            raise UserError(
                f"A detector's pyramid takes maps of strides 4, 8, 16 and 32, but the backbone's output_stride is "
                f"{stride}; leave it out."
            )
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each level to the next, fine to coarse."""
        return self.neck.strides

    @nn.nowrap
    def ordered(self, maps: Features) -> list[str]:
        """The levels of maps, fine to coarse."""
        return sorted(maps, key=self.strides.__getitem__)

    @nn.nowrap
    def sizes(self, maps: Features) -> dict[str, tuple[int, int]]:
        """Level to the height and width of its map, fine to coarse."""
        return {level: (maps[level].shape[1], maps[level].shape[2]) for level in self.ordered(maps)}

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to the neck's pyramid; ``train`` updates the batch norm unless frozen."""
        return self.neck(super().features(images, train))

    def detect(self, images: jax.Array, image_size: jax.Array) -> Detections:
        """The name of :meth:`predict` in version 0.1."""
        return self.predict(images, image_size)
