"""What one stage hands to the next, through the folders of a whole run."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import kdjax
from kdjax import pipeline
from kdjax.checkpoint import load_method
from kdjax.errors import UserError
from tests.test_config import load

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def maskd(tmp_path_factory, data_dir):
    """The config of MasKD, two steps of everything, and the stages of its run."""
    config = load(CONFIGS / "maskd.py", "tiny")
    config.data.data_dir = str(data_dir)
    workdir = tmp_path_factory.mktemp("maskd")
    pipeline.run(config, workdir)
    return config, workdir / "stages"


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_the_token_stage_leaves_the_teacher_as_it_was(maskd):
    _, stages = maskd
    (_, teacher), (module, kept) = (kdjax.load_student(stages / name / "model") for name in ("teacher", "tokens"))
    assert module.frozen_norm
    assert_equal(teacher, kept)


def test_the_student_stage_keeps_the_tokens_as_they_were_learnt(maskd):
    _, stages = maskd
    learnt, kept = (load_method(stages / name / "method") for name in ("tokens", "student"))
    assert learnt.keys() == {"tokens"}
    assert_equal(learnt["tokens"], kept["tokens"])
    assert {name for name in kept if name != "tokens"} == {f"align_p{level}" for level in range(3, 7)}


def test_a_stage_that_learnt_no_tokens_cannot_give_any(maskd, tmp_path):
    config, stages = maskd
    shutil.copytree(stages / "teacher", tmp_path / "stages" / "teacher")
    config = config.copy_and_resolve_references()
    config.stages, config.student.method_init = ("teacher", "student"), "teacher"
    with pytest.raises(UserError, match="teacher/method holds no method"):
        pipeline.run(config, tmp_path)


def test_tokens_of_another_number_are_refused_with_both_shapes(maskd, tmp_path):
    config, stages = maskd
    for name in ("teacher", "tokens"):
        shutil.copytree(stages / name, tmp_path / "stages" / name)
    config = config.copy_and_resolve_references()
    config.student.method.tokens = 4
    with pytest.raises(UserError, match=r"tokens/p3/tokens \(6, 16\) for \(4, 16\)"):
        pipeline.run(config, tmp_path)


def test_a_method_that_needs_what_no_stage_gives_is_refused(maskd):
    config = maskd[0].copy_and_resolve_references()
    config.student.method_init = ""
    with pytest.raises(UserError, match=r"'maskd', which needs config.student.method_init"):
        pipeline.check_config(config, devices=8)


def test_students_in_a_chain_are_compared_with_a_chain_of_baselines():
    config = load(CONFIGS / "dfmsd.py", "tiny")
    extended, names = pipeline.add_baseline(config)
    assert names == ["baseline_first_student", "baseline"]
    assert extended.baseline.init == "baseline_first_student"
    for name, stage in zip(names, ("first_student", "student"), strict=True):
        assert extended[name].method.name == "none"
        assert extended[name].inherit == config[stage].inherit
        assert extended[name].steps == config[stage].steps
