"""Whole runs at tiny size: two steps of everything, from a teacher that is trained once."""

import json
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from tests.test_config import load


def tiny(path: Path, data_dir: Path) -> ConfigDict:
    """The tiny variant of a config, on the embedded data in ``data_dir``."""
    config = load(path, "tiny")
    config.data.data_dir = str(data_dir)
    return config


def with_teacher(teacher: Path, workdir: Path) -> Path:
    """``workdir``, where the teacher of the workdir ``teacher`` is now trained."""
    shutil.copytree(teacher / "stages" / "teacher", workdir / "stages" / "teacher")
    return workdir


def rows(stage: Path) -> list[dict]:
    """What a stage wrote of its steps."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
