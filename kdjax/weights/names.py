"""What the tensors of a file are called before a table is asked: prefixes of wrappers, and the names of Caffe2.

Programs that train put the model into something, whose name then stands before the name of every tensor, and other
things beside it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdjax.weights.sources import CLASSIFIER, SKIPPED, SOURCES, Rule, Source

State = Mapping[str, np.ndarray]

_WRAPPERS = {
    "module": "data-parallel training and averaged models",
    "_orig_mod": "torch.compile",
    "model": "Lightning",
    "student": "MGD and others that train a pair",
    "architecture": "MMRazor",
}
"""What may stand before all names of a model, and who puts it there."""

_MOST_WRAPPERS = 3
"""Inside of one another."""

_RUN = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.){{0,{_MOST_WRAPPERS}}}")

_CAFFE2_LEAVES = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_CAFFE2 = re.compile(rf"(conv1|res_conv1_bn|res\d_\d+_branch\d[abc]?(?:_bn)?)_({'|'.join(_CAFFE2_LEAVES)})")
_CAFFE2_UNUSED = "conv1_b"

_EPSILON = np.float32(1e-5)


class Named(NamedTuple):
    """Tensors by names as the tables have them."""

    state: State
    changes: tuple[str, ...]
    """What was done to the names, in words."""
    left_out: tuple[str, ...] = ()
    """Names without the prefix that was taken off the others."""


def plain_names(state: State, table: Source, detector: str) -> Named:
    """A state dict without what wrappers put before its names, and with dots where Caffe2 has underscores.

    Args:
        state: name to array.
        table: the source of the file.
        detector: a key of ``kdjax.models.MODELS``.
    """
    changes: list[str] = []
    others: list[str] = []
    prefix = _prefix(state, rules_for(table, detector))
    if prefix:
        others = sorted(name for name in state if not name.startswith(prefix))
        state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
        changes.append(f"{prefix} was taken off {len(state)} names")
    if any(_CAFFE2.fullmatch(name) for name in state):
        state, identities = _from_caffe2(state)
        if identities:
            changes.append(
                f"{identities} batch norms, whose scales contain their statistics, took those of the identity"
            )
    return Named(state, tuple(changes), tuple(others))


def rules_for(table: Source, detector: str) -> tuple[Rule, ...]:
    """All rules of a table for one detector."""
    return table.backbone + table.neck + table.heads.get(detector, ())


def backbone_alone(state: State, rules: tuple[Rule, ...]) -> bool:
    """Whether a state dict with plain names has nothing that any source puts beside a backbone.

    The last layer of a classifier counts where the model has one too.

    Args:
        state: name to array.
        rules: of the model.
    """
    others = {rule.pattern for table in SOURCES.values() for rule in _beside_backbone(table)}
    names = [name for name in state if not why_skipped(name, rules)]
    return not any(re.fullmatch(pattern, _layer(name)) for name in names for pattern in others)


def why_skipped(name: str, rules: tuple[Rule, ...]) -> str | None:
    """Why a model of these rules does not need a tensor; None for one that has a place in some model."""
    if re.fullmatch(CLASSIFIER, name) and rule_for(name, rules):
        return None
    return next((why for pattern, why in SKIPPED.items() if re.fullmatch(pattern, name)), None)


def rule_for(name: str, rules: tuple[Rule, ...]) -> Rule | None:
    """The first rule whose pattern a tensor's layer has."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, _layer(name))), None)


def layer_paths(
    name: str, rules: tuple[Rule, ...], index: Mapping[str, Callable[[str], Any]]
) -> Iterator[tuple[str, Rule]]:
    """Where a tensor's layer may go, and the rule that says so.

    Args:
        name: of the tensor.
        rules: of a table.
        index: how their groups count, see :func:`indices`.
    """
    for rule in rules:
        if match := re.fullmatch(rule.pattern, _layer(name)):
            groups = {key: index[key](x) if key in index else x for key, x in match.groupdict().items()}
            yield rule.path.format(**groups), rule


def indices(wanted: Mapping[str, Any]) -> dict[str, Callable[[str], Any]]:
    """How the groups of a :class:`Rule` count, in a detector with these paths."""
    levels = [int(match[1]) for path in wanted if (match := re.fullmatch(r"params/neck/output_p(\d+)/kernel", path))]
    finest = min(levels, default=3)

    def fpn(index: str) -> str:
        level = finest + int(index)
        return f"output_p{level}" if level <= 5 else f"extra_p{level}"

    return {
        "level": lambda index: finest + int(index),
        "fpn": fpn,
        "half": lambda index: int(index) // 2,
        "third": lambda index: int(index) // 3,
        "more": lambda index: int(index) - 1,
        "letter": lambda letter: "abc".index(letter) + 1,
    }


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _beside_backbone(table: Source) -> tuple[Rule, ...]:
    return sum(table.heads.values(), table.neck)


def _prefix(state: State, rules: tuple[Rule, ...]) -> str:
    """The wrappers without which most names have a rule; the fewest of them where several do as well."""
    counts: Counter[str] = Counter()
    for name in state:
        wrappers = _RUN.match(name)[0].split(".")[:-1]  # type: ignore[index]
        for length in range(len(wrappers) + 1):
            prefix = "".join(f"{wrapper}." for wrapper in wrappers[:length])
            counts[prefix] += rule_for(name.removeprefix(prefix), rules) is not None
    return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)), default="")


def _from_caffe2(state: State) -> tuple[State, int]:
    """Names with dots, and the identity as the statistics of batch norms that have none; how many these are.

    Detectron2 leaves theirs at what a fresh layer has: a mean of 0, and a variance that is 1 with its epsilon.
    """
    renamed = {}
    for name, array in state.items():
        match = _CAFFE2.fullmatch(name)
        plain = match and name != _CAFFE2_UNUSED
        renamed[f"{match[1]}.{_CAFFE2_LEAVES[match[2]]}" if match and plain else name] = array
    norms = [name.removesuffix(".weight") for name in renamed if name.endswith("_bn.weight")]
    bare = [name for name in norms if f"{name}.running_var" not in renamed]
    for name in bare:
        like = np.ones_like(renamed[f"{name}.weight"], np.float32)
        renamed |= {f"{name}.running_mean": 0 * like, f"{name}.running_var": like - _EPSILON}
    return renamed, len(bare)
