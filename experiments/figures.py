"""Draws the pictures of this folder's page from the tables in its notes: ``python -m experiments.figures``.

A picture shows columns of one table, a group of bars for each row; what a note says is the only place of its numbers.
"""

import html
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
_SVG = "http://www.w3.org/2000/svg"
_COLOURS = ("#9aa5b1", "#2f6db5", "#e0a030")
_LEFT, _WIDTH, _BAR = 290, 900, 13
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


class Chart(NamedTuple):
    """What of a note is drawn."""

    name: str
    note: str
    header: str
    """How the first line of the table begins."""
    title: str
    legend: dict[int, str]
    """The columns that are drawn, from 0, with what they are called."""
    label: tuple[int, ...] = (0,)
    """The columns that name a row."""


CHARTS = (
    Chart(
        "methods",
        "2026-11-21-methods.md",
        "| method | seeds |",
        "COCO AP on the embedded data, mean of three seeds",
        {4: "the student alone", 3: "the same student, distilled"},
    ),
    Chart(
        "detectors",
        "2026-11-27-dense.md",
        "| method | seeds | teacher AP |",
        "COCO AP on the embedded data by detector, of masks for SOLO, mean of three seeds",
        {4: "the student alone", 3: "the same student, distilled", 2: "teacher"},
    ),
    Chart(
        "own-data",
        "2026-11-26-own-data.md",
        "| data | seed | teacher |",
        "COCO AP on photographs of a microscope, by seed",
        {4: "the student alone", 3: "the same student, MGD", 2: "teacher"},
        label=(0, 1),
    ),
    Chart(
        "dfmsd",
        "2026-11-26-dfmsd.md",
        "| run | what is left out |",
        "DFMSD without each of its parts: gain over the student alone, COCO AP, three seeds",
        {3: "gain, seeds 0, 1 and 2"},
    ),
    Chart(
        "other-tasks",
        "2026-11-26-other-tasks.md",
        "| config | teacher |",
        "Segmentation (mIoU) and classification (top-1), means of three seeds",
        {3: "the student alone", 2: "the same student, distilled", 1: "teacher"},
    ),
    Chart(
        "losses",
        "2026-11-21-losses.md",
        "| loss and gradient, beside |",
        "Loss and gradient at 800x1344: milliseconds",
        {1: "kdjax", 2: "its formulas or convolutions"},
    ),
    Chart(
        "operations",
        "2026-11-21-operations.md",
        "| operation |",
        "Operations of detectors: temporary memory, MiB",
        {5: "kdjax", 6: "torchvision's formulas"},
    ),
    Chart(
        "tpu-step",
        "2026-11-26-tpu-step.md",
        "| `mgd:retinanet_x101_r50`, 8 images",
        "MGD's step on a v5e chip, 8 images, as compiled: peak of the memory, GB",
        {1: "peak, GB"},
    ),
)


def main() -> None:
    """Writes all pictures anew."""
    for chart in CHARTS:
        (HERE / f"{chart.name}.svg").write_text(drawn(chart))


def rows(chart: Chart) -> list[list[str]]:
    """The cells of the chart's table, row by row."""
    lines = (HERE / chart.note).read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(chart.header))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([re.sub(r"[`*]", "", cell).strip() for cell in line.strip("|").split("|")])
    return found


def bars(chart: Chart) -> list[tuple[str, list[tuple[int, str]]]]:
    """The label of each row that has all numbers, and its bars: the place of a column in the legend, and a number."""
    found = []
    for row in rows(chart):
        cells = [(place, row[column].split(", ")) for place, column in enumerate(chart.legend)]
        values = [(place, number) for place, parts in cells for part in parts for number in _NUMBER.findall(part)[:1]]
        if {place for place, _ in values} == set(range(len(chart.legend))):
            found.append((" ".join(_short(row[column]) for column in chart.label), values))
    return found


def _short(label: str) -> str:
    """Of a command its config and its data, such as "mgd:segmentation index_maps:<nuclei>"; others as they are."""
    return " ".join(re.findall(r"--config(?:\.data\.name)?=(\S+)", label)) or label


def drawn(chart: Chart) -> str:
    """The picture, as SVG."""
    groups = bars(chart)
    scale = (_WIDTH - _LEFT - 60) / max(float(number) for _, values in groups for _, number in values)
    parts, y = [], 62
    for place, words in enumerate(chart.legend.values()):
        x = _LEFT + 220 * place
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{_COLOURS[place]}"/>')
        parts.append(f'<text x="{x + 18}" y="43">{html.escape(words)}</text>')
    for label, values in groups:
        middle = y + _BAR * len(values) / 2 + 4
        parts.append(f'<text x="{_LEFT - 8}" y="{middle:g}" text-anchor="end">{html.escape(label)}</text>')
        for place, number in values:
            length = max(1.0, float(number) * scale)
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR - 2}" fill="{_COLOURS[place]}"/>'
                f'<text x="{_LEFT + length + 5:.1f}" y="{y + 9}" font-size="10">{number}</text>'
            )
            y += _BAR
        y += 9
    return "\n".join(
        [
            f'<svg xmlns="{_SVG}" viewBox="0 0 {_WIDTH} {y}" font-family="sans-serif" font-size="12">',
            f"<title>{html.escape(chart.title)}</title>",
            f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>',
            f'<text x="12" y="20" font-size="14" font-weight="bold">{html.escape(chart.title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
