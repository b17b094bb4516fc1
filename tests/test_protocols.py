"""Whole protocols, two steps of every stage: each config runs, and what one stage hands to the next."""

import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import kdjax
from kdjax.config import method_config
from kdjax.errors import UserError
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.run.record import Finished
from kdjax.run.start import load_origins
from kdjax.saved import describe, load_method
from tests.runs import rows, tiny, with_teacher
from tests.slow import slow_but
from tests.test_config import CONFIGS, load
from tests.weights.pickles import write_pth

FOLDER = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def finished(teacher, data_dir, tmp_path_factory):
    """A function from a config's file to its tiny config, the workdir where it ran, and what it printed, once each."""
    known = {}

    def run(path):
        if path not in known:
            config, workdir = tiny(path, data_dir), tmp_path_factory.mktemp(path.stem)
            if config.teacher.model.name == "retinanet":
                with_teacher(teacher, workdir)
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                pipeline.run(config, workdir)
            known[path] = config, workdir, shown.getvalue()
        return known[path]

    return run


@pytest.fixture(scope="module")
def maskd(finished):
    """The config of MasKD and the stages of its run."""
    config, workdir, _ = finished(FOLDER / "maskd.py")
    return config, workdir / "stages"


DETECTED = [path for path in CONFIGS if path.stem not in ("kd", "cwd")]
"""Configs whose names alone are detectors."""


@pytest.mark.parametrize("path", slow_but(("mgd",), DETECTED), ids=lambda path: path.stem)
def test_every_config_runs_its_whole_protocol(path, finished):
    config, workdir, shown = finished(path)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {"method", "primary", "teacher", "student", "baseline", "steps", "images_per_second"}
    assert summary["method"] == (" + ".join(sorted(config.student.methods)) or "none")
    assert summary["steps"] == 2
    assert summary["baseline"] is None
    assert 0 <= summary["student"]["AP"] <= 100
    module, variables = kdjax.load_student(workdir / "student")
    assert module.num_classes == len(summary["student"]["per_class"])
    assert variables.keys() == {"params", "batch_stats"}
    with Image.open(workdir / "predictions.png") as picture:
        assert picture.width > 3 * 100
    assert {row["step"] for row in rows(workdir / "stages" / "student")} == {2}
    assert ("[teacher] finished earlier" in shown) == (config.teacher.model.name == "retinanet")
    assert "inherits neck, head from the teacher" in shown
    assert re.search(r"\[student\] teacher: .*/teacher/model, all its \d+ arrays read", shown)
    assert "mismatched" not in shown


@pytest.mark.slow
def test_a_detector_of_masks_runs_its_whole_protocol(data_dir, tmp_path):
    config = load(FOLDER / "mgd.py", "solo:tiny")
    config.data.data_dir, config.compare = str(data_dir), True
    summary = pipeline.run(config, tmp_path)
    assert summary["primary"] == "AP"
    # It finds no boxes of its own: those around its masks are not judged.
    assert all(
        0 <= summary[role]["AP"] == summary[role]["mask_AP"] <= 100 for role in ("teacher", "student", "baseline")
    )


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.slow
def test_the_token_stage_leaves_the_teacher_as_it_was(maskd):
    _, stages = maskd
    (_, teacher), (module, kept) = (kdjax.load_student(stages / name / "model") for name in ("teacher", "tokens"))
    assert module.frozen_norm
    assert_equal(teacher, kept)


@pytest.mark.slow
def test_the_student_stage_keeps_the_tokens_as_they_were_learnt(maskd):
    _, stages = maskd
    learnt, kept = (load_method(stages / name / "method") for name in ("tokens", "student"))
    assert learnt.keys() == {"tokens"}
    assert_equal(learnt["tokens"], kept["tokens"])
    assert {name for name in kept if name != "tokens"} == {f"align_p{level}" for level in range(3, 6)}


@pytest.mark.slow
def test_tokens_in_a_file_of_the_authors_take_the_place_of_the_stage(maskd, tmp_path):
    config, stages = maskd
    learnt = load_method(stages / "tokens" / "method")["tokens"]
    names = {"tokens": "mask_token", "kernel_0": "prob.0.weight", "bias_0": "prob.0.bias"}
    names |= {"kernel_1": "prob.2.weight", "bias_1": "prob.2.bias"}
    saved = {
        f"module.mask_modules.{number}.{names[name]}": np.transpose(x, (3, 2, 0, 1)) if np.ndim(x) == 4 else x
        for number, level in enumerate(learnt.values())
        for name, x in level.items()
    }
    write_pth(tmp_path / "tokens.pth", saved)
    config = config.copy_and_resolve_references()
    config.stages, config.student.methods.maskd.init = ("teacher", "student"), str(tmp_path / "tokens.pth")
    plan = resolve(config, devices=8)
    class_names = describe(stages / "teacher" / "model")["class_names"]
    finished = {"teacher": Finished(stages / "teacher", {})}
    origins = load_origins(plan["student"], class_names, finished, "kdjax")
    assert_equal(origins.given["maskd"]["tokens"], learnt)


@pytest.mark.slow
def test_a_stage_that_learnt_no_tokens_cannot_give_any(maskd, tmp_path):
    config, stages = maskd
    shutil.copytree(stages / "teacher", tmp_path / "stages" / "teacher")
    config = config.copy_and_resolve_references()
    config.stages, config.student.methods.maskd.init = ("teacher", "student"), "teacher"
    with pytest.raises(UserError, match="teacher/method holds no method"):
        pipeline.run(config, tmp_path)


@pytest.mark.slow
def test_tokens_of_another_number_are_refused_with_both_shapes(maskd, tmp_path):
    config, stages = maskd
    for name in ("teacher", "tokens"):
        shutil.copytree(stages / name, tmp_path / "stages" / name)
    config = config.copy_and_resolve_references()
    config.student.methods.maskd.tokens = 4
    with pytest.raises(UserError, match=r"tokens/p3/tokens \(6, 16\) for \(4, 16\)"):
        pipeline.run(config, tmp_path)


@pytest.mark.slow
def test_a_method_that_needs_what_no_stage_gives_is_refused(maskd):
    config = maskd[0].copy_and_resolve_references()
    config.student.methods.maskd.init = ""
    with pytest.raises(UserError, match=r"'maskd', which needs config.student.methods.maskd.init"):
        resolve(config, devices=8)


def test_students_in_a_chain_are_compared_with_a_chain_of_baselines():
    config = load(FOLDER / "dfmsd.py", "tiny")
    config.compare = True
    plan = resolve(config, devices=8)
    names = ["baseline_first_student", "baseline"]
    assert [stage.name for stage in plan.stages] == [*config.stages, *names]
    assert plan.baseline.options.init == "baseline_first_student"
    for name, stage in zip(names, ("first_student", "student"), strict=True):
        assert plan[name].methods == {}
        assert plan[name].options.inherit == config[stage].inherit
        assert plan[name].steps == config[stage].steps
        assert plan[name].number == plan[stage].number


@pytest.mark.slow
def test_several_methods_share_a_stage_each_with_its_own_parameters(teacher, data_dir, tmp_path):
    """Their terms beside each other, an optimiser of one of them, a folder for each, and parts of one taken over."""
    config = tiny(FOLDER / "mgd.py", data_dir)
    dmkd = config.student.methods.dmkd = method_config("dmkd", levels=("p3",), keep_probability=0.5)
    dmkd.optimizer = ConfigDict(config.student.optimizer.to_dict())
    dmkd.optimizer.learning_rate = 1e-12
    config.student.methods.box_imitation = method_config("box_imitation")
    config.student.loss_weights.update(dmkd=1e-4, box_imitation=0.5)
    workdir = with_teacher(teacher, tmp_path)
    summary = pipeline.run(config, workdir)
    assert summary["method"] == "box_imitation + dmkd + mgd"
    stage = workdir / "stages" / "student"
    row = rows(stage)[-1]
    assert {f"raw/{name}/p3" for name in ("box_imitation", "dmkd", "mgd")} <= row.keys()
    assert "raw/dmkd/p4" not in row
    shares = [row[f"loss/{term}"] for term in ("cls", "box", "box_imitation", "dmkd", "mgd")]
    np.testing.assert_allclose(row["loss"], sum(shares), rtol=1e-5)
    learnt = {name: load_method(stage / "method" / name) for name in ("dmkd", "mgd")}
    assert learnt["dmkd"].keys() == {"spatial_p3", "channel_p3", "fusion_p3"}
    # With its own optimiser, whose rate is next to nothing, its scalars have not moved from zero.
    assert np.abs(learnt["dmkd"]["fusion_p3"]).max() < 1e-9
    # Another stage takes over what the method of its own name learnt.
    config.again = copy.deepcopy(config.student)
    config.stages = ("teacher", "student", "again")
    config.again.methods = ConfigDict(dict(mgd=method_config("mgd", init="student")))
    config.again.loss_weights = ConfigDict(dict(mgd=5e-4))
    pipeline.run(config, workdir)
    kept = load_method(workdir / "stages" / "again" / "method")
    assert_equal(kept, learnt["mgd"])
