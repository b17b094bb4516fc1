"""What is done with a model and its variables: the one place that names a model's methods by strings.

A misspelt string would be found when it runs; here each stands once, and a contract test looks for them on every model.
"""

from typing import Any

import jax

from kdjax.types import Features, Model, Sampling


def features(model: Model, variables: Any, images: jax.Array) -> Features:
    """The features of preprocessed images (N, H, W, 3), as in inference."""
    return model.apply(variables, images, method="features")


def forward(
    model: Model, variables: Any, images: jax.Array, image_size: jax.Array, sampling: Sampling
) -> tuple[Features, Any, Any]:
    """Features and predictions of preprocessed images in training, and the new batch statistics."""
    (maps, predictions), updates = model.apply(
        variables, images, image_size, train=True, sampling=sampling, mutable=["batch_stats"]
    )
    return maps, predictions, updates.get("batch_stats", variables["batch_stats"])


def heads(model: Model, variables: Any, maps: Features, image_size: jax.Array, sampling: Sampling) -> Any:
    """The predictions from other features, in training."""
    return model.apply(variables, maps, image_size, sampling, method="heads")


def heads_at(model: Model, variables: Any, maps: Features, predictions: Any, image_size: jax.Array) -> Any:
    """What a teacher's heads say in the places of a student's predictions."""
    return model.apply(variables, maps, predictions, image_size, method="heads_at")


def predict(model: Model, variables: Any, images: jax.Array, image_size: jax.Array) -> Any:
    """Inference, from uint8 images to what the task is about."""
    return model.apply(variables, images, image_size, method="predict")


def init_features(model: Model, key: jax.Array, images: jax.Array) -> Features:
    """The features of preprocessed images with fresh variables, for their shapes."""
    return model.init_with_output(key, images, method="features")[0]


def init_heads_at(model: Model, key: jax.Array, maps: Features, predictions: Any, image_size: jax.Array) -> Any:
    """What :func:`heads_at` gives with fresh variables, for its shapes."""
    return model.init_with_output(key, maps, predictions, image_size, method="heads_at")[0]
