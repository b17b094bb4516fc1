"""The stages of a config in order, each skipped when it is done, and what they were worth together."""

import contextlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from kdjax.data.flaws import joined
from kdjax.data.manifest import MANIFEST_FILE, Seen, check_manifest, look
from kdjax.devices import device_count
from kdjax.errors import UserError, harmless
from kdjax.files import storing, write_json
from kdjax.lock import take
from kdjax.paths import Path, as_path
from kdjax.plan import BASELINE, Plan, check_files, resolve, with_seed
from kdjax.processes import MAIN, are_several, everywhere, gather, is_main, on_main
from kdjax.report import Row, duration, summary_table
from kdjax.run.agreement import check_agreement, check_workdir, open_alike
from kdjax.run.commands import commands, methods_of
from kdjax.run.data import Splits
from kdjax.run.fit import opened
from kdjax.run.floor import check_floors
from kdjax.run.page import REPORT_FILE, write_report
from kdjax.run.record import (
    Finished,
    check_claim,
    check_twin,
    identity,
    is_begun,
    kept_predictions,
    seed_folder,
    stage_folder,
)
from kdjax.run.train import train_stage
from kdjax.run.verdict import judge
from kdjax.saved import copy_model
from kdjax.sinks import check_sinks
from kdjax.stopping import Stop, stopping
from kdjax.types import Column
from kdjax.watchdog import Watchdog


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs every stage of ``config`` that is not finished in ``workdir``, and sums up.

    Of several seeds each has a folder ``seed_<number>`` like the one described here, and the summary is about all.

    The workdir ends with a folder per stage, ``student/`` (the last stage's model alone, for
    :func:`kdjax.load_student`), ``data_report.json``, ``data_manifest.npz``, ``predictions.png``, ``summary.json`` and
    ``report.html``.

    Args:
        config: of :func:`kdjax.config.base_config`'s schema.
        workdir: made if missing; in a bucket, ``gs://bucket/runs/first``, ``kdjax[gcs]`` reads and writes it.

    Returns:
        what ``summary.json`` holds.

    Raises:
        UserError: the config, the workdir or something that the config names cannot be used; or another run is in it.
        NumericError: too many steps in a row were not finite.
        StorageError: the workdir cannot be written.
        Stopped: a signal ended it, and it is saved.
    """
    started = time.monotonic()
    with stopping() as stop:
        place = everywhere(lambda: as_path(workdir))
        plan = everywhere(lambda: _resolved(config))
        with storing(place), everywhere(lambda: take(place) if is_main() else contextlib.ExitStack()):
            return _run_all(config, plan, place, started, stop)


def _run_all(config: ConfigDict, plan: Plan, place: Path, started: float, stop: Stop) -> dict[str, Any]:
    """The run, in a workdir that is this one's alone, since ``started``."""
    check_workdir(place)
    plan, splits = open_alike(plan.content, plan.data, plan.task, lambda: _opened(config, plan))
    seen = everywhere(lambda: look(splits._asdict()))
    on_main(lambda: _check_manifest(plan, place, seen))
    claims = everywhere(lambda: _all_claims(plan, place, splits))
    check_agreement({"config": plan.content, "stages": claims})
    if plan.run.seeds:
        plans = {seed: with_seed(plan, seed) for seed in plan.run.seeds}
        summary, folder = _repeat(plans, place, splits, claims, stop), seed_folder(place, plan.run.seeds[0])
    else:
        summary, folder = _run(plan, place, splits, claims[plan.run.seed], stop), place
    print(_closing(plan, place, folder, time.monotonic() - started), flush=True)
    return summary


def _resolved(config: ConfigDict) -> Plan:
    plan = resolve(config, devices=device_count())
    check_files(plan)
    check_sinks(plan.run.sinks)
    return plan


def _opened(config: ConfigDict, plan: Plan) -> tuple[Plan, Splits]:
    """The plan with what is chosen from the data, and the data, which have enough images."""
    plan, splits = opened(config, plan)
    _check_batches(plan, splits)
    return plan, splits


def _check_manifest(plan: Plan, workdir: Path, seen: Mapping[str, Seen]) -> None:
    """Refuses to go on with image files that have other bytes than when the run began."""
    begun = any(
        is_begun(stage_folder(folder, stage.name))
        for folder in _folders(plan, workdir).values()
        for stage in plan.stages
    )
    check_manifest(workdir / MANIFEST_FILE, seen, begun=begun, whole=plan.data.digest)


def _all_claims(plan: Plan, workdir: Path, splits: Splits) -> dict[int, dict[str, Any]]:
    """By seed what each stage is known by; with it all is refused that can be before a stage begins."""
    folders = _folders(plan, workdir)
    return {seed: _claims(with_seed(plan, seed), folder, splits) for seed, folder in folders.items()}


def _folders(plan: Plan, workdir: Path) -> dict[int, Path]:
    """The folder of each seed."""
    return {seed: seed_folder(workdir, seed) for seed in plan.run.seeds} or {plan.run.seed: workdir}


def _check_batches(plan: Plan, splits: Splits) -> None:
    """Refuses a batch that is larger than the training split."""
    for stage in plan.stages:
        if stage.steps and stage.options.batch_size > len(splits.train):
            raise UserError(
                f"config.{stage.name}.batch_size is {stage.options.batch_size}, but {splits.train.origin} has "
                f"{len(splits.train)} images: it must be at most that many, and a multiple of the devices."
            )


def _claims(plan: Plan, workdir: Path, splits: Splits) -> dict[str, dict[str, Any]]:
    """What each stage is known by; refuses to go on where a stage's folder is that of another run."""
    identities = {stage.name: identity(plan, stage, splits) for stage in plan.stages}
    for stage in plan.stages:
        check_claim(stage_folder(workdir, stage.name), identities[stage.name])
    for twin, baseline in itertools.combinations(plan.stages, 2):
        if twin.number == baseline.number:
            check_twin(stage_folder(workdir, baseline.name), stage_folder(workdir, twin.name))
    return identities


def _repeat(
    plans: Mapping[int, Plan],
    workdir: Path,
    splits: Splits,
    identities: Mapping[int, Mapping[str, Any]],
    stop: Stop,
) -> dict[str, Any]:
    """One run for each seed, in a folder of its own, and what they say together of the student and its twin."""
    summaries = {}
    for number, (seed, plan) in enumerate(plans.items(), start=1):
        print(f"Seed {seed}, {number} of {len(plans)}:", flush=True)
        summaries[seed] = _run(plan, seed_folder(workdir, seed), splits, identities[seed], stop)
    task = next(iter(plans.values())).task
    found = {role: [summary[role][task.primary] for summary in summaries.values()] for role in ("student", "baseline")}
    verdict = judge(found["student"], found["baseline"], task.primary, higher_is_better=task.higher_is_better)
    print("seed  student  baseline  difference")
    for seed, student, baseline, difference in zip(plans, *found.values(), verdict.differences, strict=True):
        print(f"{seed:4}  {student:7.1f}  {baseline:8.1f}  {difference:+10.1f}")
    print(verdict.sentence)
    summary = {
        "method": next(iter(summaries.values()))["method"],
        "primary": task.primary,
        "seeds": list(plans),
        **found,
        "verdict": verdict._asdict(),
    }

    def finish() -> None:
        write_json(workdir / "summary.json", summary)
        with harmless(REPORT_FILE):
            folders = {seed: seed_folder(workdir, seed) for seed in plans}
            write_report(next(iter(plans.values())), folders, workdir, splits.evaluation)

    on_main(finish)
    return summary


def _run(plan: Plan, workdir: Path, splits: Splits, identities: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    """The run of one seed, whose stages are known by ``identities``."""

    def begin() -> None:
        workdir.mkdir(exist_ok=True)
        write_json(workdir / "config.json", plan.content)
        _report_data(workdir, [_reports(splits)])

    on_main(begin)
    results: dict[str, dict[str, Any]] = {}
    finished: dict[str, Finished] = {}
    with Watchdog(workdir / _hang_report(), plan.run.patience) as watchdog:
        for stage in plan.stages:
            folder = stage_folder(workdir, stage.name)
            result = train_stage(plan, stage, splits, identities[stage.name], folder, finished, stop, watchdog)
            results[stage.name], finished[stage.name] = result, Finished(folder, result["metrics"])
            check_floors(plan, stage.name, result["metrics"], splits.train.class_names)
    summary = _summary(plan, results)
    # Again, for images that could not be decoded: each process meets its own.
    reports = gather(_reports(splits))

    def finish() -> None:
        copy_model(finished[plan.student].model, workdir / "student")
        write_json(workdir / "summary.json", summary)
        _report_data(workdir, reports)
        _draw(plan, workdir, splits, finished)
        with harmless(REPORT_FILE):
            write_report(plan, {plan.run.seed: workdir}, workdir, splits.evaluation)

    on_main(finish)
    print(_table(plan, results))
    return summary


def _hang_report() -> str:
    """The name of this process's file for what it was doing as it hung."""
    return f"hang_report_{jax.process_index()}.txt" if are_several() else "hang_report.txt"


def _reports(splits: Splits) -> dict[str, dict[str, Any]]:
    """What this process knows of the data."""
    return {"train": splits.train.report_dict(), "eval": splits.evaluation.report_dict()}


def _report_data(workdir: Path, reports: Sequence[Mapping[str, dict[str, Any]]]) -> None:
    """Writes what processes know of the data, the main one first."""
    content = {name: joined([report[name] for report in reports]) for name in reports[MAIN]}
    write_json(workdir / "data_report.json", content)


def _summary(plan: Plan, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    last = results[plan.student]
    return {
        "method": methods_of(plan),
        "primary": plan.task.primary,
        "teacher": last["teacher"],
        "student": last["metrics"],
        "baseline": results[BASELINE]["metrics"] if plan.baseline else None,
        "steps": last["steps"],
        "images_per_second": last["images_per_second"],
    }


def _table(plan: Plan, results: Mapping[str, dict[str, Any]]) -> str:
    def row(name: str, label: str) -> Row:
        return Row(label, results[name]["metrics"], results[name]["parameters"])

    *earlier, student = plan.run.stages
    rows = [row(name, name) for name in earlier]
    rows.append(row(student, f"{student} ({methods_of(plan)})"))
    return summary_table(rows, plan.task.columns, row(BASELINE, BASELINE) if plan.baseline else None)


def _closing(plan: Plan, workdir: Path, folder: Path, seconds: float) -> str:
    """Where everything is, and what to do with it: the commands that come next.

    Args:
        plan: of one seed or several.
        workdir: of the run.
        folder: of one seed, where the student is.
        seconds: that this command took.
    """
    pictures = ", pictures in predictions.png" if plan.run.pictures else ""
    there = f": the student alone in student/{pictures}" if folder == workdir else ", each seed in a folder of its own"
    lines = [
        f"{duration(seconds)} in all. Everything is in {workdir}{there}.",
        f"What it was worth, to look at: {workdir / REPORT_FILE}",
        "What comes next:",
        *(f"  {what}:  {command}" for what, command in commands(plan, folder)),
    ]
    return "\n".join(lines)


def _draw(plan: Plan, workdir: Path, splits: Splits, finished: Mapping[str, Finished]) -> None:
    """Predictions of every stage beside the ground truth, as ``predictions.png``."""
    if not plan.run.pictures:
        return

    columns = {
        name: Column(kept[: plan.run.pictures], stage.metrics)
        for name, stage in finished.items()
        if (kept := kept_predictions(stage.folder))
    }
    plan.task.draw(workdir / "predictions.png", splits.evaluation, columns)
