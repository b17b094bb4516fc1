"""Weights into models: by path and shape, strictly."""

from kdjax.weights.coco import COCO_NAMES
from kdjax.weights.files import read_state_dict
from kdjax.weights.load import LoadReport, inherit, load_into
from kdjax.weights.sources import SOURCES
from kdjax.weights.state_dict import Imported, ImportReport, import_state_dict

__all__ = [
    "COCO_NAMES",
    "SOURCES",
    "ImportReport",
    "Imported",
    "LoadReport",
    "import_state_dict",
    "inherit",
    "load_into",
    "read_state_dict",
]
