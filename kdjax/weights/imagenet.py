"""The classes of ImageNet: ids of WordNet, in whose order all files that were trained on it count them."""

import re
from collections.abc import Sequence

_CLASSES = 1000


def are_imagenet(names: Sequence[str]) -> bool:
    """Whether names of classes are the ids of ImageNet's 1000, as its data sets have them, in their order.

    >>> are_imagenet([f"n{k:08}" for k in range(1000)]), are_imagenet(["tench", "goldfish"])
    (True, False)
    """
    ids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    return len(names) == _CLASSES and ids and list(names) == sorted(names)
