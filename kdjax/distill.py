"""The distillation step: pure, written for one device, mapped over devices by ``kdjax.devices.parallel``.

The file is long because loss, accumulation, guard and averages are one step, and read in that order.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import operations
from kdjax.losses import ClassStatistics
from kdjax.state import TrainState, Variables
from kdjax.types import Batch, Features, Method, MethodTerms, Model, PairedSides, Sampling, Terms, View

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


class Applied(NamedTuple):
    """A method of a stage."""

    module: Method
    levels: Collection[str] = ()
    """Of the features that it sees; all where none is named."""

    def sees(self, view: View | None) -> View | None:
        """What it sees of a model."""
        if view is None or not self.levels:
            return view
        return dataclasses.replace(view, features={x: y for x, y in view.features.items() if x in self.levels})

    @property
    def learns(self) -> bool:
        """Whether it has parameters of its own to learn."""
        return any("method" in moved for moved in self.module.terms.values())


def place(name: str, methods: Mapping[str, Applied]) -> str:
    """The path of a method's parameters: "method" of the only one that learns, "method/<name>" of several."""
    learners = [name for name, method in methods.items() if method.learns]
    return "method" if learners == [name] else f"method/{name}"


def by_method(params: Mapping[str, Any], methods: Mapping[str, Applied]) -> dict[str, Any]:
    """The parameters of each method that learns, by name, from ``params["method"]``."""
    learners = [name for name, method in methods.items() if method.learns]
    return {name: params if place(name, methods) == "method" else params[name] for name in learners}


def together(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`by_method`."""
    return next(iter(params.values())) if len(params) == 1 else dict(params)


def own_keys(keys: jax.Array, name: str, names: Collection[str]) -> jax.Array:
    """The PRNG keys (N,), or the one (), that one of several methods draws by; the only one has ``keys`` themselves."""
    if len(names) < 2:
        return keys
    number = zlib.crc32(name.encode())
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number) if keys.ndim else jax.random.fold_in(keys, number)


class Side(NamedTuple):
    """A student or a teacher on one batch."""

    model: Model
    variables: Variables
    view: View
    """Of the student with its predictions."""


def sampling_of(targets: Any, keys: jax.Array) -> Sampling:
    """What a student's heads draw by, of the keys of the images (N,)."""
    return Sampling(targets, jax.vmap(jax.random.fold_in, (0, None))(keys, _SAMPLING))


def given_by_heads(
    student: Side, teacher: Side | None, targets: Any, size: jax.Array, sampling: Sampling
) -> dict[str, Any]:
    """What methods may need of the heads and the losses of both models, by the keywords of ``kdjax.methods.NEEDED``."""
    model, view = student.model, student.view

    def teacher_heads(predictions: Any) -> Any:
        assert teacher is not None
        return operations.heads_at(teacher.model, teacher.variables, teacher.view.features, predictions, size)

    def own_loss(other: Features) -> Terms:
        judge, unchanged = jax.lax.stop_gradient((student.variables, view.features))
        other = {**unchanged, **other}
        return model.loss(operations.heads(model, judge, other, size, sampling), targets, size)

    def prediction_loss(other: Any) -> Terms:
        return model.loss(other, targets, size)

    def paired_sides(theirs: Any) -> dict[str, PairedSides]:
        return model.paired_sides(view.predictions, theirs, targets, size)

    return {
        "own_loss": own_loss,
        "prediction_loss": prediction_loss,
        "teacher_heads": teacher_heads,
        "paired_sides": paired_sides,
    }


def applied(
    methods: Mapping[str, Applied],
    params: Mapping[str, Any],
    student: View,
    teacher: View | None,
    given: Mapping[str, Any],
    **how: Any,
) -> dict[str, Any]:
    """What each method gives, called with the keywords that it needs.

    Args:
        methods: by name.
        params: of the methods, as :func:`by_method` takes them.
        student: features and predictions.
        teacher: features.
        given: every keyword of ``kdjax.methods.NEEDED`` that some method needs.
        **how: further keywords of Flax's ``apply``.
    """
    found = {}
    own = by_method(params, methods)
    drawing = [name for name, method in methods.items() if "keys" in method.module.needs]
    for name, method in methods.items():
        needed = {need: given[need] for need in method.module.needs}
        if "keys" in needed:
            needed["keys"] = own_keys(needed["keys"], name, drawing)
        variables = {"params": own.get(name, {})}
        found[name] = method.module.apply(variables, method.sees(student), method.sees(teacher), **needed, **how)
    return found


def sums(terms: MethodTerms) -> Terms:
    """Each term as one scalar."""
    return {
        name: sum(value.values(), jnp.zeros(())) if isinstance(value, dict) else value for name, value in terms.items()
    }


def level_parts(terms: MethodTerms) -> Terms:
    """The parts of the terms that have some, as "term/level"."""
    return {
        f"{name}/{level}": part
        for name, value in terms.items()
        if isinstance(value, dict)
        for level, part in value.items()
    }


def distill_loss(
    params: dict[str, Any],
    batch_stats: Any,
    teacher_variables: Variables | None,
    batch: Batch,
    keys: jax.Array,
    step: jax.Array,
    *,
    student: Model,
    teacher: Model | None,
    methods: Mapping[str, Applied],
    loss_weights: Mapping[str, float],
    statistics: ClassStatistics | None = None,
    scale: jax.Array | None = None,
    method_share: float = 0.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[Terms, Any]]:
    """Loss of one device's images: the student's own terms and those of the methods, each unweighted by name.

    The teacher, where there is one, runs without gradient, its heads only where a method asks for them. With a scale,
    the methods' weighted terms are multiplied by it; while it is 0, by what makes them ``method_share`` times the
    student's own loss together, on all devices, which is the metric "method_scale" from then on.

    Returns:
        the weighted total (float32 scalar), and (metrics, new batch statistics).
    """
    size, targets = batch.size, batch.targets
    sampling = sampling_of(targets, keys)
    variables = {"params": params["student"], "batch_stats": batch_stats}
    images = student.preprocess(batch.images, size)
    features, predictions, new_stats = operations.forward(student, variables, images, size, sampling)
    terms = student.loss(predictions, targets, size)
    ours, theirs = Side(student, variables, View(features, student.strides, predictions)), None
    if teacher is not None:
        images = teacher.preprocess(batch.images, size)
        taught = jax.lax.stop_gradient(operations.features(teacher, teacher_variables or {}, images))
        theirs = Side(teacher, teacher_variables or {}, View(taught, teacher.strides))
    given = {"size": size, "targets": targets, "keys": keys, "step": step, "statistics": statistics}
    given |= given_by_heads(ours, theirs, targets, size, sampling)
    by_method_name = applied(methods, params["method"], ours.view, theirs and theirs.view, given)
    distilled: MethodTerms = {term: x for found in by_method_name.values() for term, x in found.items()}
    total, weighted = weighted_sum(terms, loss_weights)
    taught_terms = sums(distilled)
    taught_total, taught_weighted = weighted_sum(taught_terms, loss_weights)
    metrics = {}
    if scale is not None:
        first = _share_of(total, taught_total, method_share, axis_name)
        scale = jax.lax.stop_gradient(jnp.where(scale > 0, scale, first))
        taught_total, taught_weighted = jax.tree.map(lambda x: scale * x, (taught_total, taught_weighted))
        metrics["method_scale"] = scale
    total += taught_total
    metrics["loss"] = total
    metrics |= {f"raw/{name}": value for name, value in {**terms, **taught_terms, **level_parts(distilled)}.items()}
    metrics |= {f"loss/{name}": value for name, value in {**weighted, **taught_weighted}.items()}
    return total, (metrics, new_stats)


def _share_of(own: jax.Array, theirs: jax.Array, share: float, axis_name: str | None) -> jax.Array:
    """What makes ``theirs`` as large as ``share`` times ``own``, both averaged over devices; 0 where theirs is none."""
    if axis_name is not None:
        own, theirs = jax.lax.pmean((own, theirs), axis_name)
    return jnp.where(theirs > 0, share * own / jnp.where(theirs > 0, theirs, 1), 0)


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
    student: Model,
    teacher: Model | None,
    methods: Mapping[str, Applied],
    optimizer: optax.GradientTransformation,
    loss_weights: Mapping[str, float],
    statistics: ClassStatistics | None = None,
    axis_name: str | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    method_share: float = 0.0,
    norm: Callable[[Any], jax.Array] = optax.tree.norm,
    whole_norm: Callable[[Any], jax.Array] = optax.tree.norm,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimisation step of the student (and of what the method learns) on one device's part of the batch.

    A step whose loss, gradient or new state is not finite is skipped: it counts, so that the next one sees other
    images, and changes nothing else. All devices decide alike, by what has been averaged over them.

    Args:
        state: the training state, equal on all devices.
        teacher_variables: the teacher's variables; never changed.
        batch: this device's images (N / devices of them) and targets.
        key: the run's PRNG key; random numbers are folded from it, the step and each image's global position.
        student: model that is trained, built with the same ``axis_name``.
        teacher: model that teaches, or None to train without one.
        methods: of ``kdjax.methods``, by name; their terms have different names.
        optimizer: of the tree {"student", "method"}.
        loss_weights: weight of each loss term by name, 1 where absent.
        statistics: of the training set's boxes, for methods that need them.
        axis_name: mapped axis over which losses and gradients are averaged; None on a single device.
        accumulate: number of parts the batch is worked through in; divides N / devices.
        ema_decay: decay of the moving average per step, where the state keeps one.
        method_share: where the state has a scale, what the methods' terms are together at the first step, as a multiple
            of the student's own loss.
        norm: of the gradient, for the metrics (of its trained part, where paths are frozen).
        whole_norm: of all of the gradient that moves something, whatever its optimiser clips: where that is beyond
            float32, the gradient counts as not finite.

    Returns:
        the new state, and float32 scalars: "loss", "raw/<term>", "raw/<term>/<level>" of terms that are sums over
        levels, "loss/<term>" (weighted), "grad_norm", "skipped" (1 of a step that is, 0 of others), and "method_scale"
        where the state has a scale.
    """
    keys = image_keys(key, state.step, batch.index)

    def loss(*arguments: Any) -> Any:
        return distill_loss(
            *arguments,
            student=student,
            teacher=teacher,
            methods=methods,
            loss_weights=loss_weights,
            statistics=statistics,
            scale=state.scale,
            method_share=method_share,
            axis_name=axis_name,
        )

    value_and_grad = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    (_, (metrics, batch_stats)), gradient = value_and_grad(
        state.params, state.batch_stats, teacher_variables, batch, keys, state.step
    )
    if axis_name is not None:
        # Without the barrier XLA converts the sum of a bias's gradients to float32, instead of what is summed. One for
        # each array: what is frozen falls away, and the first sums begin before the last gradients are there.
        gradient = jax.tree.map(jax.lax.optimization_barrier, gradient)
        gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        variables = {"params": params["student"], "batch_stats": batch_stats}
        ema = optax.incremental_update(variables, ema, 1.0 - ema_decay)
    metrics["grad_norm"] = norm(gradient)
    new = TrainState(state.step + 1, params, batch_stats, opt_state, ema, metrics.get("method_scale"))
    fine = _finite((metrics["loss"], whole_norm(gradient), new))
    metrics["skipped"] = 1.0 - fine.astype(jnp.float32)
    kept = jax.tree.map(functools.partial(jnp.where, fine), new, state)
    return kept.replace(step=new.step), metrics


def term_gradient(
    state: TrainState,
    teacher_variables: Variables | None,
    batch: Batch,
    key: jax.Array,
    *,
    term: str,
    axis_name: str | None = None,
    accumulate: int = 1,
    **setting: Any,
) -> dict[str, Any]:
    """The gradient of one weighted term alone, averaged over devices, as :func:`distill_step` has that of their sum.

    Args:
        state: the training state, before the step.
        teacher_variables: as in :func:`distill_step`, with ``batch``, ``key``, ``axis_name`` and ``accumulate``.
        batch: see there.
        key: see there.
        term: one whose weight is not 0.
        axis_name: see there.
        accumulate: see there.
        **setting: the other keywords of :func:`distill_loss`, without the scale.

    Returns:
        a tree like ``state.params``.
    """

    def loss(*arguments: Any) -> Any:
        _, (metrics, batch_stats) = distill_loss(*arguments, scale=state.scale, axis_name=axis_name, **setting)
        return metrics[f"loss/{term}"], (metrics, batch_stats)

    value_and_grad = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    keys = image_keys(key, state.step, batch.index)
    _, gradient = value_and_grad(state.params, state.batch_stats, teacher_variables, batch, keys, state.step)
    return gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)


def _finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite, () bool."""
    bad = jnp.stack([1.0 - jnp.isfinite(x).all().astype(jnp.float32) for x in jax.tree.leaves(tree)])
    # A sum, or a logical and, XLA would fuse with all before it into whatever depends on it, once for each array.
    return jnp.dot(bad, bad) == 0
