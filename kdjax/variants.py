"""What stands behind the colon of ``--config=configs/<method>.py:<variant>``, whatever the task.

A method's config goes on from :func:`start` and ends with :func:`kdjax.pairs.finish`.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kdjax import cityscapes, imagenet, pairs
from kdjax.config import base_config
from kdjax.errors import UserError

_OTHERS = {"segmentation": cityscapes, "classification": imagenet}
"""Tasks besides detection, whose names are the variants on embedded data too, to what knows their pairs."""

TASKS = ("detection", *_OTHERS)


def start(variant: str, tasks: Sequence[str] = TASKS) -> tuple[ConfigDict, Any]:
    """The config that a method's config goes on from, and the pair that its settings depend on, None if embedded.

    Args:
        variant: of one of the tasks; with ":tiny" behind it, two steps of it on embedded data.
        tasks: those that the method fits.

    Returns:
        the config, whose ``task`` says which one it is, and a pair as that task's module has them.

    Raises:
        UserError: there is no such variant.
    """
    name = variant.removesuffix(":tiny")
    known = {task: data for task, data in _OTHERS.items() if task in tasks}
    for task, data in known.items():
        if name in data.VARIANTS:
            config, pair = base_config(), data.PAIRS.get(name)
            config.task = task
            data.set_pair(config, pair) if pair else data.set_embedded(config)
            return config, pair
    if "detection" in tasks:
        return pairs.start(variant)
    choices = ", ".join(choice for data in known.values() for choice in data.VARIANTS)
    raise UserError(f"There is no variant {variant!r} of this config; choose one of {choices}.")
