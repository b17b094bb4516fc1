"""Text of any script is drawn by a font that has it, or can be read as an escape; never as boxes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from kdjax import lettering
from kdjax.lettering import shortened, width, write


@pytest.fixture(autouse=True)
def forgotten():
    """What was found out of the machine's fonts is not that of the next test's."""

    def forget():
        for cached in (lettering._fonts, lettering._covering, lettering._opened):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(lettering, "_folders", list)


def drawn(text: str, size: int = 20) -> np.ndarray:
    picture = Image.new("L", (600, 40))
    write(ImageDraw.Draw(picture), (5, 5), text, (255,), size)
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("cat 0.92", "cat 0.92"),
        ("na\u00efve", "naive"),
        ("\u732b 0.92", r"\u732b 0.92"),
        ("\u0642\u0637\u0629 \u0628", r"\u0642\u0637\u0629 \u0628"),
        ("\U0001f408", r"\U0001f408"),
        ("a\nb\tc", r"a\nb\tc"),
    ],
)
def test_what_no_font_has_is_escaped(text, escaped, no_fonts):
    assert "".join(run for run, _ in lettering._runs(text, 20)) == escaped
    np.testing.assert_array_equal(drawn(text), drawn(escaped))


def test_a_font_of_the_machine_draws_what_the_usual_one_lacks(tmp_path, monkeypatch):
    """Which one has it is asked of each file: here of one that is no font, and of one that is."""
    path = next((x for x in lettering._fonts() if x.name == "DejaVuSans.ttf"), None)
    if path is None:
        pytest.skip("no font to try with")
    (tmp_path / "sub").mkdir()
    shutil.copy(path, tmp_path / "sub" / "any.ttf")
    (tmp_path / "a.ttf").write_bytes(b"no font")
    lettering._fonts.cache_clear()
    monkeypatch.setattr(lettering, "_folders", lambda: [tmp_path])
    text = "\u0642\u0637\u0629 \u0633\u0648\u062f\u0627\u0621 0.92"
    (arabic, font), (rest, usual) = lettering._runs(text, 20)
    assert (arabic, rest) == (text[:-5], " 0.92")
    assert Path(font.path) == tmp_path / "sub" / "any.ttf"
    assert usual.getname() == ImageFont.load_default(20).getname()
    # What it lacks is escaped still.
    assert "".join(run for run, _ in lettering._runs("\u732b", 20)) == r"\u732b"


def test_every_font_says_what_it_lacks():
    font = ImageFont.load_default(16)
    assert all(lettering._has(font, x) for x in "aZ0.: ")
    assert not any(lettering._has(font, x) for x in "\u732b\n\U0010fffe")


@pytest.mark.parametrize("text", ["cat 0.92", "\u732b\u5b50", "gyp"])
def test_text_is_as_wide_as_it_says_and_inside_its_line(text, no_fonts):
    rows, columns = np.nonzero(drawn(text))
    assert 5 <= rows.min() < rows.max() < 5 + 20 + 5
    assert columns.max() - columns.min() == pytest.approx(width(text, 20), abs=4)


def test_long_text_keeps_its_end():
    assert shortened("a.jpg", 13, 100) == "a.jpg"
    short = shortened("x" * 100 + ".jpg", 13, 100)
    assert short.startswith("...x")
    assert short.endswith("x.jpg")
    assert 80 < width(short, 13) <= 100
