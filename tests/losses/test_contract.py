"""What holds for every loss between a student and a teacher: one signature and the same good manners."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

N, H, W, C, K = 8, 6, 5, 8, 3
KEYS = jax.random.split(jax.random.key(1), N)
Loss = Callable[..., jax.Array]


def block(features: jax.Array) -> jax.Array:
    """A generation block with fixed weights: mixes neighbours and channels, bends, and leaves zeros alone."""
    mixed = features + 0.5 * jnp.roll(features, 1, axis=3)
    padded = jnp.pad(mixed, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.tanh(padded[:, 2:, 1:-1] + 0.25 * padded[:, 1:-1, :-2] - 0.5 * mixed)


def mgd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    keep = jnp.arange(C)[None, None, None] % 3 > 0
    return losses.mgd_loss(student, teacher, keep=keep, generate=block, where=where)


def mimic(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    return losses.mimic_loss(student, teacher, where=where, axis_name=axis_name)


def maskd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    kernels, biases = (draw(2, 3, 3, C, C), draw(3, 1, 1, C, K)), (draw(4, C), draw(5, K))
    weights = losses.token_weights(teacher, kernels, biases, where=where)
    return losses.maskd_loss(student, teacher, tokens=draw(6, K, C), weights=weights, step=1, warmup=0, where=where)


def icd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    flatten = lambda features: jax.lax.collapse(features, 1, 3)  # noqa: E731
    values = [losses.split_heads(flatten(features), 2) for features in (student, teacher)]
    query = losses.split_heads(jax.random.normal(jax.random.key(2), (1, 3, C)), 2)
    query = jnp.broadcast_to(query, (len(student), *query.shape[1:]))
    flat = None if where is None else where.reshape(len(where), -1)
    real = jnp.ones((len(student), 3), bool)
    _, mask = losses.instance_attention(query, values[1], values[1], real=real, where=flat)
    return losses.icd_loss(*values, instance_mask=mask)


def kd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    return losses.kd_loss(student, teacher, temperature=2.0, where=where, axis_name=axis_name)


def cwd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    return losses.cwd_loss(student, teacher, temperature=2.0, where=where)


def ld(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    return losses.ld_loss(student, teacher, where=where)


def dmkd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    keep = losses.dual_keep(teacher, where=where)
    fusion = jnp.array([0.5, -0.5])
    return losses.dmkd_loss(student, teacher, keep=keep, generate=(block, block), fusion=fusion, where=where)


def dfmsd(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    keep = losses.stage_keep(teacher, stage=1, where=where)
    fusion = jnp.array([0.5, -0.5])
    return losses.dfmsd_loss(
        student, teacher, keep=keep, generate=(block, block), fusion=fusion, where=where, axis_name=axis_name
    )


def pearson(student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: str | None) -> jax.Array:
    return losses.pearson_loss(student, teacher, where=where, axis_name=axis_name)


LOSSES: dict[str, Loss] = {
    "cwd_loss": cwd,
    "dfmsd_loss": dfmsd,
    "dmkd_loss": dmkd,
    "icd_loss": icd,
    "kd_loss": kd,
    "ld_loss": ld,
    "maskd_loss": maskd,
    "mgd_loss": mgd,
    "mimic_loss": mimic,
    "pearson_loss": pearson,
}
EVALUATE = {
    name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=(3,)) for name, loss in LOSSES.items()
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def features(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.normal(key, (N, H, W, C)) for key in jax.random.split(jax.random.key(seed), 2))


def some_padding() -> jax.Array:
    """Images of every kind, from whole to nothing but padding."""
    size = jnp.array([[6, 5], [4, 5], [6, 3], [1, 1], [0, 0], [5, 4], [3, 2], [2, 5]])
    return losses.valid_positions(size, (H, W), 1)


def assert_finite(tree: Any) -> None:
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def test_every_loss_is_here() -> None:
    takes_both = {
        name
        for name in losses.__all__
        if name.endswith("_loss") and "teacher" in inspect.signature(getattr(losses, name)).parameters
    }
    assert takes_both == set(LOSSES)


OTHER_PRODUCTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "token_dice_loss": lambda masks, _: losses.token_dice_loss(masks),
    "masked_features": lambda features, masks: losses.masked_features(features, masks, masks[:, 0, 0]).sum(),
}


@pytest.mark.parametrize("name", [*LOSSES, *OTHER_PRODUCTS])
def test_products_are_of_float32_on_every_kind_of_device(name: str) -> None:
    """By default a TPU rounds what it multiplies to bfloat16, and a GPU to TF32."""
    loss = OTHER_PRODUCTS.get(name) or (lambda student, teacher: LOSSES[name](student, teacher, None, None))
    program = str(jax.make_jaxpr(jax.value_and_grad(loss))(*features()))
    products = program.count("dot_general[")
    assert products == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert products or name not in ("icd_loss", "maskd_loss", *OTHER_PRODUCTS)


@every_loss
def test_one_signature(name: str) -> None:
    first, second, *rest = inspect.signature(getattr(losses, name)).parameters.values()
    assert (first.name, second.name) == ("student", "teacher")
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)


@every_loss
def test_float32_scalar_jitted_as_not_and_the_teacher_is_fixed(name: str) -> None:
    student, teacher = features()
    value, (student_gradient, teacher_gradient) = EVALUATE[name](student, teacher, None, None)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, LOSSES[name](student, teacher, None, None), rtol=1e-5)
    assert float(jnp.max(jnp.abs(student_gradient))) > 0
    assert float(jnp.max(jnp.abs(teacher_gradient))) == 0


@every_loss
def test_whole_images_need_no_mask(name: str) -> None:
    student, teacher = features()
    value, gradients = EVALUATE[name](student, teacher, None, None)
    masked_value, masked_gradients = EVALUATE[name](student, teacher, jnp.ones((N, H, W), bool), None)
    np.testing.assert_allclose(masked_value, value, rtol=1e-6)
    np.testing.assert_allclose(masked_gradients[0], gradients[0], atol=1e-6 * float(jnp.max(jnp.abs(gradients[0]))))


@every_loss
def test_padding_has_no_influence(name: str) -> None:
    student, teacher = features()
    where = some_padding()
    other_student, other_teacher = (
        jnp.where(where[..., None], kept, 100 * noise)
        for kept, noise in zip((student, teacher), features(7), strict=True)
    )
    value, (gradient, _) = EVALUATE[name](student, teacher, where, None)
    other_value, (other_gradient, _) = EVALUATE[name](other_student, other_teacher, where, None)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient, atol=1e-5 * float(jnp.max(jnp.abs(gradient))))
    assert not np.any(np.asarray(gradient)[~np.asarray(where)])


@every_loss
def test_a_masked_batch_is_the_cropped_batch(name: str) -> None:
    """A batch with the same padding in each image is the batch without it."""
    student, teacher = features()
    where = losses.valid_positions(jnp.full((N, 2), 4), (H, W), 1)
    value, (gradient, _) = EVALUATE[name](student, teacher, where, None)
    cropped, (cropped_gradient, _) = EVALUATE[name](student[:, :4, :4], teacher[:, :4, :4], None, None)
    np.testing.assert_allclose(value, cropped, rtol=1e-5)
    largest = float(jnp.max(jnp.abs(cropped_gradient)))
    np.testing.assert_allclose(gradient[:, :4, :4], cropped_gradient, atol=1e-5 * largest)


@every_loss
@pytest.mark.parametrize("extreme", ["all padded", "constant", "zero", "equal", "large"])
def test_extremes_are_finite(name: str, extreme: str) -> None:
    student, teacher = features()
    where = jnp.ones((N, H, W), bool)
    if extreme == "all padded":
        where = jnp.zeros((N, H, W), bool)
    elif extreme == "constant":
        student, teacher = jnp.full_like(student, 3.1), jnp.full_like(teacher, -0.7)
    elif extreme == "zero":
        student, teacher = jnp.zeros_like(student), jnp.zeros_like(teacher)
    elif extreme == "equal":
        teacher = student
    else:
        student, teacher = 1e4 * student, 1e4 * teacher
    value, gradients = EVALUATE[name](student, teacher, where, None)
    assert_finite((value, gradients))
    if extreme == "all padded":
        assert float(value) == 0
        assert not np.any(gradients[0])


ODD: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "ordinary": lambda rng: rng.normal(size=(H, W, C)),
    "zero": lambda rng: np.zeros((H, W, C)),
    "constant": lambda rng: np.full((H, W, C), rng.normal()),
    "constant channels": lambda rng: np.tile(rng.normal(size=C), (H, W, 1)),
    "constant places": lambda rng: np.tile(rng.normal(size=(H, W, 1)), C),
    "one number": lambda rng: np.where(rng.permuted(np.arange(H * W * C)).reshape(H, W, C) == 0, 1e4, 0.0),
    "tiny": lambda rng: 1e-25 * rng.normal(size=(H, W, C)),
    "large": lambda rng: 1e6 * rng.normal(size=(H, W, C)),
    "large and the same": lambda rng: 1e6 + rng.normal(size=(H, W, C)),
}
"""The features of an image that breaks naive code, or does not."""


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_mixture_of_odd_images_is_finite(name: str, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        student, teacher = (
            jnp.asarray(np.stack([ODD[kind](rng) for kind in rng.choice(list(ODD), N)]), dtype) for _ in range(2)
        )
        student = jnp.where(rng.random((N, 1, 1, 1)) < 0.2, teacher, student)
        where = losses.valid_positions(jnp.asarray(rng.integers(0, [H + 1, W + 1], (N, 2))), (H, W), 1)
        assert_finite(EVALUATE[name](student, teacher, where, None))


@every_loss
def test_bfloat16_features_give_the_float32_loss_of_what_they_hold(name: str) -> None:
    student, teacher = (array.astype(jnp.bfloat16) for array in features())
    teacher = student + 0.1 * teacher  # close to each other: a difference of bfloat16 would lose most digits
    value, gradients = EVALUATE[name](student, teacher, None, None)
    exact, _ = EVALUATE[name](student.astype(jnp.float32), teacher.astype(jnp.float32), None, None)
    assert value.dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, exact, rtol=2e-2)


@every_loss
def test_the_mean_over_devices_is_the_loss_of_the_batch(name: str) -> None:
    student, teacher = features()
    where = some_padding()
    value, (gradient, _) = EVALUATE[name](student, teacher, where, None)

    def device(student: jax.Array, teacher: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(LOSSES[name])(student, teacher, where, "devices")
        return jax.lax.pmean(value, "devices"), gradient / 4

    by_device = [array.reshape(4, 2, *array.shape[1:]) for array in (student, teacher, where)]
    mean, parts = jax.pmap(device, axis_name="devices")(*by_device)
    np.testing.assert_allclose(mean, jnp.full(4, value), rtol=1e-5)
    np.testing.assert_allclose(parts.reshape(gradient.shape), gradient, atol=1e-5 * float(jnp.max(jnp.abs(gradient))))


@every_loss
def test_other_shapes_are_refused_in_words(name: str) -> None:
    student, teacher = features()
    narrow = student[..., : C - 2]
    with pytest.raises(ValueError, match="differ in shape; align the student"):
        LOSSES[name](narrow, teacher, None, None)
