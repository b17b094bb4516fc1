"""The distillation methods: one paper, one file, each a Flax module that returns named, unweighted loss terms.

The contract: ``method(student, teacher, targets, *, keys, step, task=None) -> {term: float32 scalar}``

- ``student``, ``teacher``: feature pyramids by level name; the teacher's is {} where the method needs no teacher.
- ``keys`` (N,): one PRNG key per image; ``step``: int32 scalar, the finished steps.
- ``task``: from other features to the terms of the student's own loss on them (:data:`kdjax.types.Task`), for methods
  that ask the detector's head for its opinion.

The mean of a term over equal-sized devices is its value on the whole batch. ``method.terms`` says which parameters,
"student" or "method", each term may move; a name that ends in "*" stands for one term for each of the task's.
``method.needs`` names what it cannot do without: fields of a stage that must not be empty ("teacher", "method_init"),
and "statistics", what the boxes of the training set look like.

A student whose maps have 4 channels and a teacher of 16, on one image without objects:

>>> from kdjax.types import Targets
>>> student, teacher = {"p3": jnp.ones((1, 8, 8, 4))}, {"p3": jnp.ones((1, 8, 8, 16))}
>>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[64, 64]]))
>>> given = {"keys": jax.random.split(jax.random.key(1), 1), "step": jnp.array(0)}
>>> method = build_method({"name": "mgd", "mask_ratio": 0.45})
>>> terms, variables = jax.eval_shape(method.init_with_output, jax.random.key(0), student, teacher, targets, **given)
>>> jax.tree.map(jnp.shape, terms), sorted(variables["params"])
({'mgd': ()}, ['align_p3', 'generation_p3'])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import ClassStatistics
from kdjax.methods.dfmsd import DFMSD
from kdjax.methods.dmkd import DMKD
from kdjax.methods.icd import ICD
from kdjax.methods.maskd import MasKD, MasKDTokens
from kdjax.methods.mgd import MGD
from kdjax.methods.mimic import Mimic
from kdjax.methods.none import NoDistillation
from kdjax.options import chosen, declared, defaults

METHODS: dict[str, type[nn.Module]] = {
    "none": NoDistillation,
    "mimic": Mimic,
    "mgd": MGD,
    "dmkd": DMKD,
    "dfmsd": DFMSD,
    "maskd": MasKD,
    "maskd_tokens": MasKDTokens,
    "icd": ICD,
}
"""Every method by its name in a config."""


def method_options(name: str) -> dict[str, Any]:
    """The options of a method in a config, with their defaults.

    >>> method_options("mgd")
    {'mask_ratio': 0.65, 'mask': 'spatial'}
    """
    return defaults(method_class(name))


def method_class(name: str) -> type[nn.Module]:
    """The method of a name in a config: a key of ``METHODS``, or ``package.module:Class`` of somebody else's.

    Raises:
        UserError: there is none, or it does not say what it needs and which terms it has.
    """
    method = chosen(name, METHODS, "method")
    if not isinstance(method, type) or not issubclass(method, nn.Module):
        raise UserError(f"{name!r} is no method: it must be a class of Flax modules, see kdjax.methods.")
    if missing := [member for member in ("terms", "needs") if not hasattr(method, member)]:
        raise UserError(f"{name!r} is no method: it has no {missing[0]!r}, see kdjax.methods.")
    return method


def term_names(method: nn.Module, task_terms: Sequence[str]) -> tuple[str, ...]:
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
    statistics: ClassStatistics | None = None,
    axis_name: str | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> nn.Module:
    """The module that ``config`` names, ``{"name": "mgd", "mask_ratio": 0.65}``.

    >>> build_method({"name": "mgd", "mask_ratio": 0.45}).mask_ratio
    0.45
    >>> build_method({"name": "mgd", "ratio": 0.45})
    Traceback (most recent call last):
    kdjax.errors.UserError: Method 'mgd' has no option 'ratio'; its options are: mask, mask_ratio.

    Args:
        config: the name and options.
        statistics: for methods that need them, of the training set.
        axis_name: mapped axis over which counts and statistics are averaged; None outside of one.
        dtype: of the computation; parameters and losses are float32.

    Raises:
        UserError: for an unknown name or option, listing the choices.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    name = config["name"]
    method_type = method_class(name)
    known = declared(method_type)
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"Method {name!r} has no option {unknown[0]!r}; its options are: {', '.join(sorted(known)) or 'none'}."
        )
    for option, value in options.items():
        if not known[option].rule.holds(value):
            raise UserError(f"Method {name!r} has {option} {value!r}; it must be {known[option].rule.words}.")
    method = method_type(**options, axis_name=axis_name, dtype=dtype)
    if statistics is not None and "statistics" in method.needs:
        # Nested tuples, because modules must be hashable.
        method = method.clone(statistics=ClassStatistics(*map(_nested_tuple, statistics)))
    return method


def _nested_tuple(array: jax.Array) -> Any:
    return tuple(map(tuple, array.tolist())) if array.ndim > 1 else tuple(array.tolist())
