"""The stages of a config in order, each skipped when it is done, and what they were worth together."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kdjax.checkpoint import replacing
from kdjax.config import BASELINE, check_config
from kdjax.data.indexed import IndexedSource
from kdjax.devices import device_count
from kdjax.errors import UserError
from kdjax.evaluate import ImageDetections
from kdjax.paths import local_path
from kdjax.report import Row, summary_table, write_json
from kdjax.train import Finished, check_claim, check_data, open_split, train_stage
from kdjax.visualize import save_predictions


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs every stage of ``config`` that is not finished in ``workdir``, and sums up.

    The workdir ends with a folder per stage, ``student/`` (the last stage's model alone, for
    :func:`kdjax.load_student`), ``data_report.json``, ``predictions.png`` and ``summary.json``.

    Args:
        config: of :func:`kdjax.config.base_config`'s schema.
        workdir: made if missing.

    Returns:
        what ``summary.json`` holds.

    Raises:
        UserError: the config, the workdir or something that the config names cannot be used.
        NumericError: a loss is not finite.
    """
    check_config(config, devices=device_count())
    workdir = _usable(local_path(workdir))
    stages = list(config.stages)
    if config.compare:
        config, baselines = add_baseline(config)
        stages += baselines
    folders = {name: workdir / "stages" / name for name in stages}
    splits = check_data(config)
    for name, folder in folders.items():
        check_claim(config, name, folder)
    write_json(workdir / "config.json", config.to_dict())
    _report_data(workdir, splits)
    results: dict[str, dict[str, Any]] = {}
    finished: dict[str, Finished] = {}
    for name, folder in folders.items():
        results[name] = train_stage(config, name, folder, finished)
        finished[name] = Finished(folder, results[name]["metrics"])
    summary = _summary(config, results)
    with replacing(workdir / "student") as partial:
        shutil.copytree(finished[config.stages[-1]].model, partial, dirs_exist_ok=True)
    write_json(workdir / "summary.json", summary)
    # Again, for images that could not be decoded.
    _report_data(workdir, splits)
    _draw(config, workdir, stages)
    print(_table(config, results))
    print(f"Everything is in {workdir}: the student alone in student/, pictures in predictions.png.")
    return summary


def add_baseline(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Adds what a gain is quoted against: the last stage with the same start, without the method.

    Where that stage starts from another one with a teacher, the baseline starts from that one's baseline.

    Returns:
        the config with the new sections, and their names in order, ``BASELINE`` last.
    """
    config = ConfigDict(config.to_dict())
    chain = [config.stages[-1]]
    while (origin := config[chain[0]].init) in config.stages and config[origin].teacher:
        chain.insert(0, origin)
    names = [f"{BASELINE}_{stage}" for stage in chain[:-1]] + [BASELINE]
    for position, (stage, name) in enumerate(zip(chain, names, strict=True)):
        config[name] = ConfigDict(config[stage].to_dict())
        config[name].method = ConfigDict(dict(name="none"))
        config[name].method_init, config[name].imitate_boxes = "", False
        if position:
            config[name].init = names[position - 1]
    return config, names


def _usable(workdir: Path) -> Path:
    """Makes the workdir, or says why it cannot be used."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.strerror}); name a folder that can be written, or a new one."
        ) from error
    return workdir


def _report_data(workdir: Path, splits: dict[str, IndexedSource]) -> None:
    write_json(workdir / "data_report.json", {name: source.report_dict() for name, source in splits.items()})


def _summary(config: ConfigDict, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    student = config.stages[-1]
    last = results[student]
    return {
        "method": config[student].method.name,
        "teacher": last["teacher"],
        "student": last["metrics"],
        "baseline": results[BASELINE]["metrics"] if BASELINE in results else None,
        "steps": last["steps"],
        "images_per_second": last["images_per_second"],
    }


def _table(config: ConfigDict, results: dict[str, dict[str, Any]]) -> str:
    def row(name: str, label: str) -> Row:
        return Row(label, results[name]["metrics"], results[name]["parameters"])

    *earlier, student = config.stages
    rows = [row(name, name) for name in earlier]
    rows.append(row(student, f"{student} ({config[student].method.name})"))
    return summary_table(rows, row(BASELINE, f"{student} (none)") if BASELINE in results else None)


def _draw(config: ConfigDict, workdir: Path, stages: list[str]) -> None:
    """Predictions of every stage beside the ground truth, as ``predictions.png``."""
    if not config.pictures:
        return
    source = open_split(config, training=False)

    def found(name: str) -> list[ImageDetections]:
        entries = json.loads((workdir / "stages" / name / "detections.json").read_text())
        return [
            ImageDetections(
                position=position,
                boxes=np.asarray(entry["boxes"], np.float32).reshape(-1, 4),
                scores=np.asarray(entry["scores"], np.float32),
                labels=np.asarray(entry["labels"], np.int32),
            )
            for position, entry in enumerate(entries)
        ]

    columns = {name: found(name)[: config.pictures] for name in stages}
    save_predictions(workdir / "predictions.png", source, columns)
