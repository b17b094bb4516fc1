"""What the pages say is true of the code: commands, examples, quoted messages, lists of names, links."""

import ast
import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from absl import flags
from ml_collections import config_flags
from PIL import Image

import kdjax
from experiments import figures
from kdjax import cli
from kdjax.config import config_names
from kdjax.main import _check_stray, _with_config_path
from kdjax.plan import resolve
from tests.pages import PAGES, ROOT, blocks, calls, commands, read, write_files

COMMANDS = [
    pytest.param(page, line, id=f"{page}: {line.strip()[:80]}")
    for page in PAGES
    for line in commands(read(page))
    if calls(line) and page != "CONTRIBUTING.md"
]
"""That run a program of kdjax; those of CONTRIBUTING are given by test_contributing."""
FILES = ("weights", "annotations", "init")
"""Flags and keys whose last word names a file."""
RUN = {
    "README.md": "test_readme",
    "docs/own-loop.md": "test_readme",
    "docs/predict.md": "test_predict",
    "docs/quickstart.md": "test_predict",
    "docs/deploy.md": "test_export",
    "docs/own-method.md": "here",
    "CONTRIBUTING.md": "test_contributing",
}
"""Which file of tests runs the Python of a page."""


def test_the_python_of_every_page_is_run():
    assert {page for page in PAGES if blocks(read(page), "python")} == RUN.keys()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # Of ml_collections.
@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_is_one_that_the_programs_take(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(read(page), tmp_path)
    for program, arguments in calls(line):
        module = cli.PROGRAMS[program][0] if program in cli.PROGRAMS else f"kdjax.{program}"
        check(module, [argument.replace("$BUCKET", "bucket").replace("$i", "0") for argument in arguments])


def check(module: str, arguments: list[str]) -> None:
    """Takes a command line as its program does, up to the plan of a run, with empty files for those that it names."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.rpartition(".")[2].lstrip("-") in FILES:
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).touch()
    holders = [x for name in ("kdjax.main", module) for x in vars(importlib.import_module(name)).values()]
    values = flags.FlagValues()
    for name in {holder.name for holder in holders if isinstance(holder, flags.FlagHolder)} - {"config"}:
        values[name] = copy.deepcopy(flags.FLAGS[name])
    takes_config = any(argument.startswith("--config") for argument in arguments)
    if takes_config and not any(argument.startswith("--config=") for argument in arguments):
        arguments = ["--config=mgd", *arguments]  # Which is in the model's folder.
    argv = _with_config_path([module, *arguments])
    _check_stray(argv)
    if takes_config:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    if takes_config:
        resolve(values.config, jax.local_device_count())


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_wrong_command_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in (
        "python -m kdjax.main --config=mgd --config.student.stps=1",
        "kdjax predict --modle=x",
        "python -m kdjax.main --config=mgd --config.student.steps=-1",
    ):
        ((program, arguments),) = calls(line)
        with pytest.raises((flags.Error, ValueError, AttributeError)):
            check(cli.PROGRAMS.get(program, [f"kdjax.{program}"])[0], arguments)


def test_what_troubleshooting_quotes_is_said():
    said = [
        "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for path in (ROOT / "kdjax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    symptoms = re.findall(r'^\|([^|]*"[^|]*)\|', read("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [
        words for row in symptoms for words in re.findall(r'"([^"]+)"', re.sub(r"<\w+>", "<>", row.replace("\\", "")))
    ]
    assert len(quoted) > 10
    assert [words for words in quoted if not any(words in text for text in said)] == []


def test_every_method_has_a_page_with_a_figure():
    table = read("docs/methods/index.md")
    for name in config_names():
        row = re.search(rf"^\| `{name}` \|(.*)$", table, re.MULTILINE)
        assert row, f"docs/methods/index.md has no row of {name}"
        if name != "none":
            (page,) = re.findall(r"\]\((\w+\.md)\)", row[1])
            (figure,) = re.findall(r"!\[[^]]+\]\((\S+)\)", read(f"docs/methods/{page}"))
            assert (ROOT / "docs" / "methods" / figure).is_file()
            assert page in read("mkdocs.yml")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_citation_names_the_five_papers():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == kdjax.__version__
    named = {re.search(r"--config=(\w+)", paper["notes"])[1]: paper["url"] for paper in citation["references"]}
    assert named.keys() == {"mgd", "maskd", "icd", "dmkd", "dfmsd"}
    for name, url in named.items():
        assert url in read(f"configs/{name}.py")
        assert url in read("README.md")


def test_the_changelog_has_this_version():
    assert f"\n## {kdjax.__version__}\n" in read("CHANGELOG.md")


def test_pre_commit_runs_what_ci_runs():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    steps = [line.removeprefix(".venv/bin/") for line in read(".ci/run").splitlines()]
    checks = steps[steps.index("ruff format --check .") : steps.index("lint-imports") + 1]
    assert [hook["entry"] for hook in repository["hooks"]] == checks


@pytest.mark.parametrize("chart", figures.CHARTS, ids=lambda chart: chart.name)
def test_the_pictures_of_results_are_those_of_the_notes(chart):
    assert read(f"experiments/{chart.name}.svg") == figures.drawn(chart), "python -m experiments.figures"
    assert f"]({chart.name}.svg)" in read("experiments/README.md")


def test_every_note_is_listed():
    notes = {path.name for path in (ROOT / "experiments").glob("2*.md")}
    assert set(re.findall(r"^\| \[\S+\]\((\S+)\)", read("experiments/README.md"), re.MULTILINE)) == notes


def give(lines: list[str], folder: Path, data_dir: Path) -> str:
    """Gives commands in a folder, as in the activated environment of this Python; returns what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PATH": path, "TFDS_DATA_DIR": str(data_dir)}
    users = os.environ | paths
    said = ""
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=users, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    return said


@pytest.mark.slow
def test_a_method_a_model_and_a_data_set_of_the_page_train_and_load(tmp_path, data_dir):
    text = read("docs/own-method.md")
    write_files(text, tmp_path)
    tries = [line for line in commands(text) if ":tiny" in line]
    assert len(tries) == 2
    said = give(tries, tmp_path, data_dir)
    assert "cosine" in said
    (tmp_path / "load.py").write_text("".join(block.text for block in blocks(text, "python") if not block.title))
    give(["python load.py"], tmp_path, data_dir)


@pytest.mark.slow
def test_the_quickstart_can_be_followed(tmp_path, data_dir):
    """In two steps of everything, and with what it finds first of the photographs that it asks about."""
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (80, 60), "white").save(tmp_path / "photographs" / "one.png")
    lines = [line for line in commands(read("docs/quickstart.md")) if re.search(r"runs/(tiny|first)\b", line)]
    assert [calls(line)[0][0] for line in lines] == ["main", "main", "predict", "export", "evaluate"]
    tried = [re.sub(r"--config=mgd(?!:)", "--config=mgd:tiny", line) for line in lines]
    said = give([line.replace("kdjax predict", "python -m kdjax.predict") for line in tried], tmp_path, data_dir)
    assert "baseline" in said
    table = read("docs/quickstart.md").partition("| in the workdir | |")[2].partition("\n\n")[0]
    # The embedded data are no image files.
    for name in set(re.findall(r"^\| `([\w./]+)` \|", table, re.MULTILINE)) - {"data_manifest.npz"}:
        assert (tmp_path / "runs" / "first" / name).exists(), name
    assert (tmp_path / "runs" / "first" / "stages" / "student" / "metrics.jsonl").exists()
    assert (tmp_path / "found" / "detections.json").exists()
    assert (tmp_path / "student.stablehlo.json").exists()
