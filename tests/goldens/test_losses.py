"""Every loss against what the authors' own code computed: values and gradients of every case that is there.

The cases are those that :mod:`tests.goldens.cases` finds.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses.icd import attention_logits
from kdjax.methods.icd import MLP, DecoderLayer, Values
from kdjax.methods.maskd import MasKD, MasKDTokens
from kdjax.methods.mgd import Generation
from kdjax.types import View
from tests.goldens.cases import find_cases, no_cases

Arrays = dict[str, Any]
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

CASES = find_cases("losses")


def nest(flat: Arrays) -> Arrays:
    """``{"a/b": x}`` to ``{"a": {"b": x}}``."""
    nested: Arrays = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        branch = nested
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return nested


def load(path: Path) -> tuple[Arrays, Arrays]:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        return meta, nest({name: jnp.asarray(file[name]) for name in file.files if name != "meta"})


def convolve(features: jax.Array, parameters: Arrays) -> jax.Array:
    """A convolution of stride 1 with zero padding, as Flax's ``nn.Conv`` computes it."""
    layout = ("NHWC", "HWIO", "NHWC")
    result = jax.lax.conv_general_dilated(features, parameters["kernel"], (1, 1), "SAME", dimension_numbers=layout)
    return result + parameters["bias"][None, None, None]


def assert_value(actual: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=VALUE_TOLERANCE, atol=1e-12)


def assert_close(actual: jax.Array, expected: jax.Array, what: str, tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Every entry within ``tolerance`` of the largest one."""
    assert actual.shape == expected.shape, what
    largest = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest + 1e-12, err_msg=what)


def check_mgd(meta: Arrays, case: Arrays) -> None:
    names = ("student", "align", "generation_0", "generation_1")

    def loss(inputs: Arrays) -> jax.Array:
        student = convolve(inputs["student"], inputs["align"]) if "align" in inputs else inputs["student"]
        block = {f"conv_{k}": {"conv": inputs[f"generation_{k}"]} for k in range(2)}
        generate = functools.partial(Generation().apply, {"params": block})
        return meta["alpha"] * losses.mgd_loss(student, case["teacher"], keep=case["keep_mask"] > 0, generate=generate)

    value, gradient = jax.jit(jax.value_and_grad(loss))({name: case[name] for name in names if name in case})
    assert_value(value, case["loss"])
    assert_close(gradient["student"], case["grad_student"], "student")
    assert_close(gradient["generation_0"]["kernel"], case["grad_generation_0_kernel"], "generation block")
    if "align" in case:
        assert_close(gradient["align"]["kernel"], case["grad_align_kernel"], "alignment")


def without_padding(images: int) -> jax.Array:
    """The sizes of images that fill every position of any feature map."""
    return jnp.full((images, 2), 1e6, jnp.int32)


def view(features: Arrays) -> View:
    return View(features, {level: 2 ** int(level[1:]) for level in features})


def maskd_level(case: Arrays) -> Arrays:
    """One level's tokens, and convolutions of P where there are any, as the method modules name them."""
    found = {"tokens": case["tokens"]}
    for k in range(2) if "prob_0" in case else ():
        found |= {f"{part}_{k}": case[f"prob_{k}"][part] for part in ("kernel", "bias")}
    return found


def check_maskd_tokens(meta: Arrays, case: Arrays) -> None:
    assert ("prob_0" in case) == meta["weight_mask"]
    feature = case["feature"]
    method = MasKDTokens(tokens=meta["num_tokens"], weighted=meta["weight_mask"])

    def loss(level: Arrays) -> tuple[jax.Array, Arrays]:
        seen = {}

        def own_loss(masked: Arrays) -> Arrays:
            seen["masked"] = masked["p3"]
            return {"upstream": jnp.sum(masked["p3"] * case["upstream"])}

        given = {"size": without_padding(len(feature)), "own_loss": own_loss}
        params = {"params": {"tokens": {"p3": level}}}
        terms = method.apply(params, view({"p3": feature}), None, **given)
        return terms["masked_upstream"] + terms["dice"]["p3"], seen | terms

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(maskd_level(case))
    assert_close(found["masked"], case["masked"], "masked features", VALUE_TOLERANCE)
    assert_value(found["dice"]["p3"], case["dice"])
    assert_close(gradient["tokens"], case["grad_tokens"], "tokens")
    if "prob_1" in case:
        assert_close(gradient["kernel_1"], case["grad_prob_1_kernel"], "weights")


def check_maskd_distill(meta: Arrays, case: Arrays) -> None:
    levels = {f"p{3 + k}": case[f"level_{k}"] for k in range(meta["levels"])}
    teachers = {name: level["teacher"] for name, level in levels.items()}
    images = len(teachers["p3"])
    params = {"tokens": {name: maskd_level(level) for name, level in levels.items()}}
    for name, x in teachers.items():
        # The authors' students were aligned already.
        channels = x.shape[-1]
        conv = {"kernel": jnp.eye(channels)[None, None], "bias": jnp.zeros(channels)}
        params[f"align_{name}"] = {"conv": conv}
    warmup = 100 if meta["student_masks"] else 101
    method = MasKD(tokens=meta["num_tokens"], weighted=meta["weight_mask"], warmup_steps=warmup)

    def loss(students: Arrays) -> jax.Array:
        given = {"size": without_padding(images), "step": jnp.array(100)}
        terms = method.apply({"params": params}, view(students), view(teachers), **given)
        return meta["loss_weight"] * sum(terms["maskd"].values())

    value, gradient = jax.jit(jax.value_and_grad(loss))({name: level["student"] for name, level in levels.items()})
    assert_value(value, case["loss"])
    for name, level in levels.items():
        assert ("prob_0" in level) == meta["weight_mask"]
        masks = losses.token_masks(level["teacher"], level["tokens"])
        assert_close(masks, level["teacher_masks"], f"{name} masks", VALUE_TOLERANCE)
        assert_close(gradient[name], level["grad_student"], name)


def flatten(levels: list[jax.Array]) -> jax.Array:
    """Levels (N, H, W, C) to (N, S, C), the first level first."""
    return jnp.concatenate([level.reshape(level.shape[0], -1, level.shape[-1]) for level in levels], axis=1)


def icd_queries(case: Arrays) -> losses.Queries:
    x, y = case["points"][..., 0], case["points"][..., 1]
    left, top, right, bottom = (case["box_offsets"][..., side] for side in range(4))
    boxes = jnp.stack([x - left, y - top, x + right, y + bottom], axis=-1)
    real, valid = case["query_is_real"] > 0, ~case["query_padding"].astype(bool)
    return losses.Queries(case["labels"].astype(jnp.int32), boxes, case["points"], real, valid)


def mlp(case: Arrays, name: str, x: jax.Array) -> jax.Array:
    parameters = {f"layer_{k}": case[f"{name}_{k}"] for k in range(3)}
    widths = tuple(layer["bias"].size for layer in parameters.values())
    return MLP(widths).apply({"params": parameters}, x)


def check_icd(meta: Arrays, case: Arrays) -> None:
    queries, where = icd_queries(case), ~case["key_padding"].astype(bool)
    images, asked = queries.labels.shape[0], queries.valid[..., None]
    heads, layers = meta["heads"], range(meta["layers"])
    levels = [case[f"level_{k}"] for k in range(meta["levels"])]
    teacher = flatten([level["teacher"] for level in levels])
    # The official scale indicator was computed from the padded size, for every image.
    image_size = jnp.broadcast_to(jnp.array(meta["image_shape"])[None], (images, 2))

    described = losses.instance_descriptors(queries, image_size=image_size, num_classes=meta["num_classes"])
    # What stands in empty slots reaches nothing: queries do not attend to each other.
    assert_close(described * asked, case["descriptors"] * asked, "descriptors", VALUE_TOLERANCE)
    encoded = mlp(case, "encoder", described)
    assert_close(encoded * asked, case["queries"] * asked, "queries", VALUE_TOLERANCE)
    channels, start, codes = teacher.shape[-1], 0, []
    for level in levels:
        _, height, width, _ = level["teacher"].shape
        valid = where[:, start : start + height * width].reshape(images, height, width)
        codes.append(losses.sine_position(valid, channels))
        start += height * width
    position = flatten(codes)
    assert_close(position, case["position"], "position", VALUE_TOLERANCE)

    def decode(learnt: Arrays) -> tuple[jax.Array, list[Arrays]]:
        """The auxiliary task; per layer what it made on the way."""
        decoded, auxiliary, made = mlp(learnt, "encoder", described), jnp.zeros(()), []
        for k in layers:
            layer = DecoderLayer(heads=heads, temperature=meta["temperature"])
            parameters = {"params": learnt["teacher_decoder"][f"layer_{k}"]}
            decoded, values, mask = layer.apply(parameters, decoded, teacher, position, real=queries.real, where=where)
            outputs = mlp(learnt, "predictor", decoded)
            confidence = losses.instance_confidence_loss(outputs[..., 0], queries)
            localization = losses.instance_localization_loss(outputs[..., 1:], queries)
            auxiliary += confidence + localization
            made.append({"decoded": decoded, "values": values, "mask": mask})
            made[-1] |= {"confidence": confidence, "localization": localization}
        return auxiliary, made

    learnt = {name: value for name, value in case.items() if name.split("_")[0] in ("encoder", "predictor", "teacher")}
    gradient, made = jax.jit(jax.grad(decode, has_aux=True))(learnt)
    entering = case["queries"]
    for k in layers:
        parameters = case["teacher_decoder"][f"layer_{k}"]
        project = lambda x, name: x @ parameters[name]["kernel"] + parameters[name]["bias"][None, None]  # noqa: B023, E731
        query = losses.split_heads(project(entering, "query"), heads)
        key = losses.split_heads(project(teacher + project(position, "position"), "key"), heads)
        logits = jax.vmap(attention_logits, (1, 1, None), 1)(query, key, where)
        kept = jnp.broadcast_to(where[:, None, None], logits.shape)
        expected = case[f"attention_logits_{k}"]
        assert_close(jnp.where(kept, logits, 0), jnp.where(kept, expected, 0), "logits", VALUE_TOLERANCE)
        assert bool(jnp.all(jnp.where(kept, 0, expected) == jnp.where(kept, 0, -jnp.inf)))
        assert bool(jnp.all(kept | (logits < -1e38)))
        assert_close(made[k]["values"], case[f"values_{k}"], "values", VALUE_TOLERANCE)
        assert_close(made[k]["decoded"] * asked, case[f"decoded_{k}"] * asked, "decoded", VALUE_TOLERANCE)
        assert_value(made[k]["confidence"], case["loss_confidence"][k])
        assert_value(made[k]["localization"], case["loss_localization"][k])
        entering = case[f"decoded_{k}"]
    assert_close(gradient["encoder_0"]["kernel"], case["aux_grad_encoder_0_kernel"], "encoder")
    parts = [gradient["teacher_decoder"]["layer_0"][name]["kernel"].T for name in ("query", "key", "value")]
    assert_close(jnp.concatenate(parts), case["aux_grad_in_proj_weight"], "teacher decoder")

    def distil(inputs: Arrays) -> jax.Array:
        student = flatten(inputs["levels"])
        terms = [
            losses.icd_loss(
                Values(heads=heads).apply({"params": {"value": inputs["value"][k]}}, student),
                made[k]["values"],
                instance_mask=made[k]["mask"],
            )
            for k in layers
        ]
        return meta["loss_weight"] * sum(terms) / len(terms)

    projections = [case["student_decoder"][f"layer_{k}"]["value"] for k in layers]
    inputs = {"levels": [level["student"] for level in levels], "value": projections}
    value, gradient = jax.jit(jax.value_and_grad(distil))(inputs)
    assert_value(value, case["distill_loss"])
    for k, (level, actual) in enumerate(zip(levels, gradient["levels"], strict=True)):
        assert_close(actual, level["grad_student"], f"level {k}")
    others = jnp.zeros((2 * channels, channels))
    expected = case["student_grad_in_proj_weight"]
    assert_close(jnp.concatenate([others, gradient["value"][0]["kernel"].T]), expected, "student's value projection")


CHECKS = {"icd": check_icd, "mgd": check_mgd, "maskd_tokens": check_maskd_tokens, "maskd_distill": check_maskd_distill}


def test_there_are_cases() -> None:
    assert CASES, no_cases("losses")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_loss_is_the_authors(path: Path) -> None:
    meta, case = load(path)
    family = "_".join(meta[part] for part in ("method", "stage") if part in meta)
    assert family in CHECKS, f"{path.stem} is of family {family!r}, which nothing checks"
    CHECKS[family](meta, case)
