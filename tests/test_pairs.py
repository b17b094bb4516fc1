"""The pairs of the papers: every method's config of each is valid, and each takes two steps at tiny size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import pairs, papers
from kdjax.devices import replicate, split
from kdjax.distill import Applied, distill_loss
from kdjax.errors import UserError
from kdjax.methods import build_method
from kdjax.models import build_model
from kdjax.plan import check_files, resolve
from kdjax.run.build import Facts, build, first_state
from kdjax.run.floor import teacher_floor
from kdjax.types import View
from kdjax.weights import COCO_NAMES, SOURCES
from tests import tiny
from tests.slow import slow_but
from tests.test_config import CONFIGS, load

FILES = {path.stem: path for path in CONFIGS}

# Each pair with one method, so that each method meets pairs of several kinds.
METHODS = {
    "retinanet_x101_r50": "mgd",
    "retinanet_r101_r50": "icd",
    "retinanet_r50_r18": "mimic",
    "faster_rcnn_r101_r50": "maskd",
    "mask_rcnn_r101_r50": "icd",
    "cascade_mask_rcnn_x101_faster_rcnn_r50": "maskd",
    "cascade_mask_rcnn_x101_mask_rcnn_r50": "mgd",
    "fcos_r101_r50": "dmkd",
    "reppoints_x101_r50": "maskd",
    "fcos_x101_retinanet_r50": "dfmsd",
    "retinanet_r101_fcos_r50": "icd",
    "gfl_r101_r18": "ld",
    "gfl_r101_r50": "mgd",
    "solo_r101_r50": "mgd",
}
QUICK = ("retinanet_r50_r18",)


def test_each_pair_has_a_test():
    assert METHODS.keys() == pairs.PAIRS.keys()


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_every_methods_config_of_a_pair_is_valid_where_the_files_are(name, tmp_path, monkeypatch):
    """And its teachers have the floors of their model zoo, on COCO's classes."""
    monkeypatch.chdir(tmp_path)
    for path in (FILES[method] for method in (*papers.methods_of(name), "none")):
        config, pair = load(path, name), pairs.PAIRS[name]
        for stage in config.stages:
            if config[stage].weights:
                (tmp_path / config[stage].weights).touch()
        plan = resolve(config, devices=8)
        assert all(stage.options.batch_size == 16 for stage in plan.stages)
        assert plan["student"].steps in (43_980, 87_960, 90_000, 175_920)
        # What is measured as it was published is so in the arithmetic of the publishers.
        dtypes = {stage.name: stage.options.dtype for stage in plan.stages}
        assert dtypes == {name: "bfloat16" if plan[name].steps else "float32" for name in dtypes}
        assert plan.data.resize == SOURCES[config.teacher.source].resize
        if config.student.teacher:
            published = config.teacher.published
            assert teacher_floor(plan, plan["student"], COCO_NAMES) == (published - 1 if published else None)
            assert teacher_floor(plan, plan["student"], ("cat", "dog")) is None
        if path.stem == "dfmsd":
            assert teacher_floor(plan, plan["first_student"], COCO_NAMES) == pair.weaker.ap - 1


def test_a_teacher_that_learns_other_classes_is_trained_as_its_file_was():
    teacher = load(FILES["mgd"], "faster_rcnn_r101_r50").teacher
    assert teacher.optimizer.name == "sgd"
    assert teacher.optimizer.learning_rate == 0.02
    assert "student/backbone/layer1_2" in teacher.freeze


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"config.teacher.weights is 'retinanet_x101.*\.pth', but there is no such file"
    ):
        check_files(resolve(load(FILES["mgd"], "retinanet_x101_r50"), devices=8))


def test_ld_has_the_pairs_of_gfls_alone():
    assert load(FILES["ld"], "gfl_r101_r50").student.loss_weights.ld == 0.5
    with pytest.raises(UserError, match="choose shapes, tiny, or a pair: gfl_r101_r18, gfl_r101_r50"):
        load(FILES["ld"], "retinanet_r101_r50")


def test_an_unknown_pair_is_refused_with_the_choices():
    with pytest.raises(
        UserError, match=r"no variant 'coco' of this config; choose shapes, fcos, .*, tiny, or a pair: retina"
    ):
        load(FILES["mgd"], "coco")


@pytest.mark.parametrize(("variant", "kind"), pairs.EMBEDDED.items())
def test_every_methods_config_has_each_kind_on_the_embedded_data(variant, kind):
    for path in (FILES[method] for method in (*papers.METHODS, "none")):
        config = load(path, variant)
        resolve(load(path, f"{variant}:tiny"), devices=8)
        for stage in resolve(config, devices=8).stages:
            assert stage.options.model["name"] == kind
            module = build_model(stage.options.model, num_classes=tiny.CLASSES)
            levels = {level for method in stage.options.methods.values() for level in method.levels}
            assert levels <= module.strides.keys()
            assert set(stage.options.loss_weights) >= set(module.terms)
        assert config.data.masks == (kind == "solo")
        assert config.teacher.model.head == config.student.model.head


def drawn(module, images):
    """Variables of a module, positive and small; initialising it would compile for longer than its step runs."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(1), images)
    return jax.tree.map(lambda x: rng.uniform(0, 1 / max(1, np.prod(x.shape[:-1])), x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("retinanet_r101_r50",),
        (
            "retinanet_r101_r50",
            "gfl_r101_r50",
            "reppoints_x101_r50",
            "cascade_mask_rcnn_x101_faster_rcnn_r50",
            "retinanet_r101_fcos_r50",
            "fcos_r101_r50",
        ),
    ),
)
def test_the_tokens_of_every_kind_of_teacher_have_a_loss(name):
    """Traced only, with what the config says that batches have."""
    config = load(FILES["maskd"], f"{name}:tiny")
    batch = tiny.batch(masks=config.data.masks)
    teacher = build_model(config.tokens.model.to_dict(), num_classes=tiny.CLASSES)
    method = build_method({"name": "maskd_tokens"})
    images, keys = batch.images.astype(np.float32), jax.random.split(jax.random.key(0), 8)

    def loss():
        variables = teacher.init(keys[0], images)
        features = teacher.apply(variables, images, method="features")
        seen = View(features, teacher.strides)
        learnt = method.init(keys[0], seen, None, size=batch.size, own_loss=lambda _: {})
        params = {"student": variables["params"], "method": learnt["params"]}
        methods = {"maskd_tokens": Applied(method)}
        stage = {"student": teacher, "teacher": None, "methods": methods, "loss_weights": config.tokens.loss_weights}
        statistics = variables["batch_stats"]
        return distill_loss(params, statistics, None, batch, keys, jnp.int32(0), **stage)[1][0]

    terms = {key.removeprefix("raw/") for key in jax.eval_shape(loss) if key.startswith("raw/") and key.count("/") == 1}
    assert terms == {*teacher.terms, *(f"masked_{term}" for term in teacher.terms), "dice"}


@pytest.mark.parametrize(
    ("name", "weights", "taus"),
    [
        ("retinanet_x101_r50", (10.0, 10.0), (0.5, 0.5)),
        ("faster_rcnn_r101_r50", (10.0, 6.0), (0.5, 0.5)),
        ("fcos_x101_retinanet_r50", (10.0, 10.0), (0.5, 0.8)),
    ],
)
def test_each_stage_of_dfmsd_has_the_settings_of_its_teacher(name, weights, taus):
    config = load(FILES["dfmsd"], name)
    stages = config.first_student, config.student
    assert tuple(stage.methods.dfmsd.stage for stage in stages) == (1, 2)
    assert tuple(stage.loss_weights.dfmsd for stage in stages) == weights
    assert tuple(stage.methods.dfmsd.tau for stage in stages) == taus


def test_a_student_is_optimised_as_its_own_kind_whoever_teaches():
    """FCOS with its clipping, at the rate of one-stage detectors; a RetinaNet that MasKD distils twice as fast."""
    students = {name: load(FILES["maskd"], name).student for name in pairs.PAIRS}
    options = {name: student.optimizer for name, student in students.items()}
    rates = {name: (x.learning_rate, x.clip_norm, x.warmup_steps) for name, x in options.items()}
    assert rates["retinanet_r101_r50"] == rates["retinanet_x101_r50"] == (0.02, 35.0, 1000)
    assert rates["retinanet_r101_fcos_r50"] == rates["fcos_r101_r50"] == (0.01, 35.0, 500)
    assert load(FILES["mimic"], "retinanet_r101_fcos_r50").student.optimizer.clip_norm == 35.0
    assert load(FILES["none"], "retinanet_r101_r50").student.optimizer.clip_norm == 0.0


@pytest.mark.parametrize("name", slow_but(QUICK, pairs.PAIRS))
def test_a_pair_takes_two_steps(name):
    config = load(FILES[METHODS[name]], f"{name}:tiny")
    batch = tiny.batch(masks=config.data.masks)
    module = build_model(config.teacher.model.to_dict(), num_classes=tiny.CLASSES)
    variables = drawn(module, batch.images[:1].astype(np.float32))
    plan = resolve(config, devices=8)
    stage = plan["student"]
    built = build(stage, Facts(plan.task, tiny.CLASSES, (tiny.SIZE, tiny.SIZE), teacher=module))
    state = first_state(stage, built, jax.random.key(0), start=lambda variables: variables, given={})
    before = jax.device_get(state.params["student"])
    for _ in range(2):
        state, metrics = built.step(state, replicate(variables), split(batch), replicate(jax.random.key(0)))
    terms = {key.removeprefix("raw/") for key in metrics if key.startswith("raw/")}
    assert terms >= {*built.student.terms, METHODS[name]}
    assert all(np.isfinite(value) for value in jax.tree.leaves(jax.device_get(metrics)))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params["student"]))
    assert any(jax.tree.leaves(moved["neck"]))
    assert any(jax.tree.leaves(moved["head"]))
