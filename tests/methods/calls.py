"""How tests call a method: with views of pyramids whose levels say their strides, and with what it needs."""

from typing import Any

import jax

from kdjax.distill import sums
from kdjax.types import Features, Method, Terms, View


def view(features: Features | None) -> View | None:
    """A model's features, level ``p<i>`` with stride 2^i; None for {} or None."""
    return View(features, {level: 2 ** int(level[1:]) for level in features}) if features else None


def needed(method: Method, **given: Any) -> dict[str, Any]:
    """Of what is given the keywords that the method needs."""
    return {need: given[need] for need in method.needs}


def terms(method: Method, params: Any, student: Features, teacher: Features, **given: Any) -> Terms:
    """A method's terms, each as one scalar."""
    return sums(method.apply({"params": params}, view(student), view(teacher), **needed(method, **given)))


def init(method: Method, student: Features, teacher: Features, **given: Any) -> Any:
    """A method's parameters."""
    own = needed(method, **given)
    return method.init(jax.random.key(0), view(student), view(teacher), **own).get("params", {})
