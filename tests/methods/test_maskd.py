"""MasKD beyond the contract: what its two stages learn, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.distill import Applied, distill_step
from kdjax.methods import build_method
from kdjax.optim import by_part, make_optimizer
from kdjax.saved import load_method, save_method
from kdjax.state import init_state
from tests import tiny
from tests.methods import calls
from tests.methods.test_contract import SIZE, STEP, given, keys, own_loss, pyramids, setup, targets


def masked_imitation(params, step, **options):
    method = build_method({"name": "maskd"} | options)
    terms = jax.jit(lambda params, step: calls.terms(method, params, *pyramids("maskd"), **given(step=step)))
    return terms(params, step)["maskd"]


def test_the_students_masks_take_part_after_the_warm_up():
    params = setup("maskd")[0]
    # Tokens as long as learnt ones: at the start all masks are a half.
    params = params | {"tokens": jax.tree.map(lambda x: 100 * x, params["tokens"])}
    first, last, after = (float(masked_imitation(params, jnp.int32(step), warmup_steps=7)) for step in (0, 6, 7))
    never = float(masked_imitation(params, STEP, warmup_steps=10**9))
    assert first == last == never
    assert after != never


def test_tokens_get_no_gradient_from_the_imitation_and_the_alignment_does():
    params, _, gradients, _ = setup("maskd")
    moved = gradients(params, *pyramids("maskd"), SIZE, targets(), keys(2), STEP)["maskd"]["method"]
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(moved["tokens"]))
    assert all(float(jnp.abs(x).max()) > 0 for level in ("p4", "p5") for x in jax.tree.leaves(moved[f"align_{level}"]))


def test_the_alignment_is_there_even_at_equal_widths():
    _, teacher = pyramids("maskd")
    method = build_method({"name": "maskd"})
    shapes = jax.eval_shape(lambda: calls.init(method, teacher, teacher, **given()))
    assert {"align_p4", "align_p5", "tokens"} == shapes.keys()


def test_plain_masks_have_tokens_alone():
    method = build_method({"name": "maskd_tokens", "weighted": False})
    params = jax.eval_shape(lambda: calls.init(method, pyramids("mgd")[1], {}, **given()))
    assert jax.tree.map(jnp.shape, params) == {"tokens": {level: {"tokens": (6, 8)} for level in ("p4", "p5")}}


def test_both_stages_name_their_tokens_alike():
    student, teacher = pyramids("maskd")
    tokens, imitation = build_method({"name": "maskd_tokens"}), build_method({"name": "maskd"})
    learnt = jax.eval_shape(lambda: calls.init(tokens, teacher, {}, **given()))
    used = jax.eval_shape(lambda: calls.init(imitation, student, teacher, **given()))
    assert learnt == {"tokens": used["tokens"]}


def test_weights_start_as_the_authors_kernels_do():
    method = build_method({"name": "maskd_tokens"})
    wide = {"p4": jnp.ones((2, 4, 4, 64))}
    level = jax.jit(lambda: calls.init(method, wide, {}, **given()))()["tokens"]["p4"]
    for name, shape in (("kernel_0", (3, 3, 64, 64)), ("kernel_1", (1, 1, 64, 6))):
        assert level[name].shape == shape
        assert np.std(level[name]) == pytest.approx((2 / (shape[0] * shape[1] * shape[3])) ** 0.5, rel=0.15)
    assert np.std(level["tokens"]) == pytest.approx(0.01, rel=0.15)
    assert not level["bias_0"].any()
    assert not level["bias_1"].any()


def test_the_token_stage_moves_tokens_alone():
    """Weights, statistics and heads of the teacher stay to the bit; its loss falls with what its tokens learn."""
    detector = tiny.detector().clone(frozen_norm=True)
    method = build_method({"name": "maskd_tokens"})
    batch = tiny.batch(4)
    images = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    variables = jax.jit(detector.init)(jax.random.key(0), images)
    features = jax.eval_shape(lambda: detector.apply(variables, images, method="features"))
    features = jax.tree.map(lambda x: jnp.ones(x.shape), features)
    needed = {"size": jnp.asarray(batch.size[:1]), "own_loss": own_loss}
    learnt = {"params": jax.jit(lambda: calls.init(method, features, {}, **needed))()}
    optimizer = make_optimizer(lambda step: 0.01, name="adam", weight_decay=1e-3, decay_all=True)
    optimizer = by_part(optimizer, freeze=("student",))
    step = jax.jit(
        functools.partial(
            distill_step,
            student=detector,
            teacher=None,
            methods={"maskd_tokens": Applied(method)},
            optimizer=optimizer,
            loss_weights={"cls": 0.0, "box": 0.0},
        )
    )
    first = state = init_state(variables, learnt, optimizer)
    curve = []
    for _ in range(10):
        state, metrics = step(state, None, batch, jax.random.key(3))
        curve.append(metrics)
    jax.tree.map(np.testing.assert_array_equal, first.student(), state.student())
    for before, after in zip(*(jax.tree.leaves(x.params["method"]) for x in (first, state)), strict=True):
        assert not np.array_equal(before, after)
    assert {"raw/masked_cls", "raw/masked_box", "raw/dice"} < curve[0].keys()
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["raw/dice"] < curve[0]["raw/dice"]


def test_what_was_learnt_survives_its_folder(tmp_path):
    params = setup("maskd_tokens")[0]
    save_method(tmp_path / "method", params, {"name": "maskd_tokens"})
    jax.tree.map(np.testing.assert_array_equal, load_method(tmp_path / "method"), params)


def test_a_folder_without_a_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no method"):
        load_method(tmp_path)
