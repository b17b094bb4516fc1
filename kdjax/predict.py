"""Asks a saved model about photographs: ``python -m kdjax.predict --model=runs/first/student --input=photographs``.

What it says of them is in ``--output``: of detectors ``detections.json`` in COCO's results format, of classifiers
``classes.json``, of segmenters a PNG of class numbers for each photograph; and ``drawn/``, the first ones with what was
found in them. How photographs are scaled, what the classes are, and all else comes from the model's folder.
"""

import glob
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from kdjax.data.folders import pictures
from kdjax.data.photographs import Photographs, stems
from kdjax.devices import cache_compilations
from kdjax.errors import DataError, Exit, UsageError
from kdjax.files import read_json, writing
from kdjax.main import ended, parse_flags
from kdjax.paths import Path, as_path, exists, in_bucket, is_file, is_folder
from kdjax.predictor import Predictor, load_predictor, usual_batch
from kdjax.visualize import save_drawing

# Whoever imports several programs at once, as their tests do, has others' flags of these names.
_MODEL = flags.DEFINE_string("model", "", "Folder of a model.", allow_override=True)
_INPUT = flags.DEFINE_string("input", "", "An image file, a folder of them, or a pattern such as 'day/*.jpg'.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder for what is found.", allow_override=True)
_THRESHOLD = flags.DEFINE_float("threshold", None, "Score from which on something counts; the model's by default.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Photographs that all devices see at once.", 1)
_PICTURES = flags.DEFINE_integer("pictures", 100, "How many of the photographs are drawn, the first ones.", 0)
_ANNOTATIONS = flags.DEFINE_string(
    "annotations", "", "COCO's annotations of the photographs, if there are any: detections.json has their ids then."
)
DRAWN_FOLDER = "drawn"
_EVERY = 10.0
"""Seconds between two lines of progress."""
_NAMED = 5
"""Files that a sentence names, at most."""


def predict(
    model: str,
    wanted: str,
    output: str,
    *,
    threshold: float | None = None,
    batch_size: int | None = None,
    most_drawn: int = 100,
    annotations: str = "",
) -> str:
    """Writes what a model says of photographs, and draws some; returns a sentence about it.

    Args:
        model: its folder.
        wanted: a file, a folder, or a pattern of shells.
        output: the folder to write; what is there by other names stays.
        threshold: as :func:`kdjax.predictor.load_predictor` has it.
        batch_size: likewise.
        most_drawn: photographs that are drawn, the first ones.
        annotations: a file of COCO's that has ids of these photographs; "" to count them.

    Raises:
        UsageError: a flag's value cannot be.
        DataError: the model is damaged; or photographs cannot be read, and what is said of the others is written.
    """
    folder = as_path(output)
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"--output={output} is a file; name a folder.")
    root, names = images_at(wanted)
    if is_folder(as_path(wanted)) and _is_inside(folder, root):
        raise UsageError(f"--output={output} is inside of --input={wanted}, and would be read next time; name another.")
    predictor = load_predictor(model, threshold=threshold, batch_size=batch_size or usual_batch(len(names)))
    ids = ids_in(annotations, names, predictor) if annotations else ()
    source = Photographs([root / name for name in names], predictor.reading, names=names, identity=ids)
    print(f"{len(source)} photographs in {wanted}, in batches of {predictor.batch_size}.", flush=True)
    started = time.monotonic()
    with writing("output", output):
        folder.mkdir(parents=True, exist_ok=True)
        predictor.results.save(folder, source, _told(_drawn(predictor, source, folder, most_drawn), len(source)))
    seconds = time.monotonic() - started
    said = f"What {model} says of {len(source) - len(source.left_out)} photographs is in {output}"
    if source.left_out:
        some = ", ".join(f"{name} ({why})" for name, why in list(source.left_out.items())[:_NAMED])
        more = f" and {len(source.left_out) - _NAMED} more" * (len(source.left_out) > _NAMED)
        raise DataError(f"{len(source.left_out)} of {len(names)} photographs are left out: {some}{more}. {said}.")
    drawn = f", the first {most_drawn} of them drawn (--pictures={len(source)} draws all)" * (most_drawn < len(source))
    return f"{said}{drawn}: {len(source) / seconds:.1f} a second."


def images_at(wanted: str) -> tuple[Path, list[str]]:
    """The folder of image files and their names in it, sorted.

    Args:
        wanted: a file, a folder, in which and below which files are found by their suffixes, or a pattern of shells.

    Raises:
        UsageError: there are none.
    """
    place = as_path(wanted)
    if is_file(place):
        return place.parent, [place.name]
    if is_folder(place):
        if names := pictures(place, place):
            return place, names
        raise UsageError(f"--input={wanted} is a folder without image files (.jpg, .png, .webp, .bmp, .tif, .gif).")
    if in_bucket(place):
        found = [str(path) for path in place.parent.glob(place.name)]
    else:
        found = [path for path in glob.glob(str(place), recursive=True) if not os.path.isdir(path)]
    if not found:
        raise UsageError(f"--input={wanted} is no file and no folder, and no pattern of any file; quote a pattern.")
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    return as_path(root), sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in found)


def ids_in(annotations: str, names: Sequence[str], predictor: Predictor) -> list[int]:
    """What a file of COCO's annotations calls photographs, by their names or by the last parts of these.

    Raises:
        DataError: it is no such file, lacks some of them, or calls other classes as the model does.
    """
    content = read_json(as_path(annotations), dict)
    try:
        ids = {str(image["file_name"]): int(image["id"]) for image in content["images"]}
        classes = {category["id"]: category["name"] for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"--annotations={annotations} is no file of COCO's annotations ({error!r}).") from error
    for number, name in zip(predictor.category_ids, predictor.class_names, strict=True):
        if number in classes and classes[number] != name:
            raise DataError(
                f"--annotations={annotations} calls category {number} {classes[number]!r}, the model {name!r}: "
                "they are of other data."
            )
    found = [ids.get(name, ids.get(os.path.basename(name))) for name in names]
    if lacking := [name for name, number in zip(names, found, strict=True) if number is None]:
        some = ", ".join(lacking[:_NAMED])
        raise DataError(f"--annotations={annotations} lacks {len(lacking)} of {len(names)} photographs: {some}.")
    return [number for number in found if number is not None]


def _is_inside(folder: Path, root: Path) -> bool:
    """Whether a folder is another one, or below it."""
    return f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(root)}/")


def _drawn(predictor: Predictor, source: Photographs, folder: Path, most: int) -> Iterator[tuple[int, Any]]:
    """What is said of photographs, the first of which are drawn as it comes."""
    names = stems(source.names)
    for position, result in predictor.each(source):
        if position < most:
            path = folder / DRAWN_FOLDER / f"{names[position]}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_drawing(path, predictor.results.drawn(source[position].image, result))
        yield position, result


def _told(results: Iterator[tuple[int, Any]], count: int) -> Iterator[tuple[int, Any]]:
    """The same; how far it has come is printed now and then."""
    due = time.monotonic() + _EVERY
    for done, result in enumerate(results, start=1):
        if time.monotonic() > due:
            print(f"{done} of {count} photographs.", flush=True)
            due = time.monotonic() + _EVERY
        yield result


def main(_: Sequence[str]) -> int:
    """Predicts as the flags say; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        for flag, meaning in ((_MODEL, "the folder of a model"), (_INPUT, "photographs"), (_OUTPUT, "a folder")):
            if not flag.value:
                raise UsageError(f"--{flag.name} is missing; it names {meaning}.")
        cache_compilations()
        said = predict(
            _MODEL.value,
            _INPUT.value,
            _OUTPUT.value,
            threshold=_THRESHOLD.value,
            batch_size=_BATCH_SIZE.value,
            most_drawn=_PICTURES.value,
            annotations=_ANNOTATIONS.value,
        )
        print(said)
        return Exit.FINISHED

    return ended(work, "pictures that are drawn stay")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
