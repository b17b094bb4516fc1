"""Which cases of a test only CI and ``pytest -m ""`` run."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[str], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters of a test, marked slow but for those that ``quick`` names; files go by their stems."""
    return [
        case if getattr(case, "stem", case) in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases
    ]
