"""The tasks: what differs between them outside of models, one file each; see :class:`kdjax.types.Task`."""

from typing import Any

from kdjax.options import chosen
from kdjax.tasks.classification import Classification
from kdjax.tasks.detection import Detection
from kdjax.tasks.segmentation import Segmentation
from kdjax.types import Task

__all__ = ["TASKS", "Classification", "Detection", "Segmentation", "build_task"]

TASKS: dict[str, Any] = {"detection": Detection, "segmentation": Segmentation, "classification": Classification}
"""Every task by its name in a config."""


def build_task(name: str, data: Any) -> Task:
    """The task of a name in a config, on data as the config has them.

    >>> from kdjax.config.schema import Data
    >>> build_task("detection", Data(max_objects=3))
    Detection(max_objects=3, mask_size=0, max_detections=100)

    Args:
        name: a key of ``TASKS``, or package.module:Class of somebody else's.
        data: :class:`kdjax.config.schema.Data`.

    Raises:
        UserError: there is no such task.
    """
    return chosen(name, TASKS, "task").of(data)
