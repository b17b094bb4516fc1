"""Which images of an evaluation a person should see: a student's best and worst, and where it and its twin differ."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.types import Judged, Source, Task
from kdjax.visualize import Mark, jpeg

_EACH = 4
"""Images of a group."""
_LONGEST = 256
"""Side of a picture, in pixels."""
MOST_BYTES = 2_000_000
"""Of all pictures together, as they are written; then come words alone."""


class ImageView(NamedTuple):
    """What one model said of an image, or the truth."""

    name: str
    words: str
    picture: str
    """Its URL, which holds all of it; "" where it would show no more than that of the truth."""


class Shown(NamedTuple):
    """One image."""

    name: str
    views: list[ImageView]


class Showcase(NamedTuple):
    """Images in groups."""

    groups: dict[str, list[Shown]]
    """By title."""
    images: int
    """From how many they are chosen."""
    legend: Sequence[Mark]


def showcase(task: Task, source: Source, said: Mapping[str, Sequence[Any]], student: str, twin: str) -> Showcase:
    """Chooses and draws images, of which no more than one is in memory.

    Args:
        task: judges single images.
        source: what the models were evaluated on.
        said: of each model, by name, what a judge kept of the first images.
        student: the name of the model that this is about.
        twin: of the one that it is compared with; "" where there is none.
    """
    count = min(len(source), *(len(kept) for kept in said.values()))
    compared = [student, *filter(None, [twin])]
    scores: dict[int, list[float]] = {}
    for position in range(count):
        example = source[position]
        # Another image stands in for one that cannot be decoded, and the models saw nothing.
        if example.image_id == source.image_id(position):
            scores[position] = [task.judged(example, said[x][position], source.class_names).score for x in compared]
    painter = _Painter(task, source, said)
    groups = {title: [painter.shown(at) for at in places] for title, places in chosen(scores).items()}
    return Showcase(groups, len(scores), painter.legend)


def chosen(scores: Mapping[int, Sequence[float]]) -> dict[str, list[int]]:
    """By title the positions of images, by the scores of a student and, if there is one, of its twin.

    >>> for title, places in chosen({0: [9.0, 1.0], 1: [5.0, 5.0], 2: [0.0, 8.0]}).items():
    ...     print(title, places)
    The student's best [0, 1, 2]
    Its worst [2, 1, 0]
    Where it is better than its twin [0]
    Where its twin is better [2]
    """
    best = sorted(scores, key=lambda at: (-scores[at][0], at))
    found = {"The student's best": best[:_EACH], "Its worst": best[::-1][:_EACH]}
    differences = {at: both[0] - both[1] for at, both in scores.items() if len(both) > 1}
    ahead = sorted(differences, key=lambda at: (-differences[at], at))
    found["Where it is better than its twin"] = [at for at in ahead if differences[at] > 0][:_EACH]
    found["Where its twin is better"] = [at for at in ahead[::-1] if differences[at] < 0][:_EACH]
    return {title: places for title, places in found.items() if places}


class _Painter:
    """Draws images as long as there is room for pictures."""

    def __init__(self, task: Task, source: Source, said: Mapping[str, Sequence[Any]]):
        self._task, self._source, self._said, self._left = task, source, said, MOST_BYTES
        self.legend: Sequence[Mark] = ()

    def shown(self, position: int) -> Shown:
        example = self._source[position]
        truth = self._task.judged(example, None, self._source.class_names)
        self.legend = truth.drawing.legend
        views = [ImageView("truth", truth.words if truth.words != "truth" else "", self._url(truth))]
        for name, kept in self._said.items():
            judged = self._task.judged(example, kept[position], self._source.class_names)
            picture = "" if _adds_nothing(judged, truth) else self._url(judged)
            views.append(ImageView(name, judged.words, picture))
        return Shown(self._source.name(position), views)

    def _url(self, judged: Judged) -> str:
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg(judged.drawing, _LONGEST)).decode()
        if len(url) > self._left:
            return ""
        self._left -= len(url)
        return url


def _adds_nothing(judged: Judged, truth: Judged) -> bool:
    """Whether a picture is that of the truth, as where a class is all that is said."""
    ours, theirs = judged.drawing, truth.drawing
    return not ours.marks and not theirs.marks and np.array_equal(ours.image, theirs.image)
