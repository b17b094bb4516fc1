"""MobileNetV2: torchvision's parameter counts, and where it strides and dilates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kdjax.errors import UserError
from kdjax.models.mobilenet import MobileNetV2

COUNT = 3_504_872 - 1_281_000
"""torchvision's parameters, less those of its classifier (1280 * 1000 + 1000)."""


def look(module, size=(65, 96)):
    """Shapes of the maps and variables, and stride and dilation of every 3x3 convolution."""
    seen = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.module.kernel_size == (3, 3):
            seen.append((context.module.strides, context.module.kernel_dilation))
        return call(*args, **kwargs)

    def run():
        with nn.intercept_methods(note):
            return module.init_with_output(jax.random.key(0), jnp.zeros((1, *size, 3)))

    maps, variables = jax.eval_shape(run)
    return maps, variables, seen


def parameters(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def test_has_torchvisions_number_of_parameters_and_maps_of_four_strides():
    maps, variables, seen = look(MobileNetV2(last=True))
    assert parameters(variables) == COUNT
    assert {name: x.shape[1:] for name, x in maps.items()} == {
        "c2": (17, 24, 24),
        "c3": (9, 12, 32),
        "c4": (5, 6, 96),
        "c5": (3, 3, 1280),
    }
    assert [number for number, (stride, _) in enumerate(seen) if stride == 2] == [0, 2, 4, 7, 14]
    assert {dilation for _, dilation in seen} == {1}


def test_at_stride_8_dilation_stands_for_strides_from_block_7():
    module = MobileNetV2(output_stride=8)
    maps, variables, seen = look(module)
    assert parameters(variables) == COUNT - 320 * 1280 - 2 * 1280
    assert {name: x.shape[1:3] for name, x in maps.items()} == {
        "c2": (17, 24),
        "c3": (9, 12),
        "c4": (9, 12),
        "c5": (9, 12),
    }
    assert module.strides == {"c2": 4, "c3": 8, "c4": 8, "c5": 8}
    assert maps["c5"].shape[-1] == 320
    assert [number for number, (stride, _) in enumerate(seen) if stride == 2] == [0, 2, 4]
    assert [dilation for _, dilation in seen] == [1] * 8 + [2] * 7 + [4] * 3


def test_width_scales_all_channels_but_those_of_the_last_convolution():
    maps, variables, _ = look(MobileNetV2(width=0.25, last=True))
    assert [x.shape[-1] for x in maps.values()] == [8, 8, 24, 1280]
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, 8)


def test_refuses_other_strides():
    with pytest.raises(UserError, match="output_stride is 16; it must be 32 or 8"):
        MobileNetV2(output_stride=16)
