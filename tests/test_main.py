"""The command line: each mistake is one sentence on standard error and an exit code, before any device work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdjax.errors import Exit
from tests.forks import ends

ROOT = Path(__file__).parents[1]

MISTAKES = {
    Exit.CONFIG: {
        "--config=configs/mgd.py --config.student.lr=0.1": "perhaps config.student.optimizer.learning_rate is meant",
        "--config=configs/mgd.py --config.student.stepz=3": "stepz",
        "--config=configs/mgd.py --config.student.steps=many": "many",
        "--config=configs/mgd.py --config.student.optimizer.learning_rate=nan": "learning_rate is nan; it must be",
        "--config=configs/mgd.py --config.student.methods.mgd.mask_ratio=1.5": "mask_ratio is 1.5; it must be",
        "--config=configs/mgd.py --config.student.teacher_floor=high": "teacher_floor is 'high'; it must be a number",
        "--config=configs/mgd.py:coco": "no variant 'coco'",
        "--config=mgd --config.student.loss_weights.mgd=high": "loss_weights.mgd is 'high'; it must be a number of",
        "--config=mgd --config.student.model.head.convs=many": "convs is 'many'; it must be a whole number",
        "--config=mgd --config.compare=maybe": "compare",
        "--config=mgd --config.seeds=(0,0)": "seeds is (0, 0); it must be a tuple of different whole numbers",
        "--config=mgd:coco": "no variant 'coco'",
        "--config=mgd --config.student.model.backbone.rmat=1": "perhaps config.student.model.backbone.remat is meant",
        "--config=mgd --config.student.model.backbone.remat=maybe": "backbone.remat=maybe",
        "--config=mgd --config.student.model.head.max_detections=0": "max_detections is 0; it must be a whole number",
        "--config=mgd --config.student.model.head.max_detections=x": "max_detections is 'x'; it must be a whole number",
        "--config=mgd --config.batch_size=3": "perhaps config.student.batch_size or config.teacher.batch_size is meant",
        "--config=mgd --config.learning_rate=3": "perhaps config.student.optimizer.learning_rate or config.teacher",
        "--config=maskd --config.tokens.methods.maskd_tokens.tokens=1": "tokens is 1; it must be a whole number of",
        "--config=mgd --config.student.methods.mgd.name=maskd": "mask is not a key of the method 'maskd', whose",
        "--config=configs/mgd.py --workdir=s3://bucket/x": "s3://bucket/x is in no place that is known",
        "--config=configs/mgd.py --config.data.name=coco_json:s3://bucket/x": "s3://bucket/x is in no place",
        "--config=configs/mgd.py --config.data.name=coco": "unknown data source 'coco'",
    },
    Exit.USAGE: {
        "--config=configs/mdg.py": "there is no file configs/mdg.py; name one, or one of the configs that come",
        "--config=mdg": "perhaps mgd",
        "--config= --workdir=x": "--config is missing",
        "--config=mgd --require_gain": "--require_gain asks what several seeds say",
        "": "--config is missing",
        "--config=configs/mgd.py --confg=3": "confg",
        "--config=mgd --processes=few": "few",
        "--config=~/no/such.py": f"there is no file {Path.home()}/no/such.py",
        "--config=configs/mgd.py extra": "'extra' is no flag",
    },
    Exit.STORAGE: {
        "--config=configs/mgd.py --workdir=/dev/null": "--workdir=/dev/null cannot be used",
    },
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How the program ends by each mistake."""
    workdir = f"--workdir={tmp_path_factory.mktemp('runs')}"
    every = [arguments for mistakes in MISTAKES.values() for arguments in mistakes]
    starts = [[*arguments.split(), *([] if "--workdir" in arguments else [workdir])] for arguments in every]
    return dict(zip(every, ends("kdjax.main", starts, tmp_path_factory.mktemp("told")), strict=True))


@pytest.mark.parametrize(
    ("code", "arguments"), [(code, arguments) for code, mistakes in MISTAKES.items() for arguments in mistakes]
)
def test_a_mistake_is_one_sentence_and_an_exit_code(code, arguments, ended):
    end = ended[arguments]
    assert end.code == code, end.told
    lines = end.told.strip().splitlines()
    assert len(lines) == 1, end.told
    assert lines[0].startswith("kdjax: ")
    assert MISTAKES[code][arguments] in lines[0]


def test_a_mistake_ends_the_program_itself(tmp_path):
    command = [sys.executable, "-m", "kdjax.main", "--config=mgd", "--config.seeds=(0,0)", f"--workdir={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == Exit.CONFIG
    assert len(run.stderr.strip().splitlines()) == 1
    assert run.stderr.startswith("kdjax: config.seeds is (0, 0); it must be")


def test_an_option_of_a_model_that_the_config_leaves_out_is_a_flag_as_well():
    given = {
        "student.model.backbone.remat": True,
        "student.model.neck.norm": "group",
        "teacher.model.pixel_std": (1.0, 2.0, 3.0),
    }
    program = (
        "import json, sys; from kdjax import main; from kdjax.plan import resolve\n"
        "sys.argv = ['main', '--config=mgd:retinanet_x101_r50', *sys.argv[1:]]; main.parse(sys.argv)\n"
        "plan = resolve(main.CONFIG.value, devices=8)\n"
        "print(json.dumps({stage.name: stage.options.model for stage in plan.stages}))"
    )
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    run = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    models = json.loads(run.stdout)
    assert models["student"]["backbone"] == {"depth": 50, "remat": True}
    assert models["student"]["neck"]["norm"] == "group"
    assert models["teacher"]["pixel_std"] == [1.0, 2.0, 3.0]
    assert "remat" not in models["teacher"]["backbone"]


def test_a_typo_is_answered_before_what_is_slow_to_import():
    program = (
        "import sys\nfrom kdjax import main\n"
        "try:\n    main.parse(['main', '--config=configs/mgd.py', '--config.student.lr=1'])\n"
        "except SystemExit as end:\n    assert end.code == 78\n"
        "slow = {'optax', 'orbax', 'grain', 'tensorflow_datasets', 'clu', 'PIL', 'faster_coco_eval'}\n"
        "print(slow & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr
