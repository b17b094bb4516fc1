"""What the pages of a run have in common: one file that loads and runs nothing, for screens of any width."""

import importlib.resources
from collections.abc import Mapping

from kdjax.markup import Html, element


def document(title: str, below: str, sections: Mapping[str, Html]) -> Html:
    """A page of sections by their titles, those that are empty left out.

    Args:
        title: of the page.
        below: what stands below it.
        sections: in order.
    """
    there = {name: part for name, part in sections.items() if part}
    links = [element("a", name, href=f"#{_anchor(name)}") for name in there]
    style = importlib.resources.files("kdjax.run").joinpath("report.css").read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"kdjax: {title}"),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element("h1", title),
        element("p", below, class_="faint"),
        element("nav", *links),
        *(element("section", element("h2", name), part, id=_anchor(name)) for name, part in there.items()),
    )
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
