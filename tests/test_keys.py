"""The table of keys is complete, and the one in docs/ is today's."""

from pathlib import Path

from kdjax import keys
from kdjax.config import base_config, leaves, load_config
from kdjax.methods import RESERVED

ROOT = Path(__file__).parents[1]


def test_the_table_in_the_documentation_is_todays():
    assert (ROOT / "docs" / "keys.md").read_text() == keys.table(), "python -m kdjax.keys > docs/keys.md"


def test_every_key_of_a_config_is_in_the_table():
    table = keys.table()
    configs = [base_config(), *(load_config(name) for name in ("icd", "dfmsd"))]
    for config in configs:
        for path, _ in leaves(config):
            stage, dot, key = path.partition(".")
            if dot and stage != "data":
                option = key.removeprefix("methods.").partition(".")[2]
                if key.startswith("methods.") and option.partition(".")[0] in RESERVED:
                    key = option if option.startswith("optimizer.") else f"methods.<method>.{option}"
                path = f"<stage>.{key}"
            if ".loss_weights." not in path:
                assert f"| `{path}` |" in table, path
