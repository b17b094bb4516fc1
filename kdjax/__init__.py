"""Knowledge distillation for vision models on JAX.

Loss functions are in ``kdjax.losses`` (jax alone), Flax modules in ``kdjax.methods`` and ``kdjax.models``; a trained
student is asked about photographs by ``kdjax.load_predictor``, or loaded as a module by ``kdjax.load_student``, which
sees them by ``kdjax.prepare``; ``python -m kdjax.main`` trains.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
_HOMES = {"load_predictor": "kdjax.predictor", "load_student": "kdjax.saved", "prepare": "kdjax.saved"}
__all__ = ["load_predictor", "load_student", "prepare"]


def __getattr__(name: str) -> Any:
    # Lazily: importing one loss must not load Flax and Orbax.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
