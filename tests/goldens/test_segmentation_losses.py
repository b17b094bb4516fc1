"""What teaches segmenters, and what judges them, against the authors' own code: every case that is there."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses.segmentation import segmentation_loss
from kdjax.methods.logits import CWD
from kdjax.methods.maskd_logits import MasKDLogits, MasKDLogitTokens
from kdjax.methods.mgd import Generation
from kdjax.optim import make_schedule
from kdjax.tasks.iou import confusion, metrics
from kdjax.types import IGNORED, Logits, View
from tests.goldens.cases import find_cases, no_cases
from tests.goldens.test_losses import Arrays, assert_close, assert_value, convolve, load, without_padding

STRIDE = 8


def view(logits: Logits) -> View:
    """A model of one map, which has the places of its logits."""
    return View({"c5": logits.main}, {"c5": STRIDE}, logits)


def own_terms(meta: Arrays, case: Arrays, logits: Logits) -> Arrays:
    """The segmenter's own terms, unweighted; MMSegmentation's, which ignores 255, divides by all pixels."""
    labels = jnp.where(case["label"] == meta["ignore_label"], IGNORED, case["label"]).astype(jnp.uint8)
    loss = functools.partial(
        segmentation_loss,
        classes=labels,
        align_corners=meta.get("align_corners", False),
        labelled_only=meta["ignore_label"] != IGNORED,
    )
    heads = {"seg": logits.main, "auxiliary": logits.auxiliary}
    return {name: loss(head) for name, head in heads.items() if head is not None}


def check_mgd(meta: Arrays, case: Arrays) -> None:
    teacher, size = case["teacher_feature"], without_padding(len(case["teacher_feature"]))
    names = ("align", "generation_0", "generation_1")
    inputs = {name: case[name] for name in names if name in case}
    inputs |= {"feature": case["student_feature"], "logits": case["student_logits"]}
    inputs["auxiliary"] = case["student_logits_auxiliary"]

    def logit_term(logits: jax.Array) -> jax.Array:
        given = {"size": size, "teacher_heads": lambda _: Logits(case["teacher_logits"])}
        terms = CWD(temperature=meta["logit_temperature"]).apply({}, view(Logits(logits)), None, **given)
        return meta["logit_weight"] * terms["cwd"]

    def total(inputs: Arrays) -> tuple[jax.Array, Arrays]:
        student = convolve(inputs["feature"], inputs["align"]) if "align" in inputs else inputs["feature"]
        block = {f"conv_{k}": {"conv": inputs[f"generation_{k}"]} for k in range(2)}
        generate = functools.partial(Generation().apply, {"params": block})
        feature = losses.mgd_loss(student, teacher, keep=case["keep_mask"] > 0, generate=generate)
        own = own_terms(meta, case, Logits(inputs["logits"], inputs["auxiliary"]))
        terms = {"loss_mgd_fea": meta["alpha"] * feature, "decode": own["seg"], "aux": 0.4 * own["auxiliary"]}
        if meta["use_logit"]:
            terms["loss_logit"] = logit_term(inputs["logits"])
        return sum(terms.values()), terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    expected = case["loss"]
    assert_value(value, expected["total"])
    for name in ("loss_mgd_fea", "loss_logit"):
        assert (name in terms) == (name in expected)
        if name in terms:
            assert_value(terms[name], expected[name])
    for name in ("decode", "aux"):
        assert_value(terms[name], expected[name]["loss_ce"])
    given = {"feature": "student_feature", "logits": "student_logits", "auxiliary": "student_logits_auxiliary"}
    for name, of in given.items():
        assert_close(gradient[name], case[f"grad_{of}"], of)
    for name in ("align", "generation_0"):
        if name in inputs:
            assert_close(gradient[name]["kernel"], case[f"grad_{name}_kernel"], name)
    if "loss_logit" in terms:
        gradient = jax.jit(jax.grad(logit_term))(inputs["logits"])
        assert_close(gradient, case["grad_student_logits_of_logit_loss"], "logits term")


def check_maskd_tokens(meta: Arrays, case: Arrays) -> None:
    teacher = Logits(case["teacher_logits"])

    def loss(tokens: jax.Array) -> tuple[jax.Array, Arrays]:
        seen = {}

        def prediction_loss(masked: Logits) -> Arrays:
            seen["masked"] = masked.main
            return own_terms(meta, case, masked)

        given = {"size": without_padding(len(teacher.main)), "prediction_loss": prediction_loss}
        method = MasKDLogitTokens(tokens=meta["num_tokens"])
        terms = method.apply({"params": {"tokens": tokens}}, view(teacher), None, **given)
        return terms["masked_seg"] + terms["dice"], seen | terms

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(case["tokens"])
    assert_close(found["masked"], case["masked"], "masked logits", 1e-5)
    assert_value(found["dice"], case["dice"])
    assert_value(found["masked_seg"], case["task"])
    assert_close(gradient, case["grad_tokens"], "tokens")


def check_maskd_distill(meta: Arrays, case: Arrays) -> None:
    student, teacher = (
        Logits(case[f"{name}_logits"], case[f"{name}_logits_auxiliary"]) for name in ("student", "teacher")
    )
    assert_close(losses.token_masks(teacher.main, case["tokens"]), case["teacher_masks"], "masks", 1e-5)

    def distill(student: Logits) -> Arrays:
        given = {"size": without_padding(len(teacher.main)), "teacher_heads": lambda _: teacher}
        method = MasKDLogits(tokens=meta["num_tokens"])
        return method.apply({"params": {"tokens": case["tokens"]}}, view(student), None, **given)

    def total(student: Logits) -> tuple[jax.Array, Arrays]:
        terms = distill(student) | own_terms(meta, case, student)
        weight = {"maskd_auxiliary": meta["auxiliary_weight"], "auxiliary": meta["auxiliary_weight"]}
        return sum(weight.get(name, 1.0) * term for name, term in terms.items()), terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    assert_value(value, case["total"])
    names = {"maskd_logits": "distill", "maskd_auxiliary": "distill_auxiliary"}
    for name, theirs in (names | {"seg": "task", "auxiliary": "task_auxiliary"}).items():
        assert_value(terms[name], case[theirs])
    assert_close(gradient.main, case["grad_student_logits"], "logits")
    assert_close(gradient.auxiliary, case["grad_student_logits_auxiliary"], "auxiliary logits")
    gradient = jax.jit(jax.grad(lambda student: distill(student)["maskd_logits"]))(student)
    assert_close(gradient.main, case["grad_student_logits_of_distill"], "logits of the term")


def check_iou(meta: Arrays, case: Arrays) -> None:
    classes = meta["num_classes"]
    pairs = zip(np.asarray(case["label"]), np.asarray(case["prediction"]), strict=True)
    matrix = sum(confusion(label, said, classes) for label, said in pairs)
    areas = {"intersect": np.diag(matrix), "prediction": matrix.sum(axis=0), "label": matrix.sum(axis=1)}
    for name, area in areas.items():
        np.testing.assert_array_equal(area, case[f"area_{name}"])
    found = metrics(matrix, [str(label) for label in range(classes)])
    for name, theirs in {"mIoU": "IoU", "aAcc": "aAcc", "mAcc": "Acc"}.items():
        np.testing.assert_allclose(found[name], 100 * case["mean"][theirs], rtol=1e-5)
    np.testing.assert_allclose(list(found["IoU"].values()), 100 * case["metric"]["IoU"], rtol=1e-5)


def check_schedule(meta: Arrays, case: Arrays) -> None:
    for number, row in enumerate(meta["rows"]):
        schedule = make_schedule(
            "poly",
            row["learning_rate"],
            row["total"],
            final_factor=row["eta_min"] / row["learning_rate"],
            power=row["power"],
            end_at_last=True,
        )
        theirs = case[f"row_{number}"]
        np.testing.assert_allclose(schedule(theirs["step"]), theirs["learning_rate"], rtol=1e-5)


CHECKS = {
    "mgd_seg_distiller": check_mgd,
    "maskd_seg_tokens": check_maskd_tokens,
    "maskd_seg_distill": check_maskd_distill,
    "mmseg_iou": check_iou,
    "mmengine_poly": check_schedule,
}
CASES = [
    (path, check)
    for path in find_cases("segmentation")
    for family, check in CHECKS.items()
    if path.stem.startswith(family)
]


def test_there_are_cases() -> None:
    assert {check for _, check in CASES} == set(CHECKS.values()), no_cases("segmentation")


@pytest.mark.parametrize(("path", "check"), CASES, ids=[path.stem for path, _ in CASES])
def test_it_is_the_authors(path: Path, check) -> None:
    check(*load(path))
