"""The pages of the project, and what of them is code."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str
    """The file that it is, if it is one."""
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(text: str, language: str = "") -> list[Block]:
    """The fenced code of a page or of a part of it, of one language or of all."""
    found = [Block(language, title or "", code) for language, title, code in _FENCE.findall(text)]
    return [block for block in found if language in ("", block.language)]


def commands(text: str) -> list[str]:
    """Every line of the shell that a page gives, those that go on in one."""
    return [
        line
        for block in blocks(text, "sh")
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def calls(line: str) -> list[tuple[str, list[str]]]:
    """The programs of kdjax that a line runs, with their arguments: ("predict", ["--model=..."])."""
    found = re.findall(r"(?:python -m kdjax\.|(?<![\w./=-])kdjax )(\w+)([^;&|>#]*)", line)
    # A quotation that began before the program ends behind it.
    told = [(program, said.rstrip().removesuffix('"') if said.count('"') % 2 else said) for program, said in found]
    return [(program, shlex.split(said)) for program, said in told]


def write_files(text: str, folder: Path) -> None:
    """Writes the files that a page names by the titles of its blocks."""
    for block in blocks(text):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)
