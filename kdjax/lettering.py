"""Text of any script in pictures: Pillow's own font, fonts of the machine for what it lacks, escapes for the rest."""

import functools
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SUFFIXES = (".ttf", ".otf", ".ttc")
_NO_LETTERS = ("lastresort", "blank", "emoji")
"""Fonts that say of every character that they have it, or draw it in their own sizes only."""
_STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "math")
_NONCHARACTER = "\U0010fffe"
"""No font has it: what is drawn for it is what a font draws in place of all that it lacks."""


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: tuple[int, ...], size: int) -> None:
    """Draws a line of text whose upper left corner is at ``place``."""
    (x, y), baseline = place, ImageFont.load_default(size).getbbox("H", anchor="ls")[1]
    for run, font in _runs(text, size):
        draw.text((x, y - baseline + size // 6), run, colour, font, anchor="ls")
        x += font.getlength(run)


def width(text: str, size: int) -> float:
    """How wide :func:`write` makes a text, in pixels."""
    return sum(font.getlength(run) for run, font in _runs(text, size))


def shortened(text: str, size: int, room: float) -> str:
    """The text, or as much of its end as fits into ``room`` pixels behind an ellipsis: a file's name is at the end."""
    start = 0
    while start < len(text) and width("..." * (start > 0) + text[start:], size) > room:
        start += 1
    return "..." * (start > 0) + text[start:]


def _runs(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """A text as runs of one font each, what no font has as escapes."""
    usual = ImageFont.load_default(size)
    for foreign, marked in itertools.groupby(_marked(text), key=lambda pair: pair[1]):
        run = "".join(character for character, _ in marked)
        if not foreign:
            yield run, usual
        elif path := _covering(frozenset(run)):
            yield run, _opened(path, size)
        else:
            for known, characters in itertools.groupby(run, key=_usual_has):
                piece = "".join(characters)
                path = None if known else _covering(frozenset(piece))
                yield (piece, _opened(path, size)) if path else ("".join(map(_readable, piece)), usual)


def _marked(text: str) -> list[tuple[str, bool]]:
    """The characters, each with whether it is in a word that needs another font than the usual one.

    Spaces between such words belong to them: a line from right to left is one run.
    """
    words = re.findall(r" +|[^ ]+", text)
    foreign = [not all(map(_usual_has, word)) for word in words]
    for k in range(1, len(words) - 1):
        foreign[k] |= words[k].isspace() and foreign[k - 1] and foreign[k + 1]
    return [(character, other) for word, other in zip(words, foreign, strict=True) for character in word]


def _readable(character: str) -> str:
    """A character if the usual font has it, or its letter without its marks, or an escape."""
    plain = "".join(x for x in unicodedata.normalize("NFKD", character) if not unicodedata.combining(x))
    return plain if plain and all(map(_usual_has, plain)) else _escaped(character)


def _escaped(character: str) -> str:
    r"""What can be read of a character that cannot be drawn.

    >>> print(_escaped(chr(0x732b)))
    \u732b
    """
    return character.encode("unicode_escape").decode()


@functools.cache
def _usual_has(character: str) -> bool:
    return _has(ImageFont.load_default(16), character)


def _has(font: Font, character: str) -> bool:
    """Whether a font draws a character, and no box in its place."""
    kind = unicodedata.category(character)
    if kind in ("Zs", "Cc"):
        return kind == "Zs"
    drawn, replaced = (font.getmask(x) for x in (character, _NONCHARACTER))
    return bool(drawn.getbbox()) and (drawn.size, bytes(drawn)) != (replaced.size, bytes(replaced))


@functools.cache
def _covering(characters: frozenset[str]) -> Path | None:
    """The first font of the machine that has all these characters."""
    for path in _fonts():
        try:
            font = _opened(path, 16)
            if all(_has(font, character) for character in characters):
                return path
        except (OSError, ValueError):  # Not every file with such a name is a font that FreeType scales.
            continue
    return None


@functools.cache
def _opened(path: Path, size: int) -> Font:
    return ImageFont.truetype(path, size)


@functools.cache
def _fonts() -> tuple[Path, ...]:
    """The fonts of the machine, plain ones first."""
    paths = [path for folder in _folders() for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
    usable = [path for path in paths if not any(word in path.name.lower() for word in _NO_LETTERS)]
    return tuple(sorted(usable, key=lambda path: (sum(x in path.stem.lower() for x in _STYLES), path.name)))


def _folders() -> list[Path]:
    """Where Linux, macOS and Windows keep fonts."""
    home, shared = Path.home(), os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local" / "share")
    folders = [*(Path(folder) / "fonts" for folder in [own, *shared.split(":")]), home / ".fonts"]
    folders += [home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    windows = [os.environ.get("WINDIR", ""), os.path.join(os.environ.get("LOCALAPPDATA", ""), "Microsoft", "Windows")]
    folders += [Path(folder) / "Fonts" for folder in windows if folder]
    return [folder for folder in folders if folder.is_dir()]
