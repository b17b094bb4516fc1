"""A new dense detector writes what is its own and nothing else: an IoU-aware RetinaNet, from outside the package."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.losses.detection import binary_cross_entropy
from kdjax.models import FPN, RetinaNet
from kdjax.models.dense import DenseDetector
from kdjax.models.retinanet import RetinaNetPredictions
from tests import tiny
from tests.models import contract, iou_aware
from tests.models.iou_aware import IoUAwareRetinaNet, IoUHead, IoUPredictions


class Nothing(nn.Module):
    """Stands for a backbone where only the pure methods are tested."""


def detector(kind):
    return kind(backbone=Nothing(), neck=FPN(max_level=6), num_classes=contract.CLASSES, anchor_scale=2.0)


CASE = contract.Case(detector(IoUAwareRetinaNet), contract.ideal_iou_aware, ("logits", "deltas", "iou"))
PLAIN = contract.Case(detector(RetinaNet), contract.ideal_retinanet, ("logits", "deltas"))


def test_it_is_short_and_repeats_nothing():
    code = [inspect.getsource(kind) for kind in (IoUPredictions, IoUHead, IoUAwareRetinaNet)]
    assert sum(bool(line.strip()) for text in code for line in text.splitlines()) < 40
    assert not {"loss", "decode", "heads", "setup"} & set(vars(IoUAwareRetinaNet))
    assert "suppress" not in inspect.getsource(iou_aware)


def test_ideal_predictions_are_decoded_to_the_truth():
    contract.check_ideal(CASE)


def test_its_terms_are_a_retinanets_and_one_more():
    predictions = contract.poor(CASE)
    terms, _ = contract.graded(CASE.detector)(predictions, contract.TRUTH, contract.SIZE)
    plain = RetinaNetPredictions(predictions.logits, predictions.deltas)
    expected, _ = contract.graded(PLAIN.detector)(plain, contract.TRUTH, contract.SIZE)
    assert set(terms) == {"cls", "box", "iou"}
    for term, value in expected.items():
        np.testing.assert_array_equal(terms[term], value)


def test_the_iou_of_ideal_boxes_is_one():
    ideal = contract.ideal(CASE)
    sure = ideal._replace(iou=jax.tree.map(lambda x: np.full_like(x, 2.0), ideal.iou))
    terms, _ = contract.graded(CASE.detector)(sure, contract.TRUTH, contract.SIZE)
    counts = [max(1, count) for count in positives(ideal)]
    # An image without positives counts as one.
    share = sum(positives(ideal)) / sum(counts)
    expected = float(binary_cross_entropy(jnp.array(2.0), jnp.array(1.0))) * share
    np.testing.assert_allclose(terms["iou"], expected, rtol=1e-4)


def positives(ideal):
    return [sum(int((x[image] > 0).sum()) for x in ideal.logits.values()) for image in range(4)]


def test_scores_are_the_root_of_both():
    ideal = contract.ideal(CASE)
    doubtful = ideal._replace(iou=jax.tree.map(lambda x: np.full_like(x, -1.0), ideal.iou))
    found, _ = contract.decoder(CASE.detector)(doubtful, contract.SIZE)
    p, iou = (1 / (1 + np.exp(-logit)) for logit in (contract.SURE, -1.0))
    scores = np.asarray(found.scores)[np.asarray(found.valid)]
    assert len(scores) == sum(map(len, contract.OBJECTS))
    np.testing.assert_allclose(scores, np.sqrt(p * iou), rtol=1e-5)


def test_a_few_steps_lower_the_loss():
    kind = IoUAwareRetinaNet(
        backbone=tiny.TinyBackbone(),
        neck=FPN(8, max_level=6),
        num_classes=tiny.CLASSES,
        convs=1,
        anchor_scale=2.0,
    )
    batch, optimizer = tiny.batch(4), optax.adam(3e-3)
    variables = jax.jit(kind.init)(jax.random.key(0), jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3)))
    assert variables["params"]["head"]["iou"]["kernel"].shape == (3, 3, 8, 9)

    def total(params):
        (_, predictions), _ = kind.apply(
            variables | {"params": params},
            kind.preprocess(batch.images, batch.size),
            batch.size,
            train=True,
            mutable=["batch_stats"],
        )
        terms = kind.loss(predictions, batch.targets, batch.size)
        return sum(terms.values()), terms

    @jax.jit
    def step(params, moments):
        gradient, terms = jax.grad(total, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, terms

    params, history = variables["params"], []
    moments = optimizer.init(params)
    for _ in range(20):
        params, moments, terms = step(params, moments)
        history.append(terms)
    assert kind.terms == ("cls", "box", "iou")
    assert float(sum(history[-1].values())) < 0.8 * float(sum(history[0].values()))


@pytest.mark.parametrize("name", ["terms_of", "boxes_of", "places_of", "assign", "inside"])
def test_what_a_dense_detector_must_write_is_asked_for(name):
    blank = DenseDetector(backbone=Nothing(), neck=FPN(), num_classes=1)
    count = len(inspect.signature(getattr(blank, name)).parameters)
    with pytest.raises(NotImplementedError):
        getattr(blank, name)(*[None] * count)
