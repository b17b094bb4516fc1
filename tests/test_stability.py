"""The public names that docs/stability.md lists are those of the code."""

import re

import pytest

import kdjax
import kdjax.config
import kdjax.losses
from kdjax import cli
from tests.pages import read

NAMES = {
    "`kdjax`": kdjax.__all__,
    "`kdjax.losses`": kdjax.losses.__all__,
    "`kdjax.config`": kdjax.config.__all__,
    "the command `kdjax`": cli.PROGRAMS,
}


@pytest.mark.parametrize("head", NAMES)
def test_the_page_lists_every_public_name(head):
    table = read("docs/stability.md").partition(f"| {head} |\n|---|\n")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", table) == list(NAMES[head])


def test_public_names_are_there():
    assert all(hasattr(module, name) for module in (kdjax, kdjax.losses, kdjax.config) for name in module.__all__)
