import subprocess
import sys

import kdjax.losses

HEAVY = ("flax", "optax", "orbax", "clu", "ml_collections", "grain", "tensorflow", "tensorflow_datasets")


def test_losses_load_jax_alone() -> None:
    program = f"import sys, kdjax.losses; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_public_names_are_sorted_and_there() -> None:
    assert kdjax.losses.__all__ == sorted(kdjax.losses.__all__)
    assert all(hasattr(kdjax.losses, name) for name in kdjax.losses.__all__)
