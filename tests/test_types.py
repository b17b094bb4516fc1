"""What mypy and the contract tests see of misuses: each is planted in a copy of a module, and each is reported."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdjax.types import Model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdjax"

PLANTS = {
    # Of each file, what stands there, and what is planted in its place.
    "distill.py": [
        ("student.loss(predictions", "student.los(predictions"),
        ("teacher.strides)", "teacher.stridez)"),
        ("batch.size, batch.targets", "batch.sizes, batch.targets"),
        ("operations.heads(model", "operations.head(model"),
        ("method.module.needs}", "method.module.need}"),
    ],
    "evaluation.py": [("judge.add(output, batch)", "judge.add(batch)"), ("task.judge(source)", "task.judg(source)")],
    "run/train.py": [
        ("plan.task.statistics(splits.train)", "plan.task.statistic(splits.train)"),
        ("stage.eval_every)", "stage.evaluate_every)"),
    ],
    "run/floor.py": [("value = metrics[task.primary]", "value = metrics[task.first]")],
    "methods/mgd.py": [("student: View, teacher: View, *, size", "student: Features, teacher: View, *, size")],
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The lines of each copy that mypy reports, in one run over all of them."""
    folder = tmp_path_factory.mktemp("planted")
    for name, plants in PLANTS.items():
        for number, (sound, misused) in enumerate(plants):
            planted = (PACKAGE / name).read_text().replace(sound, misused, 1)
            (folder / f"{Path(name).stem}_{number}.py").write_text(planted)
    command = [
        sys.executable,
        "-m",
        "mypy",
        f"--config-file={ROOT / 'pyproject.toml'}",
        "--cache-dir",
        folder / "cache",
    ]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    files = sorted(folder.glob("*.py"))
    found = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines: dict[str, set[int]] = {}
    for stem, line in re.findall(r"(\w+)\.py:(\d+): error", found.stdout):
        lines.setdefault(stem, set()).add(int(line))
    return folder, lines


def test_what_a_misuse_takes_the_place_of_still_stands():
    gone = [
        (name, sound)
        for name, plants in PLANTS.items()
        for sound, _ in plants
        if sound not in (PACKAGE / name).read_text()
    ]
    assert not gone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, plants in PLANTS.items() for number in range(len(plants))]
)
def test_a_planted_misuse_is_reported_where_it_stands_and_nothing_else(name, number, reported):
    folder, lines = reported
    stem = f"{Path(name).stem}_{number}"
    misused = PLANTS[name][number][1]
    place = next(k for k, line in enumerate((folder / f"{stem}.py").read_text().splitlines(), 1) if misused in line)
    assert lines.get(stem) == {place}


def test_methods_of_models_are_named_by_strings_in_one_module_alone():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name != "operations.py":
                strings = [
                    k.value.value for k in node.keywords if k.arg == "method" and isinstance(k.value, ast.Constant)
                ]
                assert not [name for name in strings if hasattr(Model, name)], (path, node.lineno)


def test_pmap_is_in_one_place():
    """It is in maintenance mode: what takes its place one day changes one file."""
    uses = [path.name for path in PACKAGE.rglob("*.py") if re.search(r"\bjax\.pmap\(", path.read_text())]
    assert uses == ["devices.py"]


def test_the_package_hands_its_types_on():
    assert (PACKAGE / "py.typed").is_file()
