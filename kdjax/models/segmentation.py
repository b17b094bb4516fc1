"""Semantic segmentation on dilated backbones: PSPNet (Zhao et al., 2017) and DeepLabV3 (Chen et al., 2017).

Three families of networks carry these names: MMSegmentation's, which the defaults are, CIRKD's (MasKD's) and
torchvision's. Where they differ and no shape of an array shows it, a field says which it is. The file is long because
both heads, pooling and sliding windows stand where the two networks that share them do.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.losses.features import einsum
from kdjax.losses.segmentation import pixel_logits, resize, segmentation_loss
from kdjax.models.mobilenet import MobileNetV2
from kdjax.models.network import Network, Sections
from kdjax.models.norm import ConvNorm
from kdjax.options import FLAG, Rule, choice, number, whole
from kdjax.types import IGNORED, Features, Labels, Logits, Sampling, Terms

POOLED = (1, 2, 3, 6)
"""Cells along each side of PSPNet's four pooled maps."""

_AUXILIARY_DROPOUT = 0.1
_PROJECTION_DROPOUT = 0.5

_RATES = Rule(
    "a tuple of whole numbers of at least 1",
    lambda value: isinstance(value, tuple) and len(value) > 0 and all(type(x) is int and x >= 1 for x in value),
)
_EXTENT = Rule(
    "() or height and width in pixels, each at least 1",
    lambda value: isinstance(value, tuple) and len(value) in (0, 2) and all(type(x) is int and x >= 1 for x in value),
)


class Segmenter(Network, kw_only=True):
    """A backbone and two heads: one on its last map, and one on the map before, which is there for training alone.

    Features are the backbone's maps, ``"decode"``, what enters the classifier of the main head, and ``"auxiliary"``,
    likewise of the other one where there is one. A segmenter says what makes the former of C5 (``decoder``).
    """

    channels: Annotated[int, whole(1), "Of the main head's maps."] = 512
    auxiliary_channels: Annotated[
        int,
        whole(0),
        "Of the auxiliary head, which learns from C4; 0 for none.",
    ] = 256
    align_corners: Annotated[
        bool,
        FLAG,
        "Whether maps are resized with the centres of their corners aligned (CIRKD's networks), or their edges "
        "(MMSegmentation's, torchvision's).",
    ] = False
    dropout: Annotated[
        float,
        number(0, 1, below=True),
        "Share of what enters the main classifier in training that is dropped; of the auxiliary one it is 0.1.",
    ] = 0.1
    drop: Annotated[
        str,
        choice("channels", "elements"),
        'What is dropped: whole "channels" of an image (MMSegmentation) or single "elements" (CIRKD, torchvision).',
    ] = "channels"
    average_over: Annotated[
        str,
        choice("all", "labelled"),
        'Pixels by whose number the loss is divided: "all" (MMSegmentation) or "labelled" ones (CIRKD, torchvision).',
    ] = "all"
    window: Annotated[
        tuple[int, ...],
        _EXTENT,
        "Height and width of the windows that slide over an image in inference, whose logits are averaged; () for the "
        "whole image at once.",
    ] = ()
    window_stride: Annotated[tuple[int, ...], _EXTENT, "Pixels from one window to the next; () for the window's."] = ()

    task: ClassVar[str] = "segmentation"
    part_defaults: ClassVar[Sections] = {"backbone": {"stem": "v1c", "output_stride": 8}}
    tiny: ClassVar[Sections] = {**Network.tiny, "head": {"channels": 16, "auxiliary_channels": 8}}
    class_axis: ClassVar[Mapping[str, str]] = {"classifier": "fastest", "auxiliary_classifier": "fastest"}
    decisive: ClassVar[tuple[str, ...]] = ("align_corners",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes > IGNORED:
            raise UserError(f"A segmenter tells at most {IGNORED} classes apart, and these are {self.num_classes}.")
        if self.window_stride and not self.window:
            raise UserError(f"window_stride is {self.window_stride}, but there is no window; set that too.")
        if any(step > side for step, side in zip(self.window_stride, self.window, strict=False)):
            raise UserError(
                f"window_stride is {self.window_stride} and window {self.window}, which leaves out pixels between "
                "windows; the stride must not be larger."
            )

    @nn.nowrap
    def decoder(self) -> nn.Module:
        """What makes (N, h, w, channels) of C5: called with it, ``train`` and ``drop``, as :class:`ASPP` is."""
        raise NotImplementedError

    def setup(self) -> None:
        """Makes the heads."""
        self.head = SegmentationHead(
            self.decoder(), self.num_classes, self.auxiliary_channels, axis_name=self.axis_name, dtype=self.dtype
        )

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each map of the features to the next, fine to coarse."""
        maps = super().strides
        return {**maps, "decode": maps["c5"], **({"auxiliary": maps["c4"]} if self.auxiliary_channels else {})}

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of its loss terms."""
        return ("seg", "auxiliary") if self.auxiliary_channels else ("seg",)

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to the backbone's maps and the heads'; ``train`` updates the batch norm.

        Nothing is dropped here. Pooling is over the whole map, the padding included, as the originals pool: they pad
        before the network where images of a batch differ.
        """
        return self._features(images, train, None)

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array | None = None,
        train: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[Features, Logits]:
        """Normalised images (N, H, W, 3) to the features and the logits; in training (``sampling``) with dropout."""
        features = self._features(images, train, sampling)
        return features, self.heads(features, image_size, sampling)

    def _features(self, images: jax.Array, train: bool, sampling: Sampling | None) -> Features:
        maps = super().features(images, train)
        drop = functools.partial(self._drop, sampling, 0, _PROJECTION_DROPOUT)
        return {**maps, **self.head.features(maps, train and not self.frozen_norm, drop)}

    @nn.nowrap
    def _drop(self, sampling: Sampling | None, place: int, share: float, x: jax.Array) -> jax.Array:
        """(N, h, w, C) without a share of its channels or elements, in a ``place`` that draws for itself."""
        if sampling is None or not share:
            return x
        shape = (1, 1, x.shape[-1]) if self.drop == "channels" else x.shape[1:]

        def keep(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - share, shape)

        return jnp.where(jax.vmap(keep)(sampling.keys), x / (1 - share), 0)

    def heads(
        self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None
    ) -> Logits:
        """The features to logits (N, h, w, K); of an image the same is dropped on any number of devices."""
        del image_size
        drop = functools.partial(self._drop, sampling)
        entering = {"decode": drop(1, self.dropout, features["decode"])}
        if self.auxiliary_channels:
            entering["auxiliary"] = drop(2, _AUXILIARY_DROPOUT, features["auxiliary"])
        return self.head.logits(entering)

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> Logits:
        """What the heads say, without dropout, wherever a student predicted something."""
        del predictions
        return self.heads(features, image_size)

    @nn.nowrap
    def loss(self, predictions: Logits, targets: Labels, image_size: jax.Array) -> Terms:
        """The cross-entropy of each head, a float32 scalar, see :func:`kdjax.losses.segmentation.segmentation_loss`."""
        del image_size  # Pixels in the padding are ignored ones.
        loss = functools.partial(
            segmentation_loss,
            classes=targets.classes,
            align_corners=self.align_corners,
            labelled_only=self.average_over == "labelled",
            axis_name=self.axis_name,
        )
        return {
            term: loss(logits)
            for term, logits in zip(("seg", "auxiliary"), predictions, strict=True)
            if logits is not None
        }

    def predict(self, images: jax.Array, image_size: jax.Array) -> jax.Array:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to the class of every pixel: (N, H, W) uint8."""
        logits = self.pixel_logits(self.preprocess(images, image_size), image_size)
        return jnp.argmax(logits, axis=1).astype(jnp.uint8)

    def pixel_logits(self, images: jax.Array, image_size: jax.Array) -> jax.Array:
        """Normalised images (N, H, W, 3) of size ``image_size`` (N, 2) to logits (N, K, H, W) float32 of all pixels.

        Of the whole image, or the mean over all windows that a pixel is in: windows begin at multiples of the stride,
        and the last of a row or a column is moved to end with the image.
        """
        if not self.window:
            return self._logits_at_once(images)
        window = min(self.window[0], images.shape[1]), min(self.window[1], images.shape[2])
        starts, valid = window_places(images.shape[1:3], image_size, window, self.window_stride or self.window)
        apart, variables = self.unbind()  # Layers may not be called in a loop of JAX's, functions may.

        def add(sums: tuple[jax.Array, jax.Array], place: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            start, valid = place
            crops = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (*window, 3)))(images, start)
            logits: Any = apart.apply(variables, crops, method="_logits_at_once")
            weight = jnp.broadcast_to(valid[:, None, None, None], (images.shape[0], 1, *window)).astype(jnp.float32)

            def put(total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
                before = jax.lax.dynamic_slice(total, (0, *at), part.shape)
                return jax.lax.dynamic_update_slice(total, before + part, (0, *at))

            parts = weight * logits, weight
            return tuple(jax.vmap(put)(total, part, start) for total, part in zip(sums, parts, strict=True)), None

        shape = images.shape[1:3]
        nothing = jnp.zeros((images.shape[0], self.num_classes, *shape)), jnp.zeros((images.shape[0], 1, *shape))
        (total, count), _ = jax.lax.scan(add, nothing, (starts, valid))
        return total / jnp.maximum(count, 1)  # No window is in the padding.

    def _logits_at_once(self, images: jax.Array) -> jax.Array:
        logits = self.heads(self.features(images)).main
        return pixel_logits(logits, images.shape[1:3], align_corners=self.align_corners)


class PSPNet(Segmenter):
    """The pyramid scene parsing network."""

    @nn.nowrap
    def decoder(self) -> nn.Module:
        """Pooled maps beside C5."""
        return PyramidPooling(self.channels, self.align_corners, axis_name=self.axis_name, dtype=self.dtype)


class DeepLabV3(Segmenter):
    """DeepLabV3: convolutions of several dilations side by side."""

    dilations: Annotated[tuple[int, ...], _RATES, "Of the 3x3 convolutions side by side."] = (12, 24, 36)
    projection: Annotated[
        bool,
        FLAG,
        "Whether a 1x1 convolution, with half of its elements dropped in training, stands between what is side by side "
        "and the last 3x3 convolution (CIRKD, torchvision), or nothing (MMSegmentation).",
    ] = False

    decisive: ClassVar[tuple[str, ...]] = (*Segmenter.decisive, "dilations")

    @nn.nowrap
    def decoder(self) -> nn.Module:
        """Atrous spatial pyramid pooling."""
        return ASPP(
            self.channels,
            self.dilations,
            self.projection,
            self.align_corners,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )


class DeepLabV3MobileNetV2(DeepLabV3):
    """DeepLabV3 on MobileNetV2, as MasKD trains it."""

    parts: ClassVar[Mapping[str, type[nn.Module]]] = {"backbone": MobileNetV2}
    part_defaults: ClassVar[Sections] = {"backbone": {"output_stride": 8}}
    tiny: ClassVar[Sections] = {**Segmenter.tiny, "backbone": {"width": 0.125}}


Drop = Callable[[jax.Array], jax.Array]


class SegmentationHead(nn.Module):
    """What makes logits of a backbone's maps.

    Attributes:
        decoder: see :meth:`Segmenter.decoder`.
        num_classes: K.
        auxiliary_channels: of the head on C4; 0 for none.
    """

    decoder: nn.Module
    num_classes: int
    auxiliary_channels: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Makes the layers."""
        conv = functools.partial(
            nn.Conv, self.num_classes, (1, 1), kernel_init=nn.initializers.normal(0.01), dtype=self.dtype
        )
        self.classifier = conv()
        if self.auxiliary_channels:
            self.auxiliary = ConvNorm(self.auxiliary_channels, 3, axis_name=self.axis_name, dtype=self.dtype)
            self.auxiliary_classifier = conv()

    def features(self, maps: Features, train: bool, drop: Drop) -> Features:
        """A backbone's maps to what enters the classifiers, "decode" and "auxiliary"."""
        entering = {"decode": self.decoder(maps["c5"], train, drop)}
        if self.auxiliary_channels:
            entering["auxiliary"] = nn.relu(self.auxiliary(maps["c4"], train))
        return entering

    def logits(self, entering: Features) -> Logits:
        """What enters the classifiers to logits (N, h, w, K)."""
        auxiliary = self.auxiliary_classifier(entering["auxiliary"]) if self.auxiliary_channels else None
        return Logits(self.classifier(entering["decode"]), auxiliary)


class PyramidPooling(nn.Module):
    """PSPNet's head: means over 1, 4, 9 and 36 cells beside the map itself, then a 3x3 convolution."""

    channels: int
    align_corners: bool
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, drop: Drop) -> jax.Array:
        """(N, h, w, C) to (N, h, w, channels); nothing is dropped."""
        del drop
        layer = functools.partial(ConvNorm, self.channels, axis_name=self.axis_name, dtype=self.dtype)
        parts = [x]
        for cells in POOLED:
            pooled = nn.relu(layer(1, name=f"pool_{cells}")(adaptive_pool(x, cells), train))
            parts.append(resize(pooled, x.shape[1:3], align_corners=self.align_corners))
        return nn.relu(layer(3, name="bottleneck")(jnp.concatenate(parts, axis=-1), train))


class ASPP(nn.Module):
    """DeepLabV3's head: a 1x1 convolution, dilated 3x3 ones and the mean, side by side, then a 3x3 convolution."""

    channels: int
    dilations: tuple[int, ...]
    projection: bool
    align_corners: bool
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, drop: Drop) -> jax.Array:
        """(N, h, w, C) to (N, h, w, channels); ``drop`` is done to what the projection makes."""
        layer = functools.partial(ConvNorm, self.channels, axis_name=self.axis_name, dtype=self.dtype)
        parts = [layer(1, name="aspp_0")(x, train)]
        for index, dilation in enumerate(self.dilations, start=1):
            parts.append(layer(3, dilation=dilation, name=f"aspp_{index}")(x, train))
        pooled = layer(1, name="pool")(adaptive_pool(x, 1), train)
        parts.append(jnp.broadcast_to(pooled, parts[0].shape))  # What resizing a single position comes to.
        x = nn.relu(jnp.concatenate(parts, axis=-1))
        if self.projection:
            x = drop(nn.relu(layer(1, name="projection")(x, train)))
        return nn.relu(layer(3, name="bottleneck")(x, train))


def window_places(
    canvas: tuple[int, ...], image_size: jax.Array, window: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Where windows slide over images: at multiples of the stride, the last moved to end with the image.

    >>> starts, valid = window_places((8, 9), jnp.array([[8, 9], [8, 4]]), (8, 4), (8, 3))
    >>> starts[:, :, 1].T.tolist(), valid.T.tolist()  # Columns; the second image needs one window alone.
    ([[0, 3, 5], [0, 0, 0]], [[True, True, True], [True, False, False]])

    Args:
        canvas: height H and width W of the padded images.
        image_size: (N, 2) height and width without the padding.
        window: height and width of a window, at most those of the canvas.
        stride: from one window to the next, down and right.

    Returns:
        the first row and column of each window in each image, (G, N, 2) int32, and which windows an image has,
        (G, N) bool: as many as a canvas of its size would have.
    """

    def along(axis: int) -> tuple[jax.Array, jax.Array]:
        index = jnp.arange(-(-max(canvas[axis] - window[axis], 0) // stride[axis]) + 1)[:, None]
        room = jnp.maximum(image_size[None, :, axis] - window[axis], 0)
        return jnp.minimum(index * stride[axis], room), index <= -(-room // stride[axis])

    (rows, valid_rows), (columns, valid_columns) = along(0), along(1)
    valid = valid_rows[:, None] & valid_columns[None]
    starts = jnp.stack(jnp.broadcast_arrays(rows[:, None], columns[None]), axis=-1).astype(jnp.int32)
    return starts.reshape(-1, *starts.shape[2:]), valid.reshape(-1, valid.shape[2])


def adaptive_pool(x: jax.Array, cells: int) -> jax.Array:
    """Means over ``cells`` x ``cells`` regions, which overlap where their number does not divide the map's size.

    Cell i averages rows ``floor(i h / cells)`` to ``ceil((i + 1) h / cells) - 1``, as PyTorch's adaptive pooling does.

    >>> adaptive_pool(jnp.arange(3.0).reshape(1, 3, 1, 1), 2)[0, :, 0, 0]
    Array([0.5, 1.5], dtype=float32)

    Args:
        x: (N, h, w, C), any float dtype, which the result has.
        cells: k, along each side.

    Returns:
        (N, k, k, C).
    """
    rows, columns = (jnp.asarray(_cells(size, cells)) for size in x.shape[1:3])
    return einsum("ih,jw,nhwc->nijc", rows, columns, x.astype(jnp.float32)).astype(x.dtype)


def _cells(size: int, cells: int) -> np.ndarray:
    """The share of every position of a line in the mean of each cell: (cells, size) float32."""
    index, place = np.arange(cells)[:, None], np.arange(size)
    inside = (index * size // cells <= place) & (place < -(-(index + 1) * size // cells))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
