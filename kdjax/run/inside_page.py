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
from kdjax.run.balance import Balance, balance, idle_levels, teaching_terms
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
    replace_text(path, inside_page(plan, stage, f"{stage}, {workdir}", found))
    return path


def inside_page(plan: Plan, stage: str, below: str, found: Inside) -> Html:
    """The whole document."""
    sections = {"What pulls": _pulls(plan, stage, found)}
    for row in range(len(found.batch.images)):
        levels = (_level(found, row, name, level) for name, level in found.levels.items())
        sections[f"Image {row}"] = joined(element("p", _REMARK, class_="remark"), *levels)
    return document(f"Inside {methods_of(plan)} on {plan.data.name}", below, sections)


def _pulls(plan: Plan, stage: str, found: Inside) -> Html:
    """Each term at each level, how much of it the student's features feel, and what weighs it otherwise."""
    remark = (
        f"On {found.weighed} images of the training: each term without and with its weight, and the norm of the "
        "weighted term's gradient by the student's features. Heads are as in a training step, methods as they were "
        "then: one that warms up does not pull yet."
    )
    said = suggested(plan, stage, found)
    taught = {part: x for part, x in found.pulls.items() if "/" not in part and part not in found.own}
    told = [element("p", sentence) for sentence in [*strongest(taught), *said.sentences]]
    if said.flags:
        told += [element("p", "In another workdir, to weigh it otherwise:"), element("pre", " ".join(said.flags))]
    points = list(next(iter(found.pulls.values())))
    head = ["", *(f"{point}, {what}" for point in points for what in ("raw", "weighted", "gradient"))]
    rows = [
        [
            part.replace("/", ", "),
            *(f"{value:.3g}" for x in by_point.values() for value in (x.value, x.weighted, x.norm)),
        ]
        for part, by_point in found.pulls.items()
    ]
    felt = {term: {point: x.gradient for point, x in by_point.items()} for term, by_point in taught.items()}
    felt = {"own loss": own_gradients(found)} | felt
    columns = {f"{who}, {point}": by_level for who, at in felt.items() for point, by_level in at.items()}
    levels = next(iter(columns.values()))
    shares = [[level, *(_share(by_level, level) for by_level in columns.values())] for level in levels]
    return joined(
        element("p", remark, class_="remark"),
        *told,
        table(head, rows),
        element("h3", "At which level"),
        element("p", "Norm of the gradient at a level, as a share of the sum over levels.", class_="remark"),
        table(["", *columns], shares),
    )


def _share(by_level: Mapping[str, float], level: str) -> str:
    whole = sum(by_level.values())
    return f"{by_level[level] / whole:.0%}" if whole else "-"


def own_gradients(found: Inside) -> dict[str, dict[str, float]]:
    """By point and level the norm of the gradients of all terms of the student's own loss."""
    own = [found.pulls[term] for term in found.own]
    return {
        point: {level: float(np.sqrt(sum(x[point].gradient[level] ** 2 for x in own))) for level in one.gradient}
        for point, one in own[0].items()
    }


def suggested(plan: Plan, stage: str, found: Inside) -> Balance:
    """What has taken the loss over at the first point, and what weighs it otherwise."""
    planned = plan[stage]
    of_methods = teaching_terms(planned.methods, found.own)
    terms = {part: next(iter(by_point.values())) for part, by_point in found.pulls.items() if "/" not in part}
    row = {f"loss/{term}": x.weighted for term, x in terms.items()}
    weights = balance(stage, [row], found.own, of_methods, share=planned.options.method_share)
    levels = idle_levels(
        stage,
        list(own_gradients(found).values()),
        {term: x.gradient for term, x in terms.items() if term in of_methods},
        of_methods,
    )
    return Balance(weights.sentences + levels.sentences, weights.flags + levels.flags)


def strongest(pulls: Mapping[str, Mapping[str, Pull]]) -> list[str]:
    """A sentence on each term of whose gradient one level has most, at the first point.

    >>> pull = Pull(1.0, 1.0, {"p3": 1.0, "p4": 9.0})
    >>> strongest({"a": {"before": pull}})
    ['p4 has 90% of what a pulls with at the first point, by the norm of its gradient.']
    """
    sentences = []
    for term, by_point in pulls.items():
        norms = next(iter(by_point.values())).gradient
        level, whole = max(norms, key=norms.__getitem__), sum(norms.values())
        if sum(x > 0 for x in norms.values()) > 1 and norms[level] > 0.5 * whole:
            sentences.append(
                f"{level} has {norms[level] / whole:.0%} of what {term} pulls with at the first point, by the norm of "
                "its gradient."
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
        part
        for what, by_point in level.shown.items()
        for point, shown in _different(by_point).items()
        for part in _shown(image, f"{what}{point}", inside(shown[row]), level.stride)
    ]
    return joined(
        element("h3", f"{name}, stride {level.stride}"),
        element("div", *views, class_="views maps"),
    )


def _different(by_point: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is shown of a training's first and last point, by words; once where it is the same."""
    points = list(by_point)
    if np.array_equal(by_point[points[0]], by_point[points[-1]]):
        return {"": by_point[points[-1]]}
    return {f", {point}": by_point[point] for point in (points[0], points[-1])}


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
            if not one.any():
                continue  # Of an instance that the image does not have.
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
