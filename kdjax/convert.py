"""Makes a model folder of a model that was trained elsewhere.

    python -m kdjax.convert --config=configs/mgd.py --weights=FILE --source=mmdet --output=FOLDER

The model is the one of the config's stage ``--stage``. The folder is like those that training leaves: it can be
evaluated, taken as ``config.student.teacher``, and loaded by ``kdjax.load_student``.
"""

from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from kdjax.config.schema import Data
from kdjax.errors import DataError, Exit, UsageError, UserError
from kdjax.files import writing
from kdjax.main import CONFIG, ended, parse
from kdjax.options import parse as parse_options
from kdjax.paths import Path, as_path
from kdjax.run.start import import_detector, other_classes
from kdjax.saved import MODEL_FILE, describe_model, save_model
from kdjax.weights import SOURCES, ImportReport
from kdjax.weights.coco import COCO_IDS, COCO_NAMES

_WEIGHTS = flags.DEFINE_string("weights", "", "File of weights: of torch.save, .pkl, .safetensors or .npz.")
_KEY = flags.DEFINE_string(
    "weights_key",
    "",
    "Entry of the file to take where it holds several state dicts, such as model_ema; by default the usual one.",
)
_SOURCE = flags.DEFINE_string("source", "", f"Whose weights they are: {', '.join(SOURCES)}.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder to write; one that exists is replaced.")
_STAGE = flags.DEFINE_string("stage", "teacher", "Stage of the config whose model it is.")
_CLASS_NAMES = flags.DEFINE_string(
    "class_names",
    "",
    "Text file with the names of the file's classes in order, one in a line; by default those that it names itself, or "
    "COCO's 80.",
)


def convert(
    config: ConfigDict,
    stage: str,
    weights: str,
    source: str,
    class_names: tuple[str, ...] | None,
    output: Path,
    *,
    key: str = "",
) -> ImportReport:
    """Imports a file of weights and writes the model folder.

    Args:
        config: the whole config.
        stage: whose model the weights are for.
        weights: path of the file.
        source: a key of ``kdjax.weights.SOURCES``.
        class_names: in the order of the file's classes, without a background; None for those that the file names, or
            COCO's where it has 80.
        output: the folder.
        key: of the state dict in a file that holds several; "" for the usual ones.

    Raises:
        UsageError: a flag's value cannot be.
        DataError: the file is damaged.
        UserError: one sentence says what does not fit.
    """
    if not isinstance(config.get(stage), ConfigDict) or "model" not in config[stage]:
        raise UsageError(f"--stage={stage} is no stage of the config; its stages are {', '.join(config.stages)}.")
    if output.exists() and not (output / MODEL_FILE).is_file():
        raise UsageError(f"--output={output} exists and is no model folder; name one, or a new folder.")
    number = len(class_names) if class_names else None
    imported = import_detector(config[stage].model.to_dict(), weights, source, number, key=key)
    if imported.report.untouched:
        raise UserError(
            f"{weights} holds a backbone alone, which is no whole model; start the training of one from it by "
            f"--config.{stage}.weights and --config.{stage}.source."
        )
    names = class_names or imported.class_names
    if not names:
        raise UsageError(f"{weights} does not say what its classes are: name them by --class_names.")
    if difference := other_classes(weights, imported.class_names or names, "--class_names", names):
        raise UserError(f"{difference}.")
    data = parse_options(Data, config.data.to_dict(), "config.data")
    resize = SOURCES[source].resize_of(config[stage].model.name)
    sizing = data.sizing._replace(resize=resize or data.sizing.resize)
    ids = COCO_IDS if tuple(names) == COCO_NAMES else ()
    description = describe_model(imported.model, names, sizing, ids, reading=data.reading)
    with writing("output", output):
        save_model(output, imported.variables, description)
    return imported.report


def read_class_names(path: str) -> tuple[str, ...] | None:
    """The names of classes in a text file, one in a line; None where ``path`` is empty.

    Raises:
        DataError: the file cannot be read, is empty, or has a name twice.
    """
    if not path:
        return None
    if not as_path(path).is_file():
        raise DataError(f"--class_names={path} cannot be read: it is no file.")
    try:
        lines = as_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class_names={path} cannot be read: {error}.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(set(names)) < len(names):
        raise DataError(f"--class_names={path} must have one name in each line, none of them twice.")
    return names


def main(argv: Sequence[str]) -> int:
    """Converts what the flags name; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        for flag, meaning in ((_WEIGHTS, "the file"), (_SOURCE, "its origin"), (_OUTPUT, "the new folder")):
            if not flag.value:
                raise UsageError(f"--{flag.name} is missing; it names {meaning}.")
        names = read_class_names(_CLASS_NAMES.value)
        output = as_path(_OUTPUT.value)
        report = convert(CONFIG.value, _STAGE.value, _WEIGHTS.value, _SOURCE.value, names, output, key=_KEY.value)
        print(f"{_OUTPUT.value}: {report}.")
        return Exit.FINISHED

    return ended(work, "the folder is as it was, or whole")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
