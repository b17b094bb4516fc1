"""Learning-rate schedules and the optimiser, from optax's parts."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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
    power: float = 0.9,
    end_at_last: bool = False,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
) -> optax.Schedule:
    """Learning rate as a function of the step, with a linear warm-up that multiplies the schedule.

    Args:
        kind: "step" (a tenth at each milestone), "cosine" (to ``final_factor`` after the last step), "poly" (to it by
            ``(peak - final) (1 - step / steps)^power + final``) or "constant".
        learning_rate: the peak.
        steps: length of the run.
        milestones: fractions of ``steps`` at which "step" decays; the 1x and 2x schedules of COCO decay at 8/12 and
            11/12.
        final_factor: share of the peak at which "cosine" and "poly" end.
        power: of "poly".
        end_at_last: whether "poly" divides by ``steps - 1``, as MMEngine does, so that the last step has the final
            rate already; mmcv 1.x and most others divide by ``steps``.
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
    elif kind == "poly":
        fall = max(steps - end_at_last, 1)
        schedule = optax.polynomial_schedule(learning_rate, final_factor * learning_rate, power, fall)
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
    """Whether ``path`` is one of ``prefixes`` or lies below one; in them ``*`` is any text.

    >>> under("student/backbone/layer1_0/bn1/scale", ["student/backbone/*bn1"]), under("student/head", ["student/he"])
    (True, False)
    """
    return any(fnmatchcase(path, pattern) for prefix in prefixes for pattern in (prefix, prefix.rstrip("/") + "/*"))


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "sgd",
    momentum: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    decay_bias: bool = True,
    bias_rate: float = 1.0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> optax.GradientTransformation:
    """PyTorch's optimisers of those names: clip, then decay and accumulate, then scale.

    "sgd" and "adam" add the decay to the gradient (L2); "adamw" adds it to Adam's step (Loshchilov and Hutter, 2019).

    Args:
        name: "sgd", "adam" or "adamw".
        schedule: learning rate by step.
        momentum: of SGD's accumulated gradient, or of Adam's.
        beta2: of Adam's accumulated squares.
        weight_decay: factor of the parameter that is added.
        decay_all: decay normalisation scales and biases too; they are spared otherwise.
        decay_bias: where ``decay_all``, decay biases too, but for those of norms, which are decayed as their scales.
        bias_rate: factor of the rate of biases, but for those of norms.
        clip_norm: largest global norm of the gradient; None for no limit.
        clip_value: largest entry of the gradient, after that; None for no limit.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Unknown optimiser {name!r}: choose one of {', '.join(OPTIMIZERS)}.")

    def decays(params: Any) -> Any:
        if not decay_all:
            return jax.tree.map(lambda path: path.rsplit("/", 1)[-1] not in ("bias", "scale"), paths(params))
        return jax.tree.map(lambda plain: decay_bias or not plain, _plain_biases(params))

    def faster_biases(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x, plain: bias_rate * x if plain else x, updates, _plain_biases(updates))

    clips = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    clips += [optax.clip(clip_value)] if clip_value else []
    decay = optax.add_decayed_weights(weight_decay, decays)
    accumulate = optax.trace(momentum) if name == "sgd" else optax.scale_by_adam(momentum, beta2)
    return optax.chain(
        optax.chain(*clips) if len(clips) > 1 else clips[0] if clips else optax.identity(),
        *((accumulate, decay) if name == "adamw" else (decay, accumulate)),
        optax.scale_by_learning_rate(schedule),
        # The state's tree is that of earlier checkpoints where this is not asked for.
        *([optax.stateless(faster_biases)] if bias_rate != 1 else []),
    )


def _plain_biases(params: Any) -> Any:
    """Of every leaf whether it is a bias, and not one of a norm, which has a scale beside it."""
    scaled = {path.rsplit("/", 1)[0] for path in jax.tree.leaves(paths(params)) if path.endswith("/scale")}

    def plain(path: str) -> bool:
        place, _, name = path.rpartition("/")
        return name == "bias" and place not in scaled

    return jax.tree.map(plain, paths(params))


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
        freeze: parameter paths such as ``"student/backbone/conv1"``, see :func:`under`: nothing at or below them moves,
            nor counts in the global norm.
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


def layer_norms(gradient: Any, freeze: Sequence[str] = ()) -> dict[str, jax.Array]:
    """Norm (float32 scalar) of the gradient of each layer's arrays that are not frozen, by the layer's path.

    >>> layer_norms({"head": {"kernel": jax.numpy.full(1, 3.0), "bias": jax.numpy.full(1, 4.0)}})
    {'head': Array(5., dtype=float32)}
    """
    layers: dict[str, list[jax.Array]] = {}
    for path, leaf in zip(jax.tree.leaves(paths(gradient)), jax.tree.leaves(gradient), strict=True):
        if not under(path, freeze):
            layers.setdefault(path.rpartition("/")[0], []).append(leaf)
    return {layer: optax.tree.norm(leaves) for layer, leaves in layers.items()}
