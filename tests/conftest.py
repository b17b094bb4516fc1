"""Tests see eight CPU devices and a JAX that refuses silent broadcasting; pyproject.toml turns warnings into errors."""

import os
from pathlib import Path

from jaxlib.version import __version__

# Optimising what runs for milliseconds is most of what an XLA test suite would do, and emitting fusions a third of the
# rest; that flag is for the versions that are known to have it, for an unknown one would end JAX.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * __version__.startswith(("0.8.", "0.10."))
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Shared by the test processes, by the programs that tests start, and by the next run of the suite.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path.home() / ".cache" / "kdjax" / "tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["goldens/make_pipelines.py"]
"""It needs torchvision, which no test does."""


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of each parametrized test its first case alone")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Other releases of the libraries are met by every test, not by every case: that would take twice as long."""
    if config.getoption("first_cases"):
        first = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = first.values()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where this process's tests prepare the embedded data set."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data_dir):
    """A workdir whose teacher is trained: the stage that all tiny configs share."""
    from kdjax.config import base_config, tiny
    from kdjax.run import pipeline

    config = tiny(base_config())
    config.data.data_dir = str(data_dir)
    config.stages = ("teacher",)
    workdir = tmp_path_factory.mktemp("teacher")
    pipeline.run(config, workdir)
    return workdir


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_functions():
    """Files share none: kept for the whole session they would fill gigabytes, and slow down every later trace."""
    yield
    jax.clear_caches()
