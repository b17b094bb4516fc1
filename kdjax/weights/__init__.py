"""Weights into models: by path and shape, strictly."""

from kdjax.weights.load import LoadReport, inherit, load_into

__all__ = ["LoadReport", "inherit", "load_into"]
