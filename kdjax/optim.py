"""Learning-rate schedules and the optimiser, from optax's parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from kdjax.options import OPTIMIZERS, SCHEDULES


def make_schedule(
    kind: str,
    learning_rate: float,
    steps: int,
    *,
    milestones: Sequence[float] = (),
    final_factor: float = 0.0,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
) -> optax.Schedule:
    """Learning rate as a function of the step, with a linear warm-up that multiplies the schedule.

    Args:
        kind: "step" (a tenth at each milestone), "cosine" (to ``final_factor`` at the last step) or "constant".
        learning_rate: the peak.
        steps: length of the run.
        milestones: fractions of ``steps`` at which "step" decays; the 1x and 2x schedules of COCO decay at 8/12 and
            11/12.
        final_factor: share of the peak at which "cosine" ends.
        warmup_steps: steps until the schedule holds in full.
        warmup_factor: share of the schedule at step 0.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "step":
        boundaries = {round(milestone * steps): 0.1 for milestone in milestones}
        schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    elif kind == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, steps, alpha=final_factor)
    elif kind == "constant":
        schedule = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(f"Unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}.")
    if warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(warmup_factor, 1.0, warmup_steps)
    return lambda step: schedule(step) * warmup(step)


def paths(tree: Any) -> Any:
    """Replaces every leaf of ``tree`` by its path: ``"student/backbone/conv1/kernel"``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def under(path: str, prefixes: Sequence[str]) -> bool:
    """Whether ``path`` is one of ``prefixes`` or lies below one."""
    return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "sgd",
    momentum: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """PyTorch's optimisers of those names: clip by global norm, then decay and accumulate, then scale.

    "sgd" and "adam" add the decay to the gradient (L2); "adamw" adds it to Adam's step (Loshchilov and Hutter, 2019).

    Args:
        name: "sgd", "adam" or "adamw".
        schedule: learning rate by step.
        momentum: of SGD's accumulated gradient, or of Adam's.
        beta2: of Adam's accumulated squares.
        weight_decay: factor of the parameter that is added.
        decay_all: decay normalisation scales and biases too; they are spared otherwise.
        clip_norm: largest global norm of the gradient; None for no limit.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Unknown optimiser {name!r}: choose one of {', '.join(OPTIMIZERS)}.")

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda path: decay_all or path.rsplit("/", 1)[-1] not in ("bias", "scale"), paths(params))

    decay = optax.add_decayed_weights(weight_decay, decays)
    accumulate = optax.trace(momentum) if name == "sgd" else optax.scale_by_adam(momentum, beta2)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        *((accumulate, decay) if name == "adamw" else (decay, accumulate)),
        optax.scale_by_learning_rate(schedule),
    )


def by_part(
    optimizer: optax.GradientTransformation,
    *,
    own: Mapping[str, optax.GradientTransformation] | None = None,
    freeze: Sequence[str] = (),
) -> optax.GradientTransformation:
    """The optimiser of the tree {"student", "method"}.

    Args:
        optimizer: of the student, and of the methods that have none of their own; a common global norm is clipped.
        own: optimisers of methods by the path of their parameters, such as ``"method"`` or ``"method/icd"``.
        freeze: parameter paths such as ``"student/backbone/conv1"``: nothing at or below them moves, nor counts in the
            global norm.
    """

    def label(path: str) -> str:
        if under(path, freeze):
            return "frozen"
        return next((place for place in own or {} if under(path, (place,))), "trained")

    optimizers = {"trained": optimizer, "method": optimizer, **(own or {}), "frozen": optax.set_to_zero()}
    return optax.partition(optimizers, lambda params: jax.tree.map(label, paths(params)))


def trained_norm(gradient: Any, freeze: Sequence[str] = ()) -> jax.Array:
    """Global norm (float32 scalar) of the gradient of what is not frozen: what clipping compares with its limit."""
    leaves = zip(jax.tree.leaves(paths(gradient)), jax.tree.leaves(gradient), strict=True)
    return optax.tree.norm([leaf for path, leaf in leaves if not under(path, freeze)])
