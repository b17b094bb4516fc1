"""What a method does inside, on real images: features of teacher and student, masks, and what pulls at each level.

Computed again from what a run has left, at as many points of its training as there are checkpoints: nothing of it is
recorded while a run trains.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import operations
from kdjax.distill import Applied, image_keys, own_keys
from kdjax.errors import UserError
from kdjax.methods import build_method
from kdjax.methods.levels import SHOWN, pair_levels
from kdjax.models import build_model
from kdjax.paths import Path, is_folder
from kdjax.plan import Plan, StagePlan
from kdjax.run.build import init_jit, stage_key
from kdjax.run.data import open_batches
from kdjax.run.record import Finished, stage_folder
from kdjax.run.start import load_model, load_origins
from kdjax.saved import load_method
from kdjax.state import Variables
from kdjax.types import Batch, Features, Model, Source, View

_GIVEN = ("size", "targets", "keys", "step", "statistics")
"""What methods are given here; those that need a model's heads are not looked into."""
MOST_POINTS = 4
"""Points of the training that are looked at."""


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
    shown: dict[str, np.ndarray]
    """What methods show of it, by name, at the last point: (N, H, W, K) or (N, C)."""


class Pull(NamedTuple):
    """Of a term at a level, at one point."""

    value: float
    """Without its weight."""
    gradient: float
    """Norm of its gradient by the student's features of all levels."""


class Inside(NamedTuple):
    """What was found."""

    batch: Batch
    """As a stage saw it, on the host."""
    levels: dict[str, Level]
    pulls: dict[str, dict[str, Pull]]
    """By "term/level", by point."""
    left_out: list[str]
    """Methods that were not looked into."""


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
    points = {"before": origins.start(init_jit(student.init)(key, blank))}
    points |= _later(stage, stage_folder(workdir, name), source.class_names)
    batch = jax.tree.map(lambda x: x[:images], next(open_batches(plan, stage, source, 0)))
    seen_by = _features(student)
    features = {point: seen_by(variables, batch.images, batch.size) for point, variables in points.items()}
    taught = _features(origins.teacher.module)(origins.teacher.variables, batch.images, batch.size)
    views = {point: View(maps, student.strides) for point, maps in features.items()}
    teacher = View(taught, origins.teacher.module.strides)
    methods = {x: Applied(build_method(method.config), method.levels) for x, method in stage.methods.items()}
    fitting = {x: method for x, method in methods.items() if set(method.module.needs) <= set(_GIVEN)}
    drawing = [x for x, method in methods.items() if "keys" in method.module.needs]
    keys = image_keys(key, jnp.zeros((), jnp.int32), batch.index)
    given = {"size": batch.size, "targets": batch.targets, "step": jnp.zeros((), jnp.int32)}
    given["statistics"] = plan.task.statistics(source)
    pulls: dict[str, dict[str, Pull]] = {}
    shown: dict[str, np.ndarray] = {}
    for x, method in fitting.items():
        params = _params(stage_folder(workdir, name) / "method", x)
        own = {**given, "keys": own_keys(keys, x, drawing)}
        for point, view in views.items():
            found, seen = _pulls(method, params, view, teacher, own)
            shown = {**shown, **seen}
            for part, pull in found.items():
                pulls.setdefault(part, {})[point] = pull
    return Inside(
        batch=jax.device_get(batch),
        levels=_levels(fitting or methods, views, teacher, batch.size, shown),
        pulls=pulls,
        left_out=[x for x in methods if x not in fitting],
    )


def _later(stage: StagePlan, folder: Path, class_names: tuple[str, ...]) -> dict[str, Variables]:
    """The student at some checkpoints, the last one or the finished model included, by words."""
    steps = sorted((step for step in (folder / "checkpoints").glob("[0-9]*") if step.name.isdecimal()), key=_step)
    places = {f"step {_step(step)}": step for step in steps}
    if is_folder(folder / "model"):
        # A run keeps the newest checkpoints: the last of them is the model, unless an earlier one was better.
        places = {k: v for k, v in places.items() if _step(v) != stage.steps} | {"after": folder / "model"}
    return {
        point: load_model(place, class_names, stage.options.dtype)[0].variables
        for point, place in list(places.items())[-MOST_POINTS + 1 :]
    }


def _step(folder: Path) -> int:
    return int(folder.name)


def _features(model: Model) -> Callable[[Variables, jax.Array, jax.Array], Features]:
    """From variables, images and their sizes to features as in inference.

    There counts what a model's batch norms have learnt, not what these few images have in common.
    """

    def features(variables: Variables, images: jax.Array, size: jax.Array) -> Features:
        return operations.features(model, variables, model.preprocess(images, size))

    return jax.jit(features)


def _params(folder: Path, method: str) -> dict[str, Any] | None:
    """What a method has learnt by the end; None of one that has not."""
    for place in (folder / method, folder):
        if is_folder(place) and (place / "method.json").exists():
            return load_method(place)
    return None


def _pulls(
    method: Applied, params: Mapping[str, Any] | None, student: View, teacher: View, given: Mapping[str, Any]
) -> tuple[dict[str, Pull], dict[str, np.ndarray]]:
    """Each part of a method's terms with its gradient by the student's features, and what the method shows."""
    needed = {need: given[need] for need in method.module.needs}
    ours, theirs = method.sees(student), method.sees(teacher)
    assert ours is not None
    if params is None:
        variables = init_jit(lambda key: method.module.init(key, ours, theirs, **needed))(jax.random.key(0))
    else:
        variables = {"params": params}

    def parts(features: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], Any]:
        view = dataclasses.replace(ours, features=dict(features))
        terms, state = method.module.apply(variables, view, theirs, **needed, mutable=[SHOWN])
        flat = {
            f"{term}/{level}" if level else term: x
            for term, value in terms.items()
            for level, x in (value if isinstance(value, dict) else {"": value}).items()
        }
        return flat, (flat, state.get(SHOWN, {}))

    gradients, (values, shown) = jax.jit(jax.jacrev(parts, has_aux=True))(ours.features)
    norms = {
        part: float(np.sqrt(sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in by_level.values())))
        for part, by_level in gradients.items()
    }
    pulls = {part: Pull(float(value), norms[part]) for part, value in values.items()}
    return pulls, {name: np.asarray(x) for name, x in shown.items()}


def _levels(
    methods: Mapping[str, Applied],
    views: Mapping[str, View],
    teacher: View,
    size: jax.Array,
    shown: Mapping[str, np.ndarray],
) -> dict[str, Level]:
    """The levels that some method distils, finest first."""
    found: dict[str, Level] = {}
    for method in methods.values():
        theirs = method.sees(teacher)
        for point, view in views.items():
            ours = method.sees(view)
            assert ours is not None
            assert theirs is not None
            for pair in pair_levels(ours, theirs, size):
                before = found.setdefault(
                    pair.level,
                    Level(
                        stride=theirs.stride(pair.level),
                        teacher=_strength(pair.teacher, pair.where),
                        student={},
                        difference={},
                        shown={name.split("/")[0]: x for name, x in shown.items() if name.split("/")[1] == pair.level},
                    ),
                )
                before.student[point] = _strength(pair.student, pair.where)
                if pair.student.shape == pair.teacher.shape:
                    before.difference[point] = _strength(pair.student - pair.teacher, pair.where)
    return dict(sorted(found.items(), key=lambda item: item[1].stride))


def _strength(features: jax.Array, where: jax.Array) -> np.ndarray:
    return np.asarray(jnp.where(where, jnp.mean(jnp.abs(features.astype(jnp.float32)), axis=-1), 0))
