import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

KEYS = jax.random.split(jax.random.key(0), 4)
SHAPE = (4, 32, 24, 512)


@pytest.mark.parametrize("mask", ["spatial", "channel"])
@pytest.mark.parametrize("mask_ratio", [0, 0.0, 0.15, 0.65, 1.0, 1])
def test_share_of_hidden_places(mask: str, mask_ratio: float) -> None:
    keep = losses.keep_mask(SHAPE, keys=KEYS, mask_ratio=mask_ratio, mask=mask)
    assert keep.shape == ((4, 32, 24, 1) if mask == "spatial" else (4, 1, 1, 512))
    assert keep.dtype == bool
    deviation = np.sqrt(mask_ratio * (1 - mask_ratio) / keep.size)
    assert abs(float(jnp.mean(~keep)) - mask_ratio) <= 4 * deviation


def test_each_image_draws_from_its_own_key() -> None:
    keep = losses.keep_mask(SHAPE, keys=KEYS, mask_ratio=0.5)
    swapped = losses.keep_mask(SHAPE, keys=KEYS[::-1], mask_ratio=0.5)
    np.testing.assert_array_equal(swapped, keep[::-1])
    assert np.any(keep[0] != keep[1])
    alone = losses.keep_mask((1, *SHAPE[1:]), keys=KEYS[2:3], mask_ratio=0.5)
    np.testing.assert_array_equal(alone[0], keep[2])


def test_another_mask_is_refused() -> None:
    with pytest.raises(ValueError, match='mask is "pixel"'):
        losses.keep_mask(SHAPE, keys=KEYS, mask_ratio=0.5, mask="pixel")


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_that_is_no_share_is_refused(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio is {mask_ratio}; it must be from 0 to 1"):
        losses.keep_mask(SHAPE, keys=KEYS, mask_ratio=mask_ratio)


@pytest.mark.parametrize(("kept", "entry"), [(True, 2 * 3 + 1), (False, 1)])
def test_everything_and_nothing_kept_by_hand(kept: bool, entry: float) -> None:
    """With G(x) = 2 x + 1, S = 3 and T = 0 each entry of the 2 x 3 x 4 in an image is 7^2 or 1."""
    student, teacher = jnp.full((2, 2, 3, 4), 3.0), jnp.zeros((2, 2, 3, 4))
    keep = jnp.full((2, 2, 3, 1), kept)
    loss = losses.mgd_loss(student, teacher, keep=keep, generate=lambda features: 2 * features + 1)
    assert float(loss) == 2 * 3 * 4 * entry**2
