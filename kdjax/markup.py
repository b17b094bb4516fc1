"""HTML and SVG in which nothing is forgotten to be escaped: any text becomes safe where it enters an element."""

import html
import re
from collections.abc import Sequence


class Html(str):
    """Text that is HTML already."""


_EMPTY = ("img", "meta")
"""Elements that have no end."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no HTML may have; names of files may."""


def escaped(text: str) -> Html:
    """Any text as HTML that shows it.

    >>> escaped("<b>&'")
    '&lt;b&gt;&amp;&#x27;'
    """
    return text if isinstance(text, Html) else Html(html.escape(_CONTROL.sub("\ufffd", str(text))))


def element(name: str, /, *inside: str, **attributes: str | float) -> Html:
    """An element of HTML or SVG; what is inside of it, and its attributes, are escaped unless they are HTML.

    >>> element("p", "a < b", element("b", "c"), class_="x", stroke_width=2)
    '<p class="x" stroke-width="2">a &lt; b<b>c</b></p>'

    Args:
        name: of the element.
        *inside: texts and elements.
        **attributes: by name, with "_" for "-"; one at the end falls away.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(str(x))}"' for key, x in attributes.items())
    return Html(f"<{name}{written}>{'' if name in _EMPTY else ''.join(map(escaped, inside)) + f'</{name}>'}")


def joined(*parts: str) -> Html:
    """Texts and elements one after another."""
    return Html("".join(map(escaped, parts)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, class_: str = "numbers", sum_: bool = False) -> Html:
    """A table whose first column names rows; it can be scrolled where the page is narrow.

    Args:
        head: a heading for each column.
        rows: texts or elements.
        class_: of the table.
        sum_: whether the last row is about the others.
    """
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
            class_="sum" if sum_ and number == len(rows) else "row",
        )
        for number, row in enumerate(rows, start=1)
    ]
    inside = element("thead", top), element("tbody", *body)
    return element("div", element("table", *inside, class_=class_), class_="scroll", tabindex=0)
