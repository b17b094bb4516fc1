"""A step that is not finite changes nothing but the count of steps, and is named with its images; five end a run."""

import functools
import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import kdjax
from kdjax.devices import AXIS, parallel, replicate, split
from kdjax.distill import Applied, distill_step, term_gradient
from kdjax.errors import NumericError
from kdjax.optim import by_part, layer_norms, make_optimizer, trained_norm
from kdjax.plan import resolve
from kdjax.run import pipeline, train
from kdjax.run.data import images_of_step, open_split
from kdjax.state import TrainState, init_state
from kdjax.types import Batch, View
from tests.runs import rows, tiny, with_teacher

ROOT = Path(__file__).parents[1]
IMAGES = 16
"""Two on each device."""
KEY = jax.random.key(0)


class Faults(NamedTuple):
    """What goes wrong with each image: zeros where nothing does."""

    loss: np.ndarray
    """(N,) float32, added to a term."""
    gradient: np.ndarray
    """(N,) float32, what the gradient of the head's bias is multiplied by, besides 1."""
    method: np.ndarray
    """(N,) float32, the same of the method's gain."""


@jax.custom_vjp
def pulled(x, strength):
    """``x`` itself, and its gradient times ``strength``."""
    return x


pulled.defvjp(lambda x, strength: (x, strength), lambda strength, g: (g * strength, jnp.zeros_like(strength)))


class Toy(nn.Module):
    """A model of one map whose terms go wrong where its targets say so; white pixels are infinite features."""

    axis_name: str | None = None
    strides: ClassVar[dict[str, int]] = {"p3": 8}

    def setup(self):
        self.backbone = nn.Dense(3)
        self.norm = nn.BatchNorm(momentum=0.9, axis_name=self.axis_name)
        self.head = self.param("head", lambda _: {"bias": jnp.ones(())})

    def __call__(self, images, image_size=None, train=False, sampling=None):
        features = self.features(images, train)
        return features, (features["p3"], self.head["bias"])

    def features(self, images, train=False):
        return {"p3": self.norm(self.backbone(jnp.log1p(-images)), use_running_average=not train)}

    @nn.nowrap
    def preprocess(self, images, image_size):
        return images.astype(jnp.float32) / 255

    @nn.nowrap
    def loss(self, predictions, faults, image_size):
        x, bias = predictions
        strength = 1 + jnp.sum(faults.gradient)
        return {"cls": jnp.mean(jnp.square(x - 1)) + jnp.sum(faults.loss), "box": jnp.square(pulled(bias, strength))}


class Gain(nn.Module):
    """A method that learns one number."""

    needs = ("targets",)
    requires = ("teacher",)
    terms: ClassVar[dict[str, Any]] = {"gain": ("method", "student")}

    @nn.compact
    def __call__(self, student, teacher, *, targets):
        gain = pulled(self.param("gain", lambda _: jnp.ones(())), 1 + jnp.sum(targets.method))
        return {"gain": jnp.mean(jnp.square(gain * student.features["p3"] - teacher.features["p3"]))}


def images(seed: int) -> Batch:
    none = np.zeros(IMAGES, np.float32)
    pixels = np.random.default_rng(seed).integers(0, 200, (IMAGES, 4, 4, 3), dtype=np.uint8)
    size, index = np.full((IMAGES, 2), 4, np.int32), np.arange(IMAGES, dtype=np.int32)
    return Batch(pixels, size, index, Faults(none, none, none))


def faulty(kind: str, value: float, image: int = 5) -> Batch:
    """A batch of which one image, on one of eight devices, has a fault."""
    batch, wrong = images(1), np.zeros(IMAGES, np.float32)
    wrong[image] = value
    return Batch(batch.images, batch.size, batch.index, batch.targets._replace(**{kind: wrong}))


def setting(accumulate: int = 1) -> dict[str, Any]:
    """What a step and the gradient of one of its terms have in common."""
    return dict(
        student=Toy(axis_name=AXIS),
        teacher=Toy(),
        methods={"gain": Applied(Gain())},
        loss_weights={},
        axis_name=AXIS,
        accumulate=accumulate,
        method_share=2.0,
    )


@functools.cache
def make(freeze: tuple[str, ...] = (), accumulate: int = 1) -> tuple[Any, TrainState, Any]:
    """The step on eight devices with everything that a state can have, its state of step 0, and the teacher."""
    first = jnp.zeros((1, 4, 4, 3))
    variables, taught = (jax.jit(Toy().init)(jax.random.key(seed), first) for seed in (1, 2))
    maps = View({"p3": jnp.ones((1, 4, 4, 3))}, Toy.strides)
    learnt = Gain().init(KEY, maps, maps, targets=images(0).targets)
    # Entries that are infinite are clipped to finite ones.
    own = {"method": make_optimizer(lambda _: 0.1, name="adam", clip_value=1.0)}
    optimizer = by_part(make_optimizer(lambda _: 2.0, clip_value=0.01), own=own, freeze=freeze)
    step = functools.partial(
        distill_step,
        **setting(accumulate),
        optimizer=optimizer,
        ema_decay=0.9,
        norm=functools.partial(trained_norm, freeze=("method", *freeze)),
        whole_norm=functools.partial(trained_norm, freeze=freeze),
    )
    mapped = parallel(step, in_axes=(None, None, 0, None), replicated=True)
    return mapped, jax.device_get(init_state(variables, learnt, optimizer, ema=True, scaled=True)), replicate(taught)


def stepped(
    state: TrainState, batch: Batch, freeze: tuple[str, ...] = (), teacher: Any = None, accumulate: int = 1
) -> tuple[Any, Any]:
    step, _, variables = make(freeze, accumulate)
    return jax.device_get(step(replicate(state), teacher or variables, split(batch, parts=accumulate), KEY))


def different(before: TrainState, after: TrainState) -> list[str]:
    """Paths of what of a state is not the same to the bit."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [jax.tree_util.keystr(path) for (path, x), y in pairs if np.asarray(x).tobytes() != np.asarray(y).tobytes()]


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind in Faults._fields for value in (np.nan, np.inf, -np.inf)], ids=str
)
def test_one_bad_image_on_one_of_eight_devices_leaves_the_state_as_it_is_to_the_bit(kind, value):
    state, good = stepped(make()[1], images(0))
    after, metrics = stepped(state, faulty(kind, value))
    assert (good["skipped"], metrics["skipped"]) == (0, 1)
    assert different(state, after) == [".step"]
    assert after.step == 2
    # The loss, the gradient, or a gradient that has an optimiser of its own.
    found = [np.isfinite(metrics[name]) for name in ("loss", "grad_norm")]
    assert found == {"loss": [False, True], "gradient": [True, False], "method": [True, True]}[kind]


@pytest.mark.parametrize(("kind", "image"), [("loss", 5), ("gradient", 5), ("loss", 13)], ids=str)
def test_a_bad_image_in_one_part_of_an_accumulated_batch_leaves_the_state_as_it_is(kind, image):
    """Batch statistics pass from part to part, and the first step of all leaves the scale to be found."""
    state = make(accumulate=2)[1]
    after, metrics = stepped(state, faulty(kind, np.inf, image), accumulate=2)
    assert metrics["skipped"] == 1
    assert different(state, after) == [".step"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_each_term_says_which_layers_go_wrong(accumulate):
    state, teacher = make()[1:]

    def norms(term: str, batch: Batch) -> dict[str, Any]:
        def of_layers(*arguments: Any) -> Any:
            return layer_norms(term_gradient(*arguments, term=term, **setting(accumulate)), freeze=("student/norm",))

        mapped = parallel(of_layers, in_axes=(None, None, 0, None), replicated=False)
        return {x: y[0] for x, y in mapped(replicate(state), teacher, split(batch, parts=accumulate), KEY).items()}

    bad = {term: norms(term, faulty("gradient", np.inf)) for term in ("cls", "box", "gain")}
    assert all(layers.keys() == {"student/backbone", "student/head", "method"} for layers in bad.values())
    wrong = {(term, x) for term, layers in bad.items() for x, norm in layers.items() if not np.isfinite(norm)}
    assert wrong == {("box", "student/head")}
    assert {x for x, norm in bad["cls"].items() if norm > 0} == {"student/backbone"}
    assert {x for x, norm in bad["gain"].items() if norm > 0} == {"student/backbone", "method"}
    # Of the square of the bias, 1.
    np.testing.assert_allclose(norms("box", images(1))["student/head"], 2.0)


def test_an_infinite_feature_of_the_teacher_leaves_the_state_as_it_is():
    state, _ = stepped(make()[1], images(0))
    infinite = jax.tree.map(lambda x: x * np.float32(np.inf), make()[2])
    after, metrics = stepped(state, images(1), teacher=infinite)
    assert metrics["skipped"] == 1
    assert different(state, after) == [".step"]
    white = images(1)
    white.images[3, 2, 2] = 255
    after, metrics = stepped(state, white)
    assert different(state, after) == [".step"]
    assert not np.isfinite(metrics["raw/cls"])


def test_weights_are_not_made_infinite_by_a_finite_gradient():
    state, _ = stepped(make()[1], images(0))
    # The rate is 2, and the next sum twice that is beyond float32.
    state = state.replace(
        opt_state=jax.tree.map(lambda x: np.full_like(x, 3e38) if x.ndim == 2 else x, state.opt_state)
    )
    after, metrics = stepped(state, images(1))
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert metrics["skipped"] == 1
    assert different(state, after) == [".step"]


def test_the_first_step_that_is_finite_finds_the_scale_of_the_methods():
    state, _ = stepped(make()[1], faulty("loss", np.nan))
    assert state.scale == 0
    after, metrics = stepped(state, images(1))
    assert after.scale == metrics["method_scale"] > 0
    everything = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert different(state, after) == everything


def test_the_gradient_of_what_is_frozen_is_not_looked_at():
    freeze = ("student/head",)
    state = make(freeze)[1]
    after, metrics = stepped(state, faulty("gradient", np.inf), freeze)
    assert metrics["skipped"] == 0
    assert ".params['student']['backbone']['kernel']" in different(state, after)
    assert ".params['student']['head']['bias']" not in different(state, after)


BUILT: list[Any] = []
"""The modules and the step, once built: all damaged runs share them."""


def spoilt(tree: Any) -> Any:
    return jax.tree.map(lambda x: x * np.float32(np.nan), tree)


def run_damaged(config: Any, workdir: Path, bad: set[int], stop: int | None = None) -> None:
    """A run whose teacher is NaN in some steps, counted from 1, and which one step ends."""
    original = train.build

    def build(*arguments):
        BUILT[:] = BUILT or [original(*arguments)]
        built = BUILT[0]

        def step(state, teacher, batch, key):
            number = int(state.step) + 1
            if number == stop:
                raise RuntimeError("stopped")
            if number in bad:
                teacher = spoilt(teacher)
            return built.step(state, teacher, batch, key)

        def term_norms(term):
            norms = built.term_norms(term)
            return lambda state, teacher, batch, key: norms(state, spoilt(teacher), batch, key)

        return built._replace(step=step, term_norms=term_norms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", build)
        pipeline.run(config, workdir)


def config_of(data_dir: Path, **options: Any) -> Any:
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    config.sinks = ()
    config.student.update(steps=9, log_every=2, **options)
    return config


def names_in(config: Any, step: int) -> list[str]:
    """Of the images of a step, counted from 1."""
    plan = resolve(config, devices=8)
    source = open_split(plan.data, plan.task, training=True)
    return [source.name(x) for x in images_of_step(plan, plan["student"], source, step - 1)]


@pytest.mark.slow
def test_a_skipped_step_is_named_and_left_out_of_the_means_and_a_run_goes_on_as_if_never_stopped(
    teacher, data_dir, tmp_path, capsys
):
    config = config_of(data_dir, checkpoint_every=4)
    whole, stopped = (with_teacher(teacher, tmp_path / name) for name in ("whole", "stopped"))
    run_damaged(config, whole, {2, 3})
    shown = capsys.readouterr().out
    for step in (2, 3):
        assert f"[student] step {step} was skipped: raw/mimic is nan, raw/mimic/p3 is nan" in shown
        assert f"It saw {', '.join(names_in(config, step))}." in shown
    assert shown.count("was skipped") == 2
    of_step = rows(whole / "stages" / "student")
    assert [row["skipped"] for row in of_step] == [1, 1, 0, 0, 0]
    assert all(np.isfinite(row["loss"]) for row in of_step)
    with pytest.raises(RuntimeError, match="stopped"):
        run_damaged(config, stopped, {2, 3}, stop=5)
    run_damaged(config, stopped, {2, 3})
    assert "continues from the checkpoint of step 4" in capsys.readouterr().out
    students = [kdjax.load_student(workdir / "student")[1] for workdir in (whole, stopped)]
    jax.tree.map(np.testing.assert_array_equal, *students)


@pytest.mark.slow
def test_five_in_a_row_end_the_run_with_a_report(teacher, data_dir, tmp_path, capsys):
    config = config_of(data_dir, checkpoint_every=3)
    folder = with_teacher(teacher, tmp_path) / "stages" / "student"
    # Two are not enough, and the five are in several lines.
    with pytest.raises(NumericError, match=r"steps 4 to 8 were skipped \(raw/mimic is nan.*learning_rate.*nan_report"):
        run_damaged(config, tmp_path, {1, 2, 4, 5, 6, 7, 8})
    assert capsys.readouterr().out.count("was skipped") == 7
    report = json.loads((folder / "nan_report.json").read_text())
    assert [step["step"] for step in report["steps"]] == [4, 5, 6, 7, 8]
    for step in report["steps"]:
        assert [image["name"] for image in step["images"]] == names_in(config, step["step"])
        assert step["metrics"]["raw/mimic"] == "nan"
        assert step["metrics"]["raw/cls"] > 0
    norms = report["gradient_norms"]
    assert norms.keys() == {"cls", "box", "mimic"}
    assert all(isinstance(x, float) for term in ("cls", "box") for x in norms[term].values())
    assert norms["mimic"]["student/backbone/conv1"] == "nan"
    assert norms["cls"]["student/backbone/conv1"] > 0
    assert report["config"]["student"]["optimizer"]["learning_rate"] == config.student.optimizer.learning_rate
    assert [row["skipped"] for row in rows(folder)] == [2, 0, 1, 2, 2]
    assert [row["loss"] is None for row in rows(folder)] == [True, False, True, True, True]
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_weights_that_a_rate_blows_up_are_never_infinite_in_a_checkpoint(teacher, data_dir, tmp_path):
    config = config_of(data_dir, checkpoint_every=1)
    config.student.optimizer.update(learning_rate=1e36, warmup_steps=0, clip_norm=0.0)
    folder = with_teacher(teacher, tmp_path) / "stages" / "student"
    with pytest.raises(NumericError, match="learning_rate"):
        pipeline.run(config, tmp_path)
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as reader:
        for item in ("student", "rest"):
            for x in jax.tree.leaves(reader.restore(newest / item)):
                assert np.isfinite(x).all()
