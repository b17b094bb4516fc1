"""What strangers hand over in another form than is meant: one sentence each, from every loss and every mask."""

import jax
import jax.numpy as jnp
import pytest

from kdjax import losses
from kdjax.losses.icd import ClassStatistics
from kdjax.methods import METHODS
from kdjax.methods.levels import pair_levels
from kdjax.types import Targets, View
from tests.losses.test_contract import LOSSES

N, H, W, C = 2, 6, 5, 8
X = jnp.ones((N, H, W, C))
TURNED = jnp.moveaxis(X, -1, 1)
KEYS = jax.random.split(jax.random.key(0), N)
KEEP = jnp.ones((N, H, W, 1), bool), jnp.ones((N, 1, 1, C), bool)
WHERE = jnp.ones((N, H, W), bool)
MAPS = [name for name in LOSSES if name != "icd_loss"]
"""Losses of maps; ICD's takes the values of an attention."""


def double(x):
    return 2 * x


ONE_MAP = {
    "spatial_attention": losses.spatial_attention,
    "channel_attention": losses.channel_attention,
    "dual_keep": losses.dual_keep,
    "stage_keep": lambda x, where: losses.stage_keep(x, stage=1, where=where),
    "channel_norm": losses.channel_norm,
    "token_masks": lambda x, where: losses.token_masks(x, jnp.ones((3, C)), where=where),
    "token_weights": lambda x, where: losses.token_weights(
        x, (jnp.ones((3, 3, C, C)), jnp.ones((1, 1, C, 3))), (jnp.ones(C), jnp.ones(3)), where=where
    ),
    "dual_reconstruction": lambda x, where: losses.dual_reconstruction(
        x, keep=KEEP, generate=(double, double), fusion=jnp.zeros(2), where=where
    ),
}


def sentence(call):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("name", MAPS)
def test_losses_refuse_maps_of_another_form(name):
    loss = LOSSES[name]
    assert "features must be (N, H, W, C)" in sentence(lambda: loss(X[0], X[0], None, None))
    assert "uint8" in sentence(lambda: loss(X.astype(jnp.uint8), X.astype(jnp.uint8), None, None))
    assert "it must be (N, H, W) of features" in sentence(lambda: loss(X, X, WHERE[..., None], None))
    assert "looks like (N, C, H, W)" in sentence(lambda: loss(TURNED, TURNED, WHERE, None))


@pytest.mark.parametrize("name", [name for name in MAPS if name != "maskd_loss"])
def test_maps_of_two_widths_with_channels_first_are_named(name):
    wide = jnp.ones((N, 3 * C, H, W))
    assert "(N, C, H, W); features must be (N, H, W, C): jnp.moveaxis" in sentence(
        lambda: LOSSES[name](TURNED, wide, None, None)
    )


@pytest.mark.parametrize("name", ONE_MAP)
def test_functions_of_one_map_refuse_another_form(name):
    call = ONE_MAP[name]
    assert "must be (N, H, W, C), of floats" in sentence(lambda: call(X[0], where=None))
    assert "looks like (N, C, H, W)" in sentence(lambda: call(TURNED, where=WHERE))
    assert "(N, H, W) of features" in sentence(lambda: call(X, where=WHERE[0]))
    call(X, where=WHERE)


KEYED = {
    "keep_mask": lambda keys: losses.keep_mask(X.shape, keys=keys, mask_ratio=0.5),
    "dual_keep": lambda keys: losses.dual_keep(X, keys=keys),
    "stage_keep": lambda keys: losses.stage_keep(X, stage=1, keep_probability=0.5, keys=keys),
    "attention_keep": lambda keys: losses.attention_keep(X, keep_probability=0.5, keys=keys),
    "sample_queries": lambda keys: losses.sample_queries(
        Targets(jnp.zeros((N, 3, 4)), jnp.zeros((N, 3), int), jnp.zeros((N, 3), bool)),
        image_size=jnp.full((N, 2), 8),
        keys=keys,
        statistics=losses.uniform_statistics(2),
    ),
}


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize(
    "keys", [jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), N), KEYS[:1], KEYS[None]]
)
def test_keys_of_another_form_are_refused(name, keys):
    assert "it must hold a typed key for each image: jax.random.split(jax.random.key(0), 2)." in sentence(
        lambda: KEYED[name](keys)
    )
    KEYED[name](KEYS)


TRACED = {
    "mask_ratio": lambda x: losses.keep_mask(X.shape, keys=KEYS, mask_ratio=x),
    "ratio": lambda x: losses.attention_keep(X, ratio=x),
    "keep_probability": lambda x: losses.dual_keep(X, keep_probability=x, keys=KEYS),
    "stage": lambda x: losses.stage_keep(X, stage=x),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_numbers_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} is traced; it must be a plain number: close over it, or name it"):
        jax.jit(TRACED[name])(0.5)


WRONG = {
    "shape is (6, 5, 8); it must be (N, H, W, C)": lambda: losses.keep_mask((H, W, C), keys=KEYS, mask_ratio=0.5),
    "keep has shape (2, 6, 5); of features (2, 6, 5, 8) it must be (2, 6, 5, 1) or (2, 1, 1, 8)": lambda: (
        losses.mgd_loss(X, X, keep=KEEP[0][..., 0], generate=double)
    ),
    "keep has shape (2, 8, 6, 1); of": lambda: losses.mgd_loss(
        X, X, keep=losses.keep_mask(TURNED.shape, keys=KEYS, mask_ratio=0.5), generate=double
    ),
    "keep has shape (2, 8, 1, 1); of": lambda: losses.dmkd_loss(
        X, X, keep=(KEEP[0], jnp.ones((N, C, 1, 1))), generate=(double, double), fusion=jnp.zeros(2)
    ),
    "objects has shape (2, 6, 5); of (2, 6, 5, 8) it must be (N, H, W, 1)": lambda: losses.stage_keep(
        X, stage=1, objects=WHERE
    ),
    "tokens has shape (8, 3); of features (2, 6, 5, 8) it must be (K, C)": lambda: losses.token_masks(
        X, jnp.ones((8, 3))
    ),
    "instance_mask has shape (2, 6); of (2, 6, 5, 8) it must be (N, heads, S)": lambda: losses.icd_loss(
        X, X, instance_mask=jnp.ones((N, H))
    ),
    "real has shape (2, 4) and query (2, 6, 5, 8); query must be (N, heads, Q, D)": lambda: losses.instance_attention(
        X, X, X, real=jnp.ones((N, 4), bool)
    ),
    "where has shape (2, 6, 5) and query": lambda: losses.instance_attention(
        X, X, X, real=jnp.ones((N, W), bool), where=WHERE
    ),
    "key has shape (2, 5, 8) and query": lambda: losses.instance_attention(X, X[:, 0], X, real=jnp.ones((N, W), bool)),
}


@pytest.mark.parametrize("words", WRONG)
def test_other_arrays_of_another_form_are_refused(words):
    assert words in sentence(WRONG[words])


SIZE = jnp.full((N, 2), 64)
LEVELS = {f"p{k}": jnp.ones((N, 64 >> k, 48 >> k, C)) for k in (3, 4)}
STRIDES = {"p3": 8, "p4": 16}
GOOD = View(LEVELS, STRIDES)
VIEWS = {
    "The student has features 'p4' and strides of p3: name the stride": (View(LEVELS, {"p3": 8}), GOOD),
    "The teacher's features (2, 8, 8, 6), (2, 8, 4, 3) look like (N, C, H, W); they": (
        GOOD,
        View({level: jnp.moveaxis(x, -1, 1) for level, x in LEVELS.items()}, STRIDES),
    ),
    "student's p3 is float32[8, 6, 8]; features must be (N, H, W, C)": (View({"p3": LEVELS["p3"][0]}, STRIDES), GOOD),
    "The student's p3 (2, 8, 6, 8) of stride 8 and the teacher's p3 (2, 64, 8, 6) of stride 8 cover 64 and 512": (
        GOOD,
        View({"p3": jnp.ones((N, 64, 8, 6))}, STRIDES),
    ),
}


@pytest.mark.parametrize("words", VIEWS)
def test_views_of_another_form_are_refused(words):
    assert words in sentence(lambda: pair_levels(*VIEWS[words], SIZE))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "keys" in method.needs])
def test_methods_refuse_a_single_key(name):
    targets = Targets(jnp.zeros((N, 3, 4)), jnp.zeros((N, 3), int), jnp.zeros((N, 3), bool))
    statistics = ClassStatistics(jnp.ones(2) / 2, jnp.full((2, 2), 0.2), jnp.full((2, 2), 0.2))
    given = {"size": SIZE, "targets": targets, "keys": jax.random.key(0), "step": 0, "statistics": statistics}
    method = METHODS[name]()
    needed = {need: given[need] for need in method.needs}
    with pytest.raises(ValueError, match=r"^keys is .*; it must hold a typed key for each image"):
        jax.eval_shape(method.init, jax.random.key(0), GOOD, GOOD, **needed)
