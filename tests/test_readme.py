"""The README's commands and its Python are what they claim to be."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("step", ["train_step", "distill"])
def test_the_loss_in_another_project_falls(step):
    (example,) = (block for block in blocks("python") if f"def {step}(" in block)
    values: list[float] = []
    watched = example + "    values.append(float(value))\n"
    exec(compile(watched, "README.md", "exec"), {"values": values})
    assert len(values) == 20
    assert values[-1] < values[0]


def test_every_config_is_listed_and_every_listed_one_exists():
    table = README.partition("| config | method | paper |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "configs").glob("*.py")}


def test_ci_runs_the_test_command():
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.endswith("pytest")]
    assert len(commands) == 1
    assert commands[0].startswith("python3 -m venv .venv && ")
