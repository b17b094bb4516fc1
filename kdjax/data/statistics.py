"""What the boxes of a data set look like, class by class."""

import jax.numpy as jnp
import numpy as np

from kdjax.data.sources import Source
from kdjax.losses import ClassStatistics, uniform_statistics


def class_statistics(source: Source) -> ClassStatistics:
    """Measures classes and sizes of all boxes of a source, crowds left out, without decoding an image.

    Args:
        source: usually the training set.

    Returns:
        the share of each class, and the mean and standard deviation of its boxes' width and height relative to their
        image, float32. A class without boxes has the size of :func:`kdjax.losses.uniform_statistics`; a source without
        boxes is described by it altogether.
    """
    sizes, labels = [np.zeros((0, 2))], [np.zeros(0, np.int32)]
    for index in range(len(source)):
        objects = source.objects(index)
        size = (objects.boxes[:, 2:] - objects.boxes[:, :2]) / np.array(objects.size[::-1], np.float32)
        sizes.append(size[~objects.crowd])
        labels.append(objects.labels[~objects.crowd])
    size, label = np.concatenate(sizes), np.concatenate(labels)
    default = uniform_statistics(len(source.class_names))
    if not len(label):
        return default
    mean, deviation = np.array(default.mean), np.array(default.deviation)
    for found in np.unique(label):
        mean[found], deviation[found] = size[label == found].mean(0), size[label == found].std(0)
    count = np.bincount(label, minlength=len(source.class_names))
    return ClassStatistics(*(jnp.asarray(x, jnp.float32) for x in (count / count.sum(), mean, deviation)))
