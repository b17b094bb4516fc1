"""Turns what docstrings of kdjax say for Python into Markdown for the site: examples, formulas, and references."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^|(?<=\n\n))([ ]*)>>> .*?(?=\n\n|\Z)", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|mod|meth|data):`~?([^`]+)`")


class Markdown(griffe.Extension):
    """Fences the examples, ends sentences before formulas by one colon, and names what is referred to."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of a module, class, function or attribute once it is collected."""
        if obj.docstring:
            text = _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(r"`\1`", re.sub(r"::$", ":", text, flags=re.MULTILINE))
