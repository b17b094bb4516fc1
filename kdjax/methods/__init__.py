"""The distillation methods: one paper, one file, each a Flax module that returns named, unweighted loss terms.

The contract: ``method(student, teacher, **needed) -> {term: float32 scalar, or {level: float32 scalar}}``

- ``student``, ``teacher``: a :class:`kdjax.types.View` each: features by name, their strides, and the student's
  predictions; the teacher's is None where the stage has none.
- ``needed``: the keywords that ``method.needs`` names, all of them among ``NEEDED``, and no others.

A term that comes as {level: scalar} is their sum; the parts are logged, the term has the one weight. The mean of a term
over equal-sized devices is its value on the whole batch. ``method.terms`` says which parameters, "student" or "method",
each term may move; a name that ends in "*" stands for one term for each of the student's own. ``method.requires`` names
what a stage must have: "teacher", or "init" for parameters that an earlier stage learnt. A method that fits some tasks
only names them in ``method.tasks``; parameters that a term rightly gives no gradient, though it moves others, are
patterns by term in ``method.still``, of parts of their paths.

A student whose map has 4 channels and a teacher of 16, on one image:

>>> import jax
>>> from kdjax.types import View
>>> student, teacher = (View({"p3": jnp.ones((1, 8, 8, channels))}, {"p3": 8}) for channels in (4, 16))
>>> method = build_method({"name": "mgd", "mask_ratio": 0.45})
>>> method.needs
('size', 'keys')
>>> needed = {"size": jnp.array([[64, 64]]), "keys": jax.random.split(jax.random.key(1), 1)}
>>> terms, variables = jax.eval_shape(method.init_with_output, jax.random.key(0), student, teacher, **needed)
>>> jax.tree.map(jnp.shape, terms), sorted(variables["params"])
({'mgd': {'p3': ()}}, ['align_p3', 'generation_p3'])
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.methods.boxes import BoxImitation
from kdjax.methods.dfmsd import DFMSD
from kdjax.methods.dmkd import DMKD
from kdjax.methods.icd import ICD
from kdjax.methods.ld import LD
from kdjax.methods.logits import CWD, KD
from kdjax.methods.maskd import MasKD, MasKDTokens
from kdjax.methods.maskd_logits import MasKDLogits, MasKDLogitTokens
from kdjax.methods.mgd import MGD
from kdjax.methods.mimic import Mimic
from kdjax.options import chosen, declared, defaults
from kdjax.types import Method

METHODS: dict[str, type[Method]] = {
    "mimic": Mimic,
    "mgd": MGD,
    "dmkd": DMKD,
    "dfmsd": DFMSD,
    "maskd": MasKD,
    "maskd_tokens": MasKDTokens,
    "icd": ICD,
    "box_imitation": BoxImitation,
    "ld": LD,
    "kd": KD,
    "cwd": CWD,
    "maskd_logits": MasKDLogits,
    "maskd_logit_tokens": MasKDLogitTokens,
}
"""Every method by its name in a config."""

RESERVED = ("name", "levels", "init", "optimizer")
"""What a stage says of each of its methods, beside the method's own options."""

NEEDED = {
    "size": "(N, 2) int32: height and width of the images without their padding.",
    "targets": "The task's truth, for detection kdjax.types.Targets.",
    "keys": "(N,) PRNG keys, one for each image.",
    "step": "int32 scalar: the finished steps.",
    "own_loss": "kdjax.types.OwnLoss: from other features to the terms of the student's own loss on them.",
    "prediction_loss": "kdjax.types.PredictionLoss: from other predictions to the terms of the student's own loss.",
    "teacher_heads": "kdjax.types.TeacherHeads: from the student's predictions to what the teacher's heads say there.",
    "paired_sides": "kdjax.types.PairedSidesOf: from what the teacher's heads say to both's distributions of sides.",
    "statistics": "kdjax.losses.ClassStatistics: what the boxes of the training set look like.",
}
"""Every keyword that a method may need."""


def method_options(name: str) -> dict[str, Any]:
    """The options of a method in a config, with their defaults.

    >>> method_options("mgd")
    {'mask_ratio': 0.65, 'mask': 'spatial'}
    """
    return defaults(method_class(name))


def method_class(name: str) -> type[Method]:
    """The method of a name in a config: a key of ``METHODS``, or ``package.module:Class`` of somebody else's.

    Raises:
        UserError: there is none, or it does not keep the contract.
    """
    method: Any = chosen(name, METHODS, "method")
    if not _is_module(method):
        raise UserError(f"{name!r} is no method: it must be a class of Flax modules, see kdjax.methods.")
    if missing := [member for member in ("terms", "needs", "requires") if not hasattr(method, member)]:
        raise UserError(f"{name!r} is no method: it has no {missing[0]!r}, see kdjax.methods.")
    if options := [option for option in declared(method) if option in RESERVED]:
        raise UserError(f"{name!r} has an option {options[0]!r}, which is a key that every method of a stage has.")
    if unknown := [need for need in method.needs if need not in NEEDED]:
        raise UserError(f"{name!r} needs {unknown[0]!r}; methods may need {', '.join(NEEDED)}.")
    _, *taken = inspect.signature(method.__call__).parameters.values()
    keywords = [x.name for x in taken if x.kind is x.KEYWORD_ONLY]
    if len(taken) != 2 + len(keywords) or sorted(keywords) != sorted(method.needs):
        raise UserError(
            f"{name!r} must be called with (student, teacher, *, {', '.join(method.needs)}), as its `needs` says; it "
            f"takes ({', '.join(map(str, taken))})."
        )
    return method


def _is_module(method: Any) -> bool:
    return isinstance(method, type) and issubclass(method, nn.Module)


def term_names(method: Method, task_terms: Sequence[str]) -> tuple[str, ...]:
    """Names of a method's terms on a detector whose own terms are ``task_terms``.

    >>> term_names(MasKDTokens(), ("classification", "box"))
    ('masked_classification', 'masked_box', 'dice')
    """
    return tuple(
        name for term in method.terms for name in ([term[:-1] + x for x in task_terms] if term[-1] == "*" else [term])
    )


def build_method(
    config: Mapping[str, Any],
    *,
    axis_name: str | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Method:
    """The module that ``config`` names, ``{"name": "mgd", "mask_ratio": 0.65}``.

    >>> build_method({"name": "mgd", "mask_ratio": 0.45}).mask_ratio
    0.45
    >>> build_method({"name": "mgd", "ratio": 0.45})
    Traceback (most recent call last):
    kdjax.errors.UserError: Method 'mgd' has no option 'ratio'; its options are: mask, mask_ratio.

    Args:
        config: the name and options.
        axis_name: mapped axis over which counts and statistics are averaged; None outside of one.
        dtype: of the computation; parameters and losses are float32.

    Raises:
        UserError: for an unknown name or option, listing the choices.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    name = config["name"]
    method_type: Any = method_class(name)
    known = declared(method_type)
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"Method {name!r} has no option {unknown[0]!r}; its options are: {', '.join(sorted(known)) or 'none'}."
        )
    for option, value in options.items():
        if not known[option].rule.holds(value):
            raise UserError(f"Method {name!r} has {option} {value!r}; it must be {known[option].rule.words}.")
    return method_type(**options, axis_name=axis_name, dtype=dtype)
