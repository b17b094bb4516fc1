"""The page of what a method does inside, ``inside.html``: pictures of maps and masks, and what pulls at each level."""

import base64
import io
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from kdjax.files import replace_text
from kdjax.heat import masked, over, strip
from kdjax.markup import Html, element, joined, table
from kdjax.paths import Path
from kdjax.plan import Plan
from kdjax.run.commands import methods_of
from kdjax.run.document import document
from kdjax.run.inside import Inside, Level, Pull, look_inside
from kdjax.types import Source

INSIDE_FILE = "inside.html"

_LONGEST = 192
"""Side of a picture, in pixels."""
_REMARK = (
    "Features are shown by the mean over channels of their absolute values, all of a level on one scale; the number is "
    "the mean over the map. Masks leave the image where the student's features are kept."
)
_MOST_TOKENS = 6
"""That are shown of a level."""


def write_inside(plan: Plan, workdir: Path, stage: str, source: Source, images: int) -> Path:
    """Writes the page; returns where it is. The arguments are those of :func:`kdjax.run.inside.look_inside`."""
    found = look_inside(plan, workdir, stage, source, images)
    path = workdir / INSIDE_FILE
    replace_text(path, inside_page(plan, f"{stage}, {workdir}", found))
    return path


def inside_page(plan: Plan, below: str, found: Inside) -> Html:
    """The whole document."""
    sections = {"What pulls": _pulls(found)}
    for row in range(len(found.batch.images)):
        levels = (_level(found, row, name, level) for name, level in found.levels.items())
        sections[f"Image {row}"] = joined(element("p", _REMARK, class_="remark"), *levels)
    return document(f"Inside {methods_of(plan)} on {plan.data.name}", below, sections)


def _pulls(found: Inside) -> Html:
    """Each term at each level, and how much of it the student's features feel."""
    points = list(dict.fromkeys(point for by_point in found.pulls.values() for point in by_point))
    head = ["", *(f"{point}, {what}" for point in points for what in ("value", "gradient"))]
    rows = [
        [part.replace("/", ", "), *(f"{x:.3g}" for point in points for x in by_point[point])]
        for part, by_point in found.pulls.items()
    ]
    told = [element("p", sentence) for sentence in strongest(found.pulls)]
    told += [element("p", f"{name} is not here: it needs a model's heads.", class_="remark") for name in found.left_out]
    remark = (
        f"On the {len(found.batch.images)} images below, without weights: each term, and the norm of its gradient by "
        "the student's features. Methods are as they were at the end, or fresh in a run that is not finished."
    )
    return joined(element("p", remark, class_="remark"), *told, table(head, rows) if rows else Html())


def strongest(pulls: Mapping[str, Mapping[str, Pull]]) -> list[str]:
    """A sentence on each term of whose gradient one level has most, at the first point.

    >>> strongest({"a/p3": {"before": Pull(1.0, 1.0)}, "a/p4": {"before": Pull(1.0, 9.0)}})
    ['p4 has 90% of what a pulls with at the first point, by the norm of its gradient.']
    """
    sentences = []
    for term in dict.fromkeys(part.partition("/")[0] for part in pulls if "/" in part):
        levels = {part.partition("/")[2]: by_point for part, by_point in pulls.items() if part.startswith(f"{term}/")}
        point = next(iter(next(iter(levels.values()))))
        norms = {level: by_point[point].gradient for level, by_point in levels.items()}
        level, whole = max(norms, key=lambda x: norms[x]), sum(norms.values())
        if len(norms) > 1 and norms[level] > 0.5 * whole > 0:
            share = norms[level] / whole
            sentences.append(
                f"{level} has {share:.0%} of what {term} pulls with at the first point, by the norm of its gradient."
            )
    return sentences


def _level(found: Inside, row: int, name: str, level: Level) -> Html:
    """One level of one image: teacher, student through the training, their difference, and masks."""
    height, width = np.asarray(found.batch.size[row]).tolist()
    image = np.asarray(found.batch.images[row])[:height, :width]
    rows, columns = -(-height // level.stride), -(-width // level.stride)

    def inside(values: np.ndarray) -> np.ndarray:
        """What lies in the image, not in its padding; what is of channels is as it is."""
        return values[:rows, :columns] if values.ndim > 1 else values

    strengths = [inside(values[row]) for values in (level.teacher, *level.student.values())]
    most = max(float(np.quantile(values, 0.99)) for values in strengths)

    def view(words: str, values: np.ndarray) -> Html:
        return _figure(f"{words}: {values.mean():.2g}", over(image, values, level.stride, most))

    views = [_figure("image", image), view("teacher", inside(level.teacher[row]))]
    views += [view(f"student, {point}", inside(values[row])) for point, values in level.student.items()]
    views += [view(f"difference, {point}", inside(values[row])) for point, values in level.difference.items()]
    views += [
        part for what, shown in level.shown.items() for part in _shown(image, what, inside(shown[row]), level.stride)
    ]
    return joined(
        element("h3", f"{name}, stride {level.stride}"),
        element("div", *views, class_="views maps"),
    )


def _shown(image: np.ndarray, what: str, values: np.ndarray, stride: int) -> Iterator[Html]:
    """What a method shows: (h, w, K) of positions, or (C,) of channels."""
    words = what.replace("_", " ")
    if values.ndim == 1:
        yield _figure(f"{words}, {len(values)} side by side", strip(values))
    elif values.dtype == bool:
        yield _figure(f"{words}: {values.mean():.0%}", masked(image, values[..., 0], stride))
    else:
        for number in range(min(values.shape[2], _MOST_TOKENS)):
            one = values[..., number]
            label = f"{words} {number}" if values.shape[2] > 1 else words
            yield _figure(f"{label}: {one.mean():.2g}", over(image, one, stride, float(one.max())))


def _figure(words: str, pixels: np.ndarray) -> Html:
    height, width = pixels.shape[:2]
    scale = _LONGEST / max(height, width)
    picture = Image.fromarray(pixels).resize(
        (round(width * scale), max(round(height * scale), 1)), Image.Resampling.NEAREST
    )
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return element("figure", element("img", src=url, alt=words, loading="lazy"), element("figcaption", words))
