"""What several seeds say: the interval is the textbook's, and a method that does nothing is worth exactly nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kdjax.run import pipeline
from kdjax.run.verdict import judge
from tests.runs import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_is_that_of_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    students, baselines = rng.normal(20, 1, count), rng.normal(19, 1, count)
    verdict = judge(students.tolist(), baselines.tolist(), "AP")
    expected = stats.ttest_rel(students, baselines)
    np.testing.assert_allclose(verdict.interval, expected.confidence_interval(0.95), rtol=1e-9)
    assert verdict.mean == pytest.approx((students - baselines).mean())
    assert (verdict.outcome == "no difference") == (expected.pvalue > 0.05)


@pytest.mark.parametrize(
    ("students", "outcome", "words"),
    [
        (
            [12.0, 12.1, 12.2],
            "gain",
            "A gain: over 3 seeds the student is +2.10 AP (95 %: +1.85 to +2.35) beside its",
        ),
        (
            [8.0, 8.1, 8.2],
            "loss",
            "A loss: over 3 seeds the student is -1.90 AP (95 %: -2.15 to -1.65) beside its twin.",
        ),
        ([10.0, 12.0, 9.0], "no difference", "No difference: over 3 seeds"),
        ([10.0, 10.0, 10.0], "no difference", "is +0.00 AP (95 %: +0.00 to +0.00)"),
        ([float("nan"), 12.0], "unknown", "Nothing can be said: some AP is no number"),
        ([12.0], "unknown", "One seed answers nothing: the student is +2.00 AP beside its twin"),
    ],
)
def test_the_sentence_says_what_the_interval_does(students, outcome, words):
    verdict = judge(students, [10.0] * len(students), "AP")
    assert verdict.outcome == outcome
    assert words in verdict.sentence


@pytest.mark.slow
def test_no_method_beside_its_twin_differs_by_exactly_nothing_with_every_seed(data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.seeds = (3, 4)
    summary = pipeline.run(config, tmp_path)
    assert summary["verdict"]["differences"] == (0.0, 0.0)
    assert summary["verdict"]["outcome"] == "no difference"
    assert summary["verdict"]["sentence"] in capsys.readouterr().out
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["seeds"] == [3, 4]
    assert written["verdict"]["interval"] == [0.0, 0.0]
    weights = [
        json.loads((tmp_path / f"seed_{seed}" / "stages" / name / "model" / "model.json").read_text())["sha256"]
        for seed in (3, 4)
        for name in ("student", "baseline")
    ]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    # Finished seeds are not run again, and one more is added.
    config.seeds = (3, 4, 5)
    assert pipeline.run(config, tmp_path)["verdict"]["differences"] == (0.0, 0.0, 0.0)
    assert "[student] finished earlier" in capsys.readouterr().out
