"""The step of a run, compiled for devices that are not there."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kdjax.config import load_config
from kdjax.errors import Exit, StorageError, UserError
from kdjax.files import check_writable
from kdjax.plan import resolve
from kdjax.run.lowered import lower_step
from kdjax.saved import save_method
from kdjax.tpu import _ENVIRONMENT, CHIPS, compile_for, estimated_rate, in_words, preflight

ROOT = Path(__file__).parents[1]
COUNTS = """
import json, sys, jax
from kdjax.config import load_config
from kdjax.plan import resolve
from kdjax.run.lowered import examine, lower_step
devices, config = jax.devices(), load_config("mgd:tiny")
config.eval_batch_size = config.teacher.batch_size = config.student.batch_size = 2 * len(devices)
config.teacher.dtype = config.student.dtype = "bfloat16"
plan = resolve(config, devices=len(devices))
step = lower_step(plan, plan["student"], devices, share=2, classes=6)
report = examine(step, 2)
report.pop("compile_seconds")
teacher = step.lowered.args_info[0][1]["params"]
leaves = jax.tree_util.tree_leaves_with_path(teacher)
report["kernels"] = sorted({str(x.dtype) for path, x in leaves if path[-1].key == "kernel"})
print(json.dumps(report))
"""


def counts(devices: int) -> dict:
    """What the compiler says of a small step that two images on each of so many devices take."""
    environment = dict(os.environ)
    forced = f" --xla_force_host_platform_device_count={devices}"
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(" --xla_force_host_platform_device_count=8", forced)
    run = subprocess.run([sys.executable, "-c", COUNTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_a_device_does_is_the_same_on_eight_64_and_256_devices():
    """Operations, memory, and what is told to the others: as many elements as parameters are trained, and few more."""
    eight, more, most = counts(8), counts(64), counts(256)
    assert eight == more == most
    trained = eight["trained_parameters"]
    assert trained <= eight["all_reduce_elements"] < 1.02 * trained
    assert eight["all_reduce_elements_by_dtype"].keys() == {"f32"}
    assert eight["kernels"] == ["bfloat16"]


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("libtpu"), reason="the compiler for TPUs, libtpu, is not installed")
def test_a_small_step_is_compiled_for_a_slice_of_a_pod(tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "kdjax.preflight", "--config=mgd:tiny", "--topology=v5e:2x4"]
    command += ["--config.student.dtype=bfloat16", "--config.teacher.dtype=bfloat16"]
    run = subprocess.run(
        [*command, "--per_chip=2", "--classes=6", f"--output={file}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Compiled for 8 chips of v5e:2x4, 2 images on each, with 6 classes, in" in run.stdout
    report = json.loads(file.read_text())
    assert report["fits"]
    assert report["peak_bytes"] < report["hbm_bytes"]
    assert report["trained_parameters"] <= report["all_reduce_elements"] < 1.02 * report["trained_parameters"]
    assert report["all_reduce_bf16_elements"] == 0
    config = load_config("mgd:tiny")
    config.student.batch_size = 12
    with pytest.raises(UserError, match=r"The 8 chips .* cannot share the config's 12 images .* such as --per_chip=8"):
        compile_for(config.to_dict(), "v5e:2x4", None, 6)


REPORT = {
    "topology": "v5e:2x4",
    "chips": 8,
    "per_chip": 8,
    "fits": True,
    "compile_seconds": 80.0,
    "hbm_bytes": CHIPS["v5e"].hbm,
    "peak_bytes": 7_900_000_000,
    "argument_bytes": 700_000_000,
    "temporary_bytes": 7_200_000_000,
    "output_bytes": 0,
    "flops_per_image": 2.5e12,
    "flops_per_image_of": {"student": 1.5e12, "teacher": 0.7e12, "method": 0.2e12},
    "traffic_bytes_per_image": 9e9,
    "classes": 80,
    "open_loops": 0,
    "collectives": 3,
    "all_reduce_elements": 40_000_000,
    "all_reduce_bf16_elements": 0,
    "all_reduce_elements_by_dtype": {"f32": 40_000_000},
    "trained_parameters": 40_000_000,
}


def test_the_estimate_is_the_slower_of_compute_and_memory_and_what_links_add():
    rate = estimated_rate(REPORT, CHIPS["v5e"])
    assert rate["compute_milliseconds"] == pytest.approx(1e3 * 8 * 2.5e12 / 197e12)
    assert rate["memory_milliseconds"] == pytest.approx(1e3 * 8 * 9e9 / 819e9)
    assert rate["links_milliseconds"] == pytest.approx(1e3 * 2 * 160e6 * 7 / 8 / 200e9)
    step = rate["compute_milliseconds"] + rate["links_milliseconds"]
    assert rate["images_per_second_estimate"] == pytest.approx(1e3 * 64 / step)
    words = in_words(REPORT | rate | {"largest_batch": 11})
    assert "7.90 GB at the peak of 16.91" in words
    assert "estimate from published peaks" in words
    assert "11 images per chip" in words
    assert "loops" not in words
    assert in_words(REPORT | rate | {"open_loops": 3}).count(" (one turn of each of 3 loops") == 2


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "v7x:2x2", "v5e:2x2:1"])
def test_a_topology_that_is_none_is_refused_with_what_one_is(topology):
    with pytest.raises(UserError, match=f"--topology={topology} is none .* such as v5e:16x16"):
        preflight(load_config("mgd:tiny"), topology, per_chip=2, classes=6)


def test_without_its_compiler_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, is not installed: pip install 'kdjax\[preflight\]'"):
        preflight(load_config("mgd:tiny"), "v5e:2x2", per_chip=2, classes=6)


@pytest.fixture
def installed(monkeypatch):
    """The compiler for TPUs, as far as asking for it goes."""
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: name if name == "libtpu" else found(name))
    for name in _ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": ""}:
        monkeypatch.setenv(name, "")
    return monkeypatch


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_compiler_that_dies_is_said_in_words(installed):
    installed.setattr("kdjax.tpu.compile_for", killed)
    with pytest.raises(
        UserError, match=r"crashed over --topology=v5e:2x2 with 2 images per chip: either it was killed"
    ):
        preflight(load_config("mgd:tiny"), "v5e:2x2", per_chip=2, classes=6)


def room_for_eleven(content, topology, per_chip, classes, in_parts):
    report = {"per_chip": per_chip, "classes": classes, "fits": per_chip <= 11}
    return {**REPORT, **report} if report["fits"] else {"chips": 8, "refused": "Used 17G of 15.75G hbm", **report}


@pytest.mark.parametrize(
    ("error", "words"),
    [(BrokenProcessPool(), "crashed over"), (jax.errors.JaxRuntimeError("INTERNAL: no such\n layout"), "failed over")],
)
def test_a_compiler_that_dies_over_a_larger_batch_leaves_the_report_of_the_one_that_was_asked_for(
    error, words, installed, capsys
):
    def dies_over_twelve(content, topology, per_chip, classes, in_parts):
        if per_chip > 11:
            raise error
        return room_for_eleven(content, topology, per_chip, classes, in_parts)

    installed.setattr("kdjax.tpu.compile_for", dies_over_twelve)
    installed.setattr("kdjax.tpu.ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    report = preflight(load_config("mgd:tiny"), "v5e:2x4", per_chip=8, classes=6, bisect=True)
    assert report["largest_batch"] == 11
    assert f"{words} --topology=v5e:2x4 with 16 images per chip" in capsys.readouterr().out


@pytest.mark.parametrize(("per_chip", "bisect", "largest"), [(8, False, None), (8, True, 11), (32, False, 11)])
def test_the_largest_batch_is_found_where_it_is_asked_for_or_nothing_else_fits(per_chip, bisect, largest, installed):
    installed.setattr("kdjax.tpu.compile_for", room_for_eleven)
    installed.setattr("kdjax.tpu.ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    report = preflight(load_config("mgd:tiny"), "v5e:2x4", per_chip=per_chip, classes=6, bisect=bisect)
    assert report.get("largest_batch") == largest
    assert ("images_per_second_estimate" in report) == report["fits"] == (per_chip == 8)


def test_what_an_earlier_stage_or_another_run_learnt_is_not_trained(tmp_path):
    """MasKD's tokens: of the method only the alignment is trained beside the student."""
    config = load_config("maskd:tiny")
    plan = resolve(config, devices=8)
    step = lower_step(plan, plan["student"], jax.devices(), share=1, classes=6)
    alone = lower_step(plan, dataclasses.replace(plan["student"], methods={}), jax.devices(), share=1, classes=6)
    tokens = lower_step(plan, plan["tokens"], jax.devices(), share=1, classes=6)
    assert alone.trained_parameters <= step.trained_parameters < alone.trained_parameters + 2000
    assert tokens.trained_parameters > 0
    save_method(tmp_path / "method", {"tokens": jnp.ones(1)}, {"name": "maskd_tokens"})
    config.student.methods.maskd.init = str(tmp_path / "method")
    plan = resolve(config, devices=8)
    taken = lower_step(plan, plan["student"], jax.devices(), share=1, classes=6)
    assert taken.trained_parameters == step.trained_parameters


def test_a_report_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    for path in (tmp_path / "missing" / "x.json", tmp_path):
        with pytest.raises(StorageError, match=f"^--output={path} cannot be written"):
            check_writable("output", path)
    check_writable("output", tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_the_table_of_all_pairs_leaves_out_what_no_config_has_and_refuses_what_is_nothing(tmp_path):
    """In a process of its own, as its flags are also those of other programs."""
    pairs, code = ["gfl_r101_r50", "retinanet_r50_r18"], "import json, sys; from experiments.pods import variants; "
    code += "print(json.dumps(variants(*json.loads(sys.argv[1]))))"

    given = json.dumps([["kd", "ld", "mgd"], pairs])
    run = subprocess.run([sys.executable, "-c", code, given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [
        ["ld", "gfl_r101_r50"],
        ["mgd", "gfl_r101_r50"],
        ["mgd", "retinanet_r50_r18"],
    ]
    for flag, words in (
        ("--pairs=retinanet_r5_r18", "--pairs=retinanet_r5_r18 is none of retinanet_x101_r50, "),
        ("--methods=mdg", "mdg"),
    ):
        command = [sys.executable, "-m", "experiments.pods", f"--workdir={tmp_path}", flag]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == Exit.USAGE
        assert words in run.stderr
        assert len(run.stderr.splitlines()) == 1


def test_the_table_of_all_pairs_says_what_fits_and_what_has_no_room():
    known = {"method": "mgd", "pair": "gfl", "topology": "v5e:2x4", "per_chip": 8}
    numbers = ("peak_bytes", "flops_per_image", "traffic_bytes_per_image", "images_per_second_estimate")
    counts = ("all_reduce_elements", "all_reduce_bf16_elements", "trained_parameters")
    fits = known | dict.fromkeys(numbers, 2e12) | dict.fromkeys(counts, 1000) | {"open_loops": 12}
    code = "import json, sys; from experiments.pods import table; print(table(json.loads(sys.argv[1])))"
    given = json.dumps([fits, known | {"refused": "20 GB of 17", "largest_batch": 6}])
    run = subprocess.run([sys.executable, "-c", code, given], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, row, refused = run.stdout.splitlines()
    assert (
        row == "| mgd:gfl | v5e:2x4 | 8 | 2000.00 | 2.000 | 2000.00 | 1,000 (1,000) | 1,000 | 2000000000000 |  | 12 |"
    )
    assert refused == "| mgd:gfl | v5e:2x4 | 8 | no room: 20 GB of 17; 6 fit |"
