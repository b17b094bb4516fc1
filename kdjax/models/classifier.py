"""Classifiers of images: a backbone, the mean of its last map, and one linear layer."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import cross_entropy, masked_mean, valid_positions
from kdjax.models.mobilenet import MobileNetV1, MobileNetV2
from kdjax.models.network import Network, Sections
from kdjax.options import number
from kdjax.types import Features, Labels, Logits, Sampling, Terms


class Classifier(Network):
    """A backbone, the mean of its last map inside the image, dropout, and one linear layer.

    Its features are all maps of the backbone; predictions are :class:`kdjax.types.Logits` of (N, K).
    """

    dropout: Annotated[
        float,
        number(0, 1, below=True),
        "Share of the mean features that training hides, each channel of each image by a draw of its own.",
    ] = 0.0
    label_smoothing: Annotated[
        float, number(0, 1), "e of the target (1 - e) one_hot + e / classes that training learns."
    ] = 0.0

    task: ClassVar[str] = "classification"
    terms: ClassVar[tuple[str, ...]] = ("cls",)
    """Names of the loss terms."""
    class_axis: ClassVar[Mapping[str, str]] = {"head": "fastest"}

    def setup(self) -> None:
        """Makes the linear layer; the backbone comes from outside."""
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)

    def heads(
        self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None
    ) -> Logits:
        """{"c5": (N, H, W, C), ...} to the logits (N, K); ``sampling`` is given in training alone, for the dropout."""
        level = max(self.strides, key=self.strides.__getitem__)
        x = features[level]
        where = None
        if image_size is not None:
            where = valid_positions(image_size, (x.shape[1], x.shape[2]), self.strides[level])[..., None]
        mean = masked_mean(x, where, axis=(1, 2))
        if sampling is not None and self.dropout:
            mean = _dropped(mean, self.dropout, sampling.keys)
        return Logits(self.head(mean.astype(self.dtype)))

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> Logits:
        """As a teacher: its logits; of one image there is one place."""
        del predictions
        return self.heads(features, image_size)

    @nn.nowrap
    def loss(self, predictions: Logits, targets: Labels, image_size: jax.Array) -> Terms:
        """{"cls": the mean over images of :func:`kdjax.losses.cross_entropy`, by their shares where two are mixed}."""
        del image_size
        entropy = functools.partial(cross_entropy, predictions.main, smoothing=self.label_smoothing)
        loss = entropy(targets.classes)
        if targets.other is not None and targets.share is not None:
            loss += targets.share * (entropy(targets.other) - loss)
        return {"cls": jnp.mean(loss)}

    @nn.nowrap
    def decode(self, predictions: Logits, image_size: jax.Array) -> jax.Array:
        """The probabilities of the classes, (N, K) float32."""
        del image_size
        return jax.nn.softmax(predictions.main.astype(jnp.float32))


def _dropped(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """(N, C) with each entry 0 with probability ``rate``, else divided by ``1 - rate``; each image draws by its key."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


class MobileNetV1Classifier(Classifier):
    """A MobileNet (Howard et al., 2017)."""

    parts: ClassVar[Mapping[str, type[nn.Module]]] = {"backbone": MobileNetV1}
    tiny: ClassVar[Sections] = {"backbone": {"width": 0.125}}


class MobileNetV2Classifier(Classifier):
    """A MobileNetV2 (Sandler et al., 2018) with its last convolution, as torchvision has it."""

    dropout: Annotated[
        float,
        number(0, 1, below=True),
        "Share of the mean features that training hides, each channel of each image by a draw of its own.",
    ] = 0.2

    parts: ClassVar[Mapping[str, type[nn.Module]]] = {"backbone": MobileNetV2}
    part_defaults: ClassVar[Sections] = {"backbone": {"last": True}}
    tiny: ClassVar[Sections] = {"backbone": {"width": 0.125}}
