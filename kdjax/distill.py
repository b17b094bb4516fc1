"""The distillation step: pure, written for one device, mapped over devices by ``kdjax.devices.parallel``."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdjax.state import TrainState, Variables
from kdjax.types import Batch, Features, Sampling, Terms

# Folded into the keys of images that a detector samples its proposals by, so that methods draw other numbers.
_SAMPLING = 2**31 - 1


def image_keys(key: jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
    """One PRNG key per image (N,), a function of (seed, step, position in the global batch) only.

    However many devices share a batch, each image draws the same numbers.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def weighted_sum(terms: Terms, weights: Mapping[str, float]) -> tuple[jax.Array, Terms]:
    """The total loss and each term's weighted share of it; a term without a weight counts once.

    A term of weight 0 is left out of the sum, so that nothing is differentiated for it.
    """
    weighted = {name: weights.get(name, 1.0) * value for name, value in terms.items()}
    return sum((share for name, share in weighted.items() if weights.get(name, 1.0)), jnp.zeros(())), weighted


def select_levels(features: Features, levels: Collection[str]) -> Features:
    """The pyramid's ``levels``, those that it has; all of them where none is named."""
    return {level: x for level, x in features.items() if not levels or level in levels}


def distill_loss(
    params: dict[str, Any],
    batch_stats: Any,
    teacher_variables: Variables | None,
    batch: Batch,
    keys: jax.Array,
    step: jax.Array,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    method: nn.Module,
    loss_weights: Mapping[str, float],
    levels: Collection[str] = (),
    imitate_boxes: bool = False,
) -> tuple[jax.Array, tuple[Terms, Any]]:
    """Loss of one device's images: the student's own terms and the method's, each unweighted by name.

    The teacher, where there is one, runs without gradient, and its backbone and neck only, unless the student's head
    imitates its box regression: the term "box_imitation".

    Returns:
        the weighted total (float32 scalar), and (metrics, new batch statistics).
    """
    targets = batch["targets"]
    size = targets.image_size
    sampling = Sampling(targets, jax.vmap(jax.random.fold_in, (0, None))(keys, _SAMPLING))
    images = student.preprocess(batch["images"], size)
    variables = {"params": params["student"], "batch_stats": batch_stats}
    (features, predictions), updates = student.apply(
        variables, images, size, train=True, sampling=sampling, mutable=["batch_stats"]
    )
    terms = student.loss(predictions, targets)
    teacher_features: Features = {}
    if teacher is not None:
        images = teacher.preprocess(batch["images"], size)
        run_teacher: Callable[..., Any] = functools.partial(teacher.apply, teacher_variables or {})
        teacher_features = jax.lax.stop_gradient(run_teacher(images, method="features"))
        if imitate_boxes:
            theirs = run_teacher(teacher_features, predictions, size, method="regress")
            terms["box_imitation"] = student.imitate_boxes(predictions, theirs, targets)

    def task(other: Features) -> Terms:
        judge, unchanged = jax.lax.stop_gradient((variables, features))
        other = {**unchanged, **other}
        return student.loss(student.apply(judge, other, size, sampling, method="heads"), targets)

    learnt = {"params": params["method"]}
    seen = select_levels(features, levels), select_levels(teacher_features, levels)
    terms |= method.apply(learnt, *seen, targets, keys=keys, step=step, task=task)
    total, weighted = weighted_sum(terms, loss_weights)
    metrics = {"loss": total}
    metrics |= {f"raw/{name}": value for name, value in terms.items()}
    metrics |= {f"loss/{name}": value for name, value in weighted.items()}
    return total, (metrics, updates.get("batch_stats", batch_stats))


def accumulated(value_and_grad: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Wraps a value-and-gradient function so that it works through its batch in ``count`` parts, one after another.

    The mean over parts of loss, metrics and gradient comes back; batch statistics pass from part to part. Each part is
    normalised by its own counts (positives, batch statistics), over all devices. ``wrapped(params, batch_stats,
    teacher_variables, batch, keys, step)`` has the signature of :func:`distill_loss`.
    """
    if count == 1:
        return value_and_grad

    def wrapped(
        params: Any, batch_stats: Any, teacher_variables: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (batch, keys))

        def one(batch_stats: Any, part: Any) -> Any:
            (total, (metrics, batch_stats)), gradient = value_and_grad(
                params, batch_stats, teacher_variables, *part, step
            )
            return batch_stats, (total, metrics, gradient)

        def add(carry: Any, part: Any) -> Any:
            batch_stats, values = one(carry[0], part)
            return (batch_stats, jax.tree.map(jnp.add, carry[1], values)), None

        _, shapes = jax.eval_shape(one, batch_stats, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (batch_stats, sums), _ = jax.lax.scan(add, (batch_stats, zeros), parts)
        total, metrics, gradient = jax.tree.map(lambda x: x / count, sums)
        return (total, (metrics, batch_stats)), gradient

    return wrapped


def distill_step(
    state: TrainState,
    teacher_variables: Variables | None,
    batch: Batch,
    key: jax.Array,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    method: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_weights: Mapping[str, float],
    levels: Collection[str] = (),
    imitate_boxes: bool = False,
    axis_name: str | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    norm: Callable[[Any], jax.Array] = optax.tree.norm,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimisation step of the student (and of what the method learns) on one device's part of the batch.

    Args:
        state: the training state, equal on all devices.
        teacher_variables: the teacher's variables; never changed.
        batch: this device's images (N / devices of them) and targets.
        key: the run's PRNG key; random numbers are folded from it, the step and each image's global position.
        student: detector that is trained, built with the same ``axis_name``.
        teacher: detector that teaches, or None to train without one.
        method: module of ``kdjax.methods``.
        optimizer: of the tree {"student", "method"}.
        loss_weights: weight of each loss term by name, 1 where absent.
        levels: of the pyramids that the method sees; all where none is named.
        imitate_boxes: whether the student's head imitates the teacher's box regression.
        axis_name: mapped axis over which losses and gradients are averaged; None on a single device.
        accumulate: number of parts the batch is worked through in; divides N / devices.
        ema_decay: decay of the moving average per step, where the state keeps one.
        norm: of the gradient, for the metrics (of its trained part, where paths are frozen).

    Returns:
        the new state, and float32 scalars: "loss", "raw/<term>", "loss/<term>" (weighted), "grad_norm".
    """
    keys = image_keys(key, state.step, batch["index"])

    def loss(*arguments: Any) -> Any:
        return distill_loss(
            *arguments,
            student=student,
            teacher=teacher,
            method=method,
            loss_weights=loss_weights,
            levels=levels,
            imitate_boxes=imitate_boxes,
        )

    value_and_grad = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    (_, (metrics, batch_stats)), gradient = value_and_grad(
        state.params, state.batch_stats, teacher_variables, batch, keys, state.step
    )
    if axis_name is not None:
        gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        variables = {"params": params["student"], "batch_stats": batch_stats}
        ema = optax.incremental_update(variables, ema, 1.0 - ema_decay)
    metrics["grad_norm"] = norm(gradient)
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics
