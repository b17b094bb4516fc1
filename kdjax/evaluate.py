"""Measures a saved model on any split: ``python -m kdjax.evaluate --model=runs/first/student --config.data.name=...``.

Prints all numbers of the task's judge, of detectors COCO's twelve, and a table by class. Data, task and the scale of
images are those of ``--config``; without one, the data are the embedded ones, and the task and the scale those of the
model, but for what flags say.
"""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kdjax.config import find_config
from kdjax.config.schema import Data, Run
from kdjax.devices import device_count
from kdjax.errors import Exit, UsageError, UserError
from kdjax.evaluation import evaluate, make_predict
from kdjax.files import check_writable, write_json, writing
from kdjax.main import CONFIG, begin, ended, parse
from kdjax.options import parse as parse_options
from kdjax.paths import as_path
from kdjax.plan import check_eval_batch
from kdjax.processes import are_several, everywhere, on_main
from kdjax.report import align, known
from kdjax.run.agreement import check_agreement, open_alike
from kdjax.run.data import open_split
from kdjax.run.start import Teacher, load_model
from kdjax.saved import describe, sizing_of, task_of
from kdjax.tasks import build_task
from kdjax.types import Metrics, Source, Task

_MODEL = flags.DEFINE_string("model", "", "Folder of a model, or one step in the checkpoints of a stage.")
_JSON = flags.DEFINE_string("json", "", "JSON file for the numbers, if wanted.")
PLAIN = "none"
"""The config that takes the place of a missing one."""


def measure(config: ConfigDict, model: str) -> Metrics:
    """The metrics of a saved model on the evaluation split of a config.

    Args:
        config: its section of data, its task and its batches of evaluation are used.
        model: a model folder, or one step of a run's checkpoints.

    Raises:
        DataError: the folder or the data are damaged.
        UserError: they cannot be used, or the model tells other classes apart, or is for another task.
    """
    content = {key: section for key, section in config.to_dict().items() if key in ("task", "eval_batch_size", "data")}

    def resolved() -> tuple[Run, Data, Task]:
        run = parse_options(Run, {key: section for key, section in content.items() if key != "data"}, "config")
        data = parse_options(Data, content.get("data", {}), "config.data")
        check_eval_batch(run, device_count())
        return run, data, build_task(run.task, data)

    def opened() -> tuple[Source, Teacher, dict[str, Any]]:
        source = open_split(data, task, training=False, together=are_several())
        print("\n".join(source.report_lines()), flush=True)
        loaded, words = load_model(as_path(model), source.class_names, "float32")
        if words:
            print(f"{model}: {words}.", flush=True)
        if loaded.module.task != task.name:
            raise UserError(f"--model={model} is a model for {loaded.module.task}, and config.task is for {task.name}.")
        return source, loaded, describe(model)

    run, data, task = everywhere(resolved)
    source, loaded, described = open_alike(content, data, task, opened)
    check_agreement({"data": source.fingerprint, "model": described})
    metrics, _ = evaluate(
        make_predict(loaded.module),
        loaded.variables,
        source,
        task,
        batch_size=run.eval_batch_size,
        image_size=data.sizing,
        num_threads=data.threads,
    )
    return metrics


def tables(metrics: Metrics) -> str:
    """All numbers of a judge, below them those that it has by class, and those by two classes."""
    by_class = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    matrices = {name: by_class.pop(name) for name, value in metrics.items() if _is_matrix(value)}
    single = [name for name in metrics if name not in by_class and name not in matrices]
    lines = align([[name, known(metrics[name], ".1f")] for name in single])
    if by_class:
        classes = next(iter(by_class.values()))
        rows = [[name, *(known(column[name], ".1f") for column in by_class.values())] for name in classes]
        lines += ["", *align([["class", *(name.replace("per_class", "AP") for name in by_class)], *rows])]
    for name, matrix in matrices.items():
        rows = [
            [one, *(known(row[other], ".1f") if other in row else "" for other in matrix)]
            for one, row in matrix.items()
        ]
        lines += ["", *align([[name, *matrix], *rows])]
    return "\n".join(lines)


def _is_matrix(value: object) -> bool:
    """Whether a metric is a number by two classes."""
    return isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())


def main(_: Sequence[str]) -> int:
    """Prints the tables; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        begin()
        if _JSON.value:
            on_main(lambda: check_writable("json", _JSON.value))
        metrics = measure(everywhere(_config), _MODEL.value)
        print(tables(metrics))
        if _JSON.value:
            on_main(lambda: _write(metrics))
        return Exit.FINISHED

    return ended(work, "nothing was written")


def _write(metrics: Metrics) -> None:
    with writing("json", _JSON.value):
        write_json(_JSON.value, metrics)


def _config() -> ConfigDict:
    """What flags say, of a plain config with what is known of the model."""
    if not _MODEL.value:
        raise UsageError("--model is missing; name a folder, such as --model=runs/first/student.")
    if Path(config_flags.get_config_filename(flags.FLAGS["config"])) != find_config(PLAIN)[0]:
        return CONFIG.value
    said = [name.rpartition(".")[2] for name in flags.FLAGS if name.startswith("config.")]
    return as_trained(CONFIG.value, _MODEL.value, said)


def as_trained(config: ConfigDict, model: str, said: Container[str] = ()) -> ConfigDict:
    """The config with a model's task, and images scaled as they were for it, but for the keys that somebody said."""
    if "task" not in said:
        config.task = task_of(model) or config.task
    if (known := sizing_of(model)) is not None:
        keys = known.described() | {"image_size": known.shapes, "short_sides": known.short_sides}
        config.data.update({key: x for key, x in keys.items() if key not in said})
    return config


def parse_with_plain(argv: Sequence[str]) -> list[str]:
    """As :func:`kdjax.main.parse`; a missing --config is the plain one."""
    given = any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv)
    return parse(argv if given else [argv[0], f"--config={PLAIN}", *argv[1:]])


if __name__ == "__main__":
    app.run(main, flags_parser=parse_with_plain)
