"""Groups that are merged for a TPU compute the same convolution, and no other platform's program changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.grouped import grouped_conv, merge_groups
from kdjax.models.resnet import Bottleneck

CONV = dict(padding=((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("groups", "times", "channels", "outputs", "stride"), [(8, 4, 2, 3, 1), (8, 8, 4, 4, 2), (6, 3, 1, 2, 1)]
)
def test_merged_groups_are_the_same_convolution_and_have_its_gradients(groups, times, channels, outputs, stride):
    """Of small whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (2, 7, 6, groups * channels)).astype(np.float32)
    kernel = rng.integers(-8, 9, (3, 3, channels, groups * outputs)).astype(np.float32)
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(stride, stride), **CONV)

    def apart(x, kernel):
        return conv(x, kernel, feature_group_count=groups)

    def merged(x, kernel):
        return conv(x, merge_groups(kernel, groups, times), feature_group_count=groups // times)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, x, kernel):
        y, pull = jax.vjp(function, x, kernel)
        return y, pull(jnp.round(y / 16))

    jax.tree.map(np.testing.assert_array_equal, run(merged, x, kernel), run(apart, x, kernel))


@pytest.mark.parametrize(
    ("groups", "channels", "left"),
    [(64, 4, 2), (64, 32, 16), (32, 8, 2), (48, 3, 2), (4, 128, 4), (3, 256, 3), (1, 8, 1)],
)
def test_tpus_have_groups_of_up_to_128_channels_and_others_the_groups_as_they_are(groups, channels, left):
    x = jax.ShapeDtypeStruct((1, 4, 4, groups * channels), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, groups * channels), jnp.bfloat16)
    grouped = functools.partial(grouped_conv, strides=(1, 1), feature_group_count=groups, **CONV)
    for platform, count in (("tpu", left), ("cpu", groups), ("cuda", groups)):
        text = lowered(grouped, platform, x, kernel)
        assert f"feature_group_count = {count} : i64" in text
        assert text.count("stablehlo.convolution") == 1


def test_a_block_convolves_as_its_field_says():
    def groups(merge):
        block = Bottleneck(channels=32, stride=1, groups=8, base_width=8, merge_groups=merge)
        x = jnp.zeros((1, 4, 4, 8))
        variables = jax.eval_shape(block.init, jax.random.key(0), x)
        assert variables["params"]["conv2"]["kernel"].shape == (3, 3, 4, 32)
        text = lowered(block.apply, "tpu", variables, x)
        return [f"feature_group_count = {count} : i64" in text for count in (8, 1)]

    assert groups(merge=True) == [False, True]
    assert groups(merge=False) == [True, True]


def test_a_layer_has_the_values_that_flax_gives_it():
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 16)).astype(np.float32)
    plain = nn.Conv(32, (3, 3), 2, padding=1, feature_group_count=8, use_bias=False)
    layer = plain.clone(conv_general_dilated=grouped_conv)
    variables = plain.init(jax.random.key(0), x)
    np.testing.assert_array_equal(jax.jit(layer.apply)(variables, x), jax.jit(plain.apply)(variables, x))
    np.testing.assert_array_equal(layer.apply(variables, x), plain.apply(variables, x))
