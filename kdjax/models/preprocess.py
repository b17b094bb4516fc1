"""What every detector does to images before its backbone."""

import jax
import jax.numpy as jnp

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)


def normalize(images: jax.Array, image_size: jax.Array, mean: RGB, std: RGB) -> jax.Array:
    """``(image - mean) / std`` inside the images and exact zeros in the padding.

    Args:
        images: (N, H, W, 3) uint8, RGB, padded at the bottom and right.
        image_size: (N, 2) int, height and width without the padding.
        mean: of red, green and blue, on the scale of 0 to 255.
        std: likewise.

    Returns:
        (N, H, W, 3) float32.
    """
    _, height, width, _ = images.shape
    rows = jnp.arange(height)[None] < image_size[:, :1]
    columns = jnp.arange(width)[None] < image_size[:, 1:]
    inside = rows[:, :, None] & columns[:, None, :]
    mean_, std_ = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (mean, std))
    return jnp.where(inside[..., None], (images.astype(jnp.float32) - mean_) / std_, 0.0)
