"""Prints the table of all keys of configs, with defaults, rules and meanings: ``python -m kdjax.keys``.

The same table is ``docs/keys.md``; ``python -m kdjax.keys > docs/keys.md`` writes it anew.
"""

import functools
from typing import Any

from kdjax.config.schema import LOSS_WEIGHT, Data, MethodSection, Optimizer, Run, Stage
from kdjax.methods import METHODS
from kdjax.models import MODELS, model_class
from kdjax.models.detector import Detector
from kdjax.models.network import Network
from kdjax.options import declared

_TWO_STAGE = (
    "The model. Two-stage detectors have P2 to P6 by default, pooled, and cascades train with 2000 proposals; the neck "
    "of RepPoints has group norm and makes P6 of C5, without a ReLU; the presets are smaller than all defaults here."
)


def sections() -> dict[str, dict[str, Any]]:
    """Where keys stand, in words, to the classes that declare them by the prefix of their keys."""
    found: dict[str, dict[str, Any]] = {
        "The run": {"": Run},
        "The data": {"data.": Data},
        "A stage": {"<stage>.": Stage},
        "Its optimiser; `<stage>.methods.<method>.optimizer` likewise": {"<stage>.optimizer.": Optimizer},
        "Every method of a stage": {"<stage>.methods.<method>.": MethodSection},
        "Every model": {"<stage>.model.": Network},
        "The parts of a detector, and the backbone of most models": {
            f"<stage>.model.{part}.": kind for part, kind in Detector.parts.items()
        },
    }
    parts: dict[tuple[str, Any], list[str]] = {}
    for name in MODELS:
        for part, kind in model_class(name).parts.items():
            if kind is not Detector.parts.get(part):
                parts.setdefault((part, kind), []).append(name)
    for (part, kind), names in parts.items():
        found[f"The {part} of {', '.join(f'`{name}`' for name in names)}"] = {f"<stage>.model.{part}.": kind}
    heads: dict[Any, list[str]] = {}
    for name, model in MODELS.items():
        head: Any = model.func if isinstance(model, functools.partial) else model
        heads.setdefault(head, []).append(name)
    for head, names in heads.items():
        found[f"The head of {', '.join(f'`{name}`' for name in names)}"] = {"<stage>.model.head.": head}
    for name, method in METHODS.items():
        if declared(method):
            found[f"The method `{name}`"] = {f"<stage>.methods.{name}.": method}
    return found


def table() -> str:
    """All keys as Markdown."""
    lines = ["# Keys of a config", "", "Made by `python -m kdjax.keys` from the fields that declare them.", ""]
    for title, classes in sections().items():
        lines += [f"## {title}", "", "| key | default | may be | meaning |", "|---|---|---|---|"]
        for prefix, cls in classes.items():
            for name, option in declared(cls).items():
                if cls is Network or name not in declared(Network):
                    lines.append(_row(prefix + name, repr(option.default), option.rule.words, option.meaning))
        if title == "Every model":
            names = ", ".join(MODELS)
            words = f"one of {names}, or package.module:Class"
            lines.append(_row("<stage>.model.name", "'retinanet'", words, _TWO_STAGE))
        if title == "Every method of a stage":
            words = f"one of {', '.join(METHODS)}, or package.module:Class"
            meaning = "The method, if its section has another name; its options stand below."
            lines.append(_row("<stage>.methods.<method>.name", "<method>", words, meaning))
        if title == "A stage":
            lines.append(_row("<stage>.loss_weights.<term>", "1.0", LOSS_WEIGHT.words, "Of each loss term, by name."))
        lines.append("")
    return "\n".join(lines)


def _row(key: str, default: str, words: str, meaning: str) -> str:
    plain = (cell.replace("|", "\\|").replace("<", "\\<") for cell in (words, meaning))
    return "| " + " | ".join((f"`{key}`", f"`{default}`", *plain)) + " |"


if __name__ == "__main__":
    print(table(), end="")
