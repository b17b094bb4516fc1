"""Weights into models: by path and shape, strictly."""

from kdjax.weights.coco import COCO_NAMES
from kdjax.weights.files import read_weights
from kdjax.weights.imagenet import are_imagenet
from kdjax.weights.load import LoadReport, inherit, load_into, without
from kdjax.weights.outward import Exported, export_state_dict
from kdjax.weights.programs import Serving, lines_to_load
from kdjax.weights.sources import SOURCES, merged
from kdjax.weights.state_dict import Expected, Imported, ImportReport, count_classes, expected_model, import_state_dict
from kdjax.weights.tokens import learnt_tokens

__all__ = [
    "COCO_NAMES",
    "SOURCES",
    "Expected",
    "Exported",
    "ImportReport",
    "Imported",
    "LoadReport",
    "Serving",
    "are_imagenet",
    "count_classes",
    "expected_model",
    "export_state_dict",
    "import_state_dict",
    "inherit",
    "learnt_tokens",
    "lines_to_load",
    "load_into",
    "merged",
    "read_weights",
    "without",
]
