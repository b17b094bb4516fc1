"""Arrays into variables, strictly: every load says what it took and fails on what does not fit."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.errors import UserError

Tree = dict[str, Any]


class LoadReport(NamedTuple):
    """What became of every array of a load, by path (``"params/backbone/conv1/kernel"``)."""

    matched: tuple[str, ...]
    """Taken: in both, of one shape."""
    missing: tuple[str, ...]
    """Wanted, but not in the source: left as it was."""
    unexpected: tuple[str, ...]
    """In the source, but not wanted."""
    mismatched: tuple[str, ...]
    """In both, with different shapes (both are named): left as it was."""

    @property
    def clean(self) -> bool:
        """Whether every array of both sides was matched."""
        return bool(self.matched) and not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        if self.clean:
            return f"all {len(self.matched)} arrays taken"
        line = ", ".join(f"{len(paths)} {name}" for name, paths in self._asdict().items())
        for name in ("missing", "unexpected", "mismatched"):
            paths = getattr(self, name)
            if paths:
                line += f"; {name}: {_first(paths)}"
        return line

    def as_inherited(self) -> str:
        """The same of parts that are taken over where shapes match: what does not is no flaw.

        >>> print(LoadReport(("neck/out", "neck/p3"), (), (), ("neck/in (5,) for (3,)",)).as_inherited())
        2 of 3 arrays taken; 1 of 3 differs in width, as it should: neck/in (5,) for (3,)
        """
        wanted = len(self.matched) + len(self.missing) + len(self.mismatched)
        line = f"{len(self.matched)} of {wanted} arrays taken"
        if count := len(self.mismatched):
            words = "differs in width, as it should" if count == 1 else "differ in width, as they should"
            line += f"; {count} of {wanted} {words}: {_first(self.mismatched)}"
        if self.missing:
            line += f"; {len(self.missing)} of {wanted} only the student has: {_first(self.missing)}"
        if self.unexpected:
            line += f"; {len(self.unexpected)} more only the teacher has: {_first(self.unexpected)}"
        return line


def _first(paths: Sequence[str], count: int = 5) -> str:
    """The first of some paths, and how many more there are."""
    shown = ", ".join(paths[:count])
    return f"{shown} and {len(paths) - count} more" if len(paths) > count else shown


def load_into(target: Tree, source: Tree, *, origin: str, strict: bool = True) -> tuple[Tree, LoadReport]:
    """Fills ``target`` with the arrays of ``source`` that have the same path and shape, in the target's dtype.

    Args:
        target: nested dict of arrays, kept where nothing fits.
        source: nested dict of arrays.
        origin: what the source is, for messages.
        strict: refuse anything but a perfect match.

    Returns:
        the filled tree and the report.

    Raises:
        UserError: if ``strict`` and an array is missing, unexpected or of another shape; or if nothing matched at all.
    """
    wanted, given = flatten_dict(target, sep="/"), flatten_dict(source, sep="/")
    shared = wanted.keys() & given.keys()
    fits = {path for path in shared if np.shape(wanted[path]) == np.shape(given[path])}
    report = LoadReport(
        matched=tuple(sorted(fits)),
        missing=tuple(sorted(wanted.keys() - given.keys())),
        unexpected=tuple(sorted(given.keys() - wanted.keys())),
        mismatched=tuple(
            f"{path} {np.shape(given[path])} for {np.shape(wanted[path])}" for path in sorted(shared - fits)
        ),
    )
    if (strict and not report.clean) or not report.matched:
        raise UserError(f"The weights of {origin} do not fit the model: {report}")
    filled = {
        path: np.asarray(given[path]).astype(value.dtype) if path in fits else value for path, value in wanted.items()
    }
    return unflatten_dict(filled, sep="/"), report


def without(tree: Tree, paths: Collection[str]) -> Tree:
    """A nested dict of arrays without those at ``paths`` (``"params/head/cls_logits/kernel"``)."""
    return unflatten_dict({path: x for path, x in flatten_dict(tree, sep="/").items() if path not in paths}, sep="/")


def inherit(student: Tree, teacher: Tree, subtrees: Sequence[str]) -> tuple[Tree, LoadReport]:
    """Starts subtrees of the student's variables from the teacher's, where the shapes match.

    Args:
        student: variables {"params": ..., "batch_stats": ...}.
        teacher: variables of the teacher.
        subtrees: top-level names in a detector's parameters: "neck", "head".

    Returns:
        the student's variables, and what became of every array below ``subtrees``.

    Raises:
        UserError: if no array at all could be taken, or a subtree is in neither model.
    """
    inherited, reports = dict(student), []
    for collection in student:
        for name in subtrees:
            if name not in student[collection]:
                if collection == "params":
                    raise UserError(
                        f"inherit names {name!r}, but the student's parts are {', '.join(student[collection])}."
                    )
                continue
            part, report = load_into(
                {collection: {name: inherited[collection][name]}},
                {collection: {name: teacher.get(collection, {}).get(name, {})}},
                origin="the teacher",
                strict=False,
            )
            inherited[collection] = inherited[collection] | part[collection]
            reports.append(report)
    return inherited, LoadReport(*(sum(paths, ()) for paths in zip(*reports, strict=True)))
