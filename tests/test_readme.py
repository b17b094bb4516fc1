"""The README's commands and its Python are what they claim to be, and so is what the page of losses shows."""

import re

import pytest

from tests.pages import ROOT, Block, blocks, read

README = read("README.md")
LOOPS = [block for block in blocks(read("docs/own-loop.md"), "python") if not block.title]


def run(block: Block, page: str, **names: object) -> dict[str, object]:
    """Runs a block as a program of its own; returns its names."""
    exec(compile(block.text, page, "exec"), names)
    return names


def test_the_loss_of_the_readme_is_one():
    (block,) = blocks(README, "python")
    loss = run(block, "README.md")["loss"]
    assert loss.shape == ()
    assert loss > 0


@pytest.mark.parametrize("step", ["train_step", "distill"])
def test_the_loss_in_another_project_falls(step):
    (example,) = (block for block in LOOPS if f"def {step}(" in block.text)
    values: list[float] = []
    run(example._replace(text=example.text + "    values.append(float(value))\n"), "own-loop.md", values=values)
    assert len(values) == 20
    assert values[-1] < values[0]


def test_a_whole_method_of_the_page_gives_its_terms(capsys):
    (example,) = (block for block in LOOPS if "def " not in block.text)
    names = run(example, "own-loop.md")
    assert len(LOOPS) == 3
    assert names["terms"]["dmkd"].keys() == {"p3", "p4"}
    assert "p4" in capsys.readouterr().out


def test_every_config_is_listed_and_every_listed_one_exists():
    table = README.partition("| config | method | paper |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "configs").glob("*.py")}


def test_ci_runs_the_test_command():
    lines = [line for block in blocks(README, "sh") for line in block.text.splitlines() if line.endswith("pytest")]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv .venv && ")
