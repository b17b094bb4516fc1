"""Knowledge distillation for object detectors on JAX.

Loss functions are in ``kdjax.losses`` (jax alone), Flax modules in ``kdjax.methods`` and ``kdjax.models``; a trained
student is loaded by ``kdjax.load_student`` and sees photographs by ``kdjax.prepare``; ``python -m kdjax.main`` trains.
"""

from typing import Any

__version__ = "0.2.0"
__all__ = ["load_student", "prepare"]


def __getattr__(name: str) -> Any:
    # Lazily: importing one loss must not load Flax and Orbax.
    if name in __all__:
        from kdjax import saved

        return getattr(saved, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
