"""Which term, or which level of one, has taken a student's loss over, in sentences, and what weights it otherwise.

A run's report has only what was recorded of its losses; ``kdjax show`` takes gradients, by which it is known at which
levels objects are found.

What is suggested is what was right on the embedded data and on small photographs: methods' terms of about three times
the student's own loss, and no coarse levels that weigh more than the finer ones beneath them, in which on such images
next to nothing is detected. On COCO's the papers' weights and levels stand.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

from kdjax.methods import build_method, term_names
from kdjax.plan import MethodPlan

Row = Mapping[str, float | None]
"""Of ``metrics.jsonl``: "loss/<term>" weighted, "raw/<term>" not, "raw/<term>/<level>" its parts."""

HEAVY = 0.9
"""Share of the loss from which on a method's term has taken it over."""
SHARE = 3.0
"""Times the student's own loss: where the terms of methods were best."""
_USUAL = 0.3, 10.0
"""And between which they were not much worse."""
_MOST_LEVEL = 0.5
"""Share of a term from which on coarse levels have taken it over."""
_IDLE = 0.005
"""Share of a level in the gradient of the student's own loss, of the sum of norms, up to which it learns nothing."""


class Balance(NamedTuple):
    """What is said of a stage's loss."""

    sentences: list[str]
    flags: list[str]
    """Of the command line, that change it."""


def heavy(stage: str, terms: Mapping[str, float], loss: float) -> list[str]:
    """A sentence on each of a stage's terms of methods that is nearly all of its first loss.

    >>> heavy("student", {"mgd": 99.0}, 100.0)[0].partition(":")[0]
    'mgd is 99% of the loss'
    """
    return [
        f"{term} is {x / loss:.0%} of the loss: a sum over positions, as some methods' terms are, starts large and "
        f"falls, and may stay the largest; config.{stage}.loss_weights.{term} weighs it where the others do not fall."
        for term, x in terms.items()
        if x > HEAVY * loss > 0
    ]


def teaching_terms(methods: Mapping[str, MethodPlan], own: Sequence[str]) -> dict[str, str]:
    """The terms that a student is taught by, to the key of their method.

    Auxiliary tasks, which teach the method alone, weigh nothing in the student.

    Args:
        methods: of a stage, by key.
        own: names of the student's own terms.
    """
    modules = {key: build_method(method.config) for key, method in methods.items()}
    return {
        term: key
        for key, module in modules.items()
        for term in term_names(module, own)
        if "student" in module.terms.get(term, ())
    }


def balance(
    stage: str, rows: Sequence[Row], own: Sequence[str], methods: Mapping[str, str], *, share: float = 0.0
) -> Balance:
    r"""What has taken the loss of a stage over, and flags that weigh it otherwise.

    >>> first = {"loss/cls": 1.0, "loss/mimic": 30.0, "raw/mimic": 30.0, "raw/mimic/p3": 2.0, "raw/mimic/p4": 1.0}
    >>> found = balance("student", [first | {"raw/mimic/p5": 27.0}], ["cls"], {"mimic": "mimic"})
    >>> found.flags
    ['--config.student.method_share=3', '--config.student.methods.mimic.levels="(\'p3\', \'p4\')"']
    >>> found.sentences[0]
    'At first the methods add 30 times the loss of its own; about 3 times was best on small images.'

    Args:
        stage: its name.
        rows: what was recorded of it, in order.
        own: names of the student's own terms.
        methods: of :func:`teaching_terms`; other terms are left out.
        share: ``method_share`` of the stage.
    """
    rows = [row for row in rows if any(key.startswith("loss/") and _is_number(x) for key, x in row.items())]
    if not rows:
        return Balance([], [])
    weighted = {term: _mean(rows, key) for term in (*own, *methods) if (key := f"loss/{term}") in rows[0]}
    theirs = [term for term in weighted if term in methods]
    if not theirs:
        return Balance([], [])
    sentences, flags = [], []
    first = {term: x for term in weighted if _is_number(x := rows[0][f"loss/{term}"])}
    ours = sum(first.get(term, 0.0) for term in own)
    added = sum(first.get(term, 0.0) for term in theirs)
    low, high = _USUAL
    if not share and ours > 0 and added > 0 and not low <= added / ours <= high:
        sentences.append(
            f"At first the methods add {added / ours:.2g} times the loss of its own; about {SHARE:g} times was best on "
            "small images."
        )
        flags.append(f"--config.{stage}.method_share={SHARE:g}")
    total = sum(x for x in weighted.values() if math.isfinite(x))
    for term in theirs:
        if weighted[term] > HEAVY * total > 0:
            sentences.append(f"{term} is {weighted[term] / total:.0%} of the loss in the mean over the run.")
    for term in theirs:
        # At first: constants are learnt, and then it is too late to leave them out.
        parts = {key: x for key in sorted(rows[0]) if key.startswith(f"raw/{term}/") and _is_number(x := rows[0][key])}
        levels = {key.removeprefix(f"raw/{term}/"): x for key, x in parts.items()}
        if coarse := _taken_over(list(levels.values())):
            kept, gone = list(levels)[:-coarse], list(levels)[-coarse:]
            part = sum(levels[x] for x in gone) / sum(levels.values())
            verb = "is" if coarse == 1 else "are"
            sentences.append(
                f"{', '.join(gone)} {verb} {part:.0%} of {term} at first, more than the finer levels: where next to "
                "nothing is detected there, as in small images, what they hold is a large constant."
            )
            flags.append(_levels_flag(stage, methods[term], kept))
    return Balance(sentences, flags)


def idle_levels(
    stage: str,
    own: Sequence[Mapping[str, float]],
    terms: Mapping[str, Mapping[str, float]],
    methods: Mapping[str, str],
) -> Balance:
    r"""Which terms of methods pull mostly at levels where the student's own loss pulls at nothing.

    There no object of the data is found: whatever the teacher has there is a constant, which helps nobody. A map that
    no head reads, as a backbone's beneath the head of a classifier, has no gradient at all, and is never named.

    >>> own = [{"p3": 0.9, "p4": 0.4, "p5": 0.001}]
    >>> found = idle_levels("student", own, {"mimic": {"p3": 1.0, "p4": 1.0, "p5": 4.0}}, {"mimic": "mimic"})
    >>> found.flags
    ['--config.student.methods.mimic.levels="(\'p3\', \'p4\')"']
    >>> found.sentences[0].partition(":")[0]
    '67% of the gradient of mimic is at p5, where the loss of its own has next to none'

    Args:
        stage: its name.
        own: norms of the gradient of the student's own loss by level, at some points of the training.
        terms: of each term of :func:`teaching_terms` the same at the first point.
        methods: see :func:`balance`.
    """
    idle = [level for level in own[0] if all(0 < at[level] <= _IDLE * sum(at.values()) for at in own)]
    sentences, flags = [], []
    for term, by_level in terms.items():
        kept = [level for level, x in by_level.items() if x > 0 and level not in idle]
        gone = [level for level, x in by_level.items() if x > 0 and level in idle]
        share = sum(by_level[x] for x in gone) / (sum(by_level.values()) or 1.0)
        if kept and share > _MOST_LEVEL:
            sentences.append(
                f"{share:.0%} of the gradient of {term} is at {', '.join(gone)}, where the loss of its own has next to "
                "none: no object of these images is found there, and what a teacher has there is a large constant."
            )
            flags.append(_levels_flag(stage, methods[term], kept))
    return Balance(sentences, flags)


def _levels_flag(stage: str, method: str, levels: Sequence[str]) -> str:
    said = "(" + ", ".join(map(repr, levels)) + ("," if len(levels) == 1 else "") + ")"
    return f'--config.{stage}.methods.{method}.levels="{said}"'


def _taken_over(parts: Sequence[float]) -> int:
    """How many of the coarsest levels have taken a term over: 0 where the parts fall from fine to coarse, as sums do.

    >>> _taken_over([31, 14, 4, 38, 384]), _taken_over([775, 87, 5, 0.8]), _taken_over([3, 4, 2])
    (2, 0, 0)
    """
    rises = [at for at in range(1, len(parts)) if parts[at] > parts[at - 1]]
    if not rises or not sum(parts[rises[0] :]) > _MOST_LEVEL * sum(parts):
        return 0
    coarse = len(parts) - rises[0]
    # One level that outweighs the only finer one is no sign of anything.
    return coarse if rises[0] > 1 or max(parts[rises[0] :]) > 4 * parts[0] else 0


def _is_number(value: float | None) -> TypeGuard[float]:
    return isinstance(value, float | int) and math.isfinite(value)


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [value for row in rows if (value := row.get(key)) is not None and math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan
