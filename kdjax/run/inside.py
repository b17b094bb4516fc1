"""What a method does inside, on real images: features of teacher and student, masks, and what pulls at each level.

Computed again from what a run has left, at as many points of its training as there are checkpoints: nothing of it is
recorded while a run trains.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import operations
from kdjax.distill import (
    Applied,
    Side,
    applied,
    by_method,
    given_by_heads,
    image_keys,
    level_parts,
    place,
    sampling_of,
    sums,
    together,
)
from kdjax.errors import UserError
from kdjax.losses import uniform_statistics
from kdjax.methods import build_method, term_names
from kdjax.methods.levels import SHOWN, pair_levels
from kdjax.models import build_model
from kdjax.paths import Path, is_folder
from kdjax.plan import Plan, StagePlan
from kdjax.run.build import example_of, init_methods, initialize, stage_key, with_given
from kdjax.run.data import open_batches
from kdjax.run.record import Finished, stage_folder
from kdjax.run.start import load_model, load_origins
from kdjax.run.story import stories
from kdjax.saved import load_checkpointed_methods, load_method
from kdjax.state import Variables
from kdjax.types import Batch, Features, Model, Source, View

MOST_POINTS = 4
"""Points of the training that are looked at."""
_WEIGHED = 8
"""Images, at least, of which terms and gradients are taken: a level's objects need not be in the few that are drawn."""


class Point(NamedTuple):
    """What was learnt at a point of the training."""

    student: Variables
    methods: Any
    """Parameters, as ``params["method"]`` of the state has them."""
    step: jax.Array
    """int32 scalar."""


class Level(NamedTuple):
    """A level of a teacher and what a student has for it, of N images, as NumPy arrays."""

    stride: int
    """Of the teacher's map."""
    teacher: np.ndarray
    """(N, H, W) float32: the mean over channels of its features' absolute values."""
    student: dict[str, np.ndarray]
    """The same of the student, on the teacher's grid, by point of the training."""
    difference: dict[str, np.ndarray]
    """(N, H, W) float32: the mean over channels of the absolute difference; {} where they have other numbers of them,
    for then channels mean other things."""
    shown: dict[str, dict[str, np.ndarray]]
    """What methods show of it, by name and point: (N, H, W, K) or (N, C)."""


class Pull(NamedTuple):
    """Of a term, or of its part at a level, at one point."""

    value: float
    """Without its weight."""
    weighted: float
    gradient: dict[str, float]
    """Norm of the weighted term's gradient by the student's features, by level of the student, fine to coarse."""

    @property
    def norm(self) -> float:
        """Of the gradient by all levels together."""
        return float(np.sqrt(sum(x**2 for x in self.gradient.values())))


class Inside(NamedTuple):
    """What was found."""

    batch: Batch
    """As a stage saw it, on the host: the images that are drawn."""
    levels: dict[str, Level]
    pulls: dict[str, dict[str, Pull]]
    """By term, and "term/level" of those that are sums over levels, by point: those of the student's own loss first."""
    own: tuple[str, ...]
    """The terms that are the student's own."""
    weighed: int
    """Images that ``pulls`` are of."""


def look_inside(plan: Plan, workdir: Path, name: str, source: Source, images: int) -> Inside:
    """Looks at a stage that has a teacher, on the first images that it was trained on.

    Args:
        plan: of one seed.
        workdir: where its stages are.
        name: of the stage.
        source: its training split.
        images: how many.

    Raises:
        UserError: it has no teacher, or what it needs is not there any more.
    """
    stage = plan[name]
    if not stage.options.teacher:
        raise UserError(f"The stage {name!r} has no teacher: there is nothing to see of a method.")
    earlier = {x.name: Finished(stage_folder(workdir, x.name), {}) for x in plan.stages if x.name != name}
    origins = load_origins(stage, source.class_names, earlier, plan.data.sizing.resize)
    assert origins.teacher is not None
    key = stage_key(plan.run.seed, stage)
    student = build_model(origins.model, num_classes=len(source.class_names))
    blank = jnp.zeros((1, *plan.data.training_shapes[0], 3))
    methods = {x: Applied(build_method(method.config), method.levels) for x, method in stage.methods.items()}
    statistics = plan.task.statistics(source) or uniform_statistics(len(source.class_names))
    example = example_of(
        student, origins.teacher.module, blank, plan.task.targets(1, plan.data.training_shapes[0]), statistics
    )
    known, _ = with_given(stage, by_method(init_methods(methods, example, key), methods), origins.given)
    points = {"before": Point(origins.start(initialize(student.init, key, blank)), together(known), jnp.int32(0))}
    points |= _later(stage, stage_folder(workdir, name), source.class_names, methods)
    weighed = max(images, _WEIGHED)
    batch = jax.tree.map(lambda x: x[:weighed], next(open_batches(plan, stage, source, 0)))
    seen_by = _features(student)
    features = {point: seen_by(at.student, batch.images, batch.size) for point, at in points.items()}
    taught = _features(origins.teacher.module)(origins.teacher.variables, batch.images, batch.size)
    scales = [row["method_scale"] for row in stories(plan, workdir)[name].rows if row.get("method_scale")]
    ours = student.terms
    weights = dict(stage.options.loss_weights)
    theirs = [term for x in methods.values() for term in term_names(x.module, ours)]
    weights |= {term: weights.get(term, 1.0) * (scales[0] if scales else 1.0) for term in theirs}
    pull = pulling(student, *origins.teacher, methods, weights, statistics)
    keys = image_keys(key, jnp.zeros((), jnp.int32), batch.index)
    pulls: dict[str, dict[str, Pull]] = {}
    shown: dict[str, dict[str, np.ndarray]] = {}
    for point, at in points.items():
        found, shown[point] = pull(at, features[point], taught, batch, keys)
        for part, one in found.items():
            pulls.setdefault(part, {})[point] = one

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[:images], tree)

    drawn, view = first(batch), View(first(taught), origins.teacher.module.strides)
    views = {point: View(first(maps), student.strides) for point, maps in features.items()}
    return Inside(
        batch=jax.device_get(drawn),
        levels=_levels(methods, views, view, drawn.size, shown),
        pulls=pulls,
        own=ours,
        weighed=len(batch.images),
    )


def _later(
    stage: StagePlan, folder: Path, class_names: tuple[str, ...], methods: Mapping[str, Applied]
) -> dict[str, Point]:
    """Some checkpoints, the last one or the finished model included, by words."""
    steps = sorted((step for step in (folder / "checkpoints").glob("[0-9]*") if step.name.isdecimal()), key=_step)
    finished = is_folder(folder / "model")
    if finished:
        # A run keeps the newest checkpoints: the last of them is the model, unless an earlier one was better.
        steps = [step for step in steps if _step(step) != stage.steps][-MOST_POINTS + 2 :]

    def student(place: Path) -> Variables:
        return load_model(place, class_names, stage.options.dtype)[0].variables

    points = {
        f"step {_step(step)}": Point(student(step), load_checkpointed_methods(step), jnp.int32(_step(step)))
        for step in steps[-MOST_POINTS + 1 :]
    }
    if finished:
        learnt = {x: _learnt(folder / place(x, methods)) for x, method in methods.items() if method.learns}
        points["after"] = Point(student(folder / "model"), together(learnt), jnp.int32(stage.steps))
    return points


def _learnt(folder: Path) -> dict[str, Any]:
    """What a method has learnt; {} of one that had nothing to learn, as models of one width have nothing to align."""
    return load_method(folder) if is_folder(folder) else {}


def _step(folder: Path) -> int:
    return int(folder.name)


def _features(model: Model) -> Callable[[Variables, jax.Array, jax.Array], Features]:
    """From variables, images and their sizes to features as in inference.

    There counts what a model's batch norms have learnt, not what these few images have in common.
    """

    def features(variables: Variables, images: jax.Array, size: jax.Array) -> Features:
        return operations.features(model, variables, model.preprocess(images, size))

    return jax.jit(features)


Pulling = Callable[[Point, Features, Features, Batch, jax.Array], tuple[dict[str, Pull], dict[str, np.ndarray]]]
"""From a point of the training, the features (N, ...) of student and teacher, a batch and the images' keys (N,) to the
terms by name and "term/level", and what methods show by "what/level"."""


def pulling(
    student: Model,
    teacher: Model,
    teacher_variables: Variables,
    methods: Mapping[str, Applied],
    weights: Mapping[str, float],
    statistics: Any,
) -> Pulling:
    """What finds the terms of a step, their gradients by the student's features, and what methods show.

    Heads and losses are those of a training step; features are given, as batch norms have them in inference.

    Args:
        student: that learns.
        teacher: that teaches it.
        teacher_variables: of that.
        methods: by name.
        weights: of terms, 1 where absent.
        statistics: what methods are given as such.
    """

    def weight_of(part: str) -> float:
        return weights.get(part.partition("/")[0], 1.0)

    @jax.jit
    def of_arrays(point: Point, features: Features, taught: Features, batch: Batch, keys: jax.Array) -> Any:
        size, targets = batch.size, batch.targets
        sampling = sampling_of(targets, keys)
        theirs = Side(teacher, teacher_variables, View(taught, teacher.strides))
        given = {"size": size, "targets": targets, "keys": keys, "step": point.step, "statistics": statistics}

        def terms(features: Features) -> Any:
            predictions = operations.heads(student, point.student, features, size, sampling)
            ours = Side(student, point.student, View(features, student.strides, predictions))
            known = given | given_by_heads(ours, theirs, targets, size, sampling)
            found = applied(methods, point.methods, ours.view, theirs.view, known, mutable=[SHOWN])
            distilled = {term: x for own, _ in found.values() for term, x in own.items()}
            shown = {what: x for _, state in found.values() for what, x in state.get(SHOWN, {}).items()}
            own = student.loss(predictions, targets, size)
            return {**own, **sums(distilled), **level_parts(distilled)}, shown

        values, back, shown = jax.vjp(terms, features, has_aux=True)
        parts = sorted(values)
        each = dict(zip(parts, jnp.diag(jnp.array([weight_of(part) for part in parts])), strict=True))
        # One after another: side by side the backward passes of a large model would not fit into memory.
        norms = jax.lax.map(lambda seed: jax.tree.map(_norm, back(seed)[0]), each)
        return values, norms, shown

    def pulls(point: Point, features: Features, taught: Features, batch: Batch, keys: jax.Array) -> Any:
        values, norms, shown = jax.device_get(of_arrays(point, features, taught, batch, keys))
        levels = sorted(norms, key=student.strides.__getitem__)
        found = {
            part: Pull(
                float(values[part]),
                weight_of(part) * float(values[part]),
                {level: float(norms[level][at]) for level in levels},
            )
            for at, part in enumerate(sorted(values))
        }
        return dict(sorted(found.items(), key=lambda item: (item[0] not in student.terms, item[0]))), shown

    return pulls


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def _levels(
    methods: Mapping[str, Applied],
    views: Mapping[str, View],
    teacher: View,
    size: jax.Array,
    shown: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Level]:
    """The levels that some method distils, finest first; of methods that compare predictions alone, all that meet."""
    found: dict[str, Level] = {}
    by_maps = [method for method in methods.values() if "teacher_heads" not in method.module.needs]
    for method in by_maps or methods.values():
        theirs = method.sees(teacher)
        for point, view in views.items():
            ours = method.sees(view)
            assert ours is not None
            assert theirs is not None
            for pair in pair_levels(ours, theirs, size):
                level = found.setdefault(
                    pair.level,
                    Level(theirs.stride(pair.level), _strength(pair.teacher, pair.where), {}, {}, {}),
                )
                level.student[point] = _strength(pair.student, pair.where)
                if pair.student.shape == pair.teacher.shape:
                    level.difference[point] = _strength(pair.student - pair.teacher, pair.where)
    for point, by_name in shown.items():
        for name, x in by_name.items():
            what, _, at = name.partition("/")
            if at in found:
                found[at].shown.setdefault(what, {})[point] = x[: len(size)]
    return dict(sorted(found.items(), key=lambda item: item[1].stride))


def _strength(features: jax.Array, where: jax.Array) -> np.ndarray:
    return np.asarray(jnp.where(where, jnp.mean(jnp.abs(features.astype(jnp.float32)), axis=-1), 0))
