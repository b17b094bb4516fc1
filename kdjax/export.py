"""Writes a trained model as a file that others load: ``python -m kdjax.export --model=FOLDER --format=stablehlo ...``.

    python -m kdjax.export --model=runs/first/student --format=stablehlo --output=student.stablehlo

A program holds all that inference is, weights included: from uint8 images, scaled and padded as the model saw them, to
plain arrays by name. What it expects and gives is said in ``<output>.json`` beside it; docs/deploy.md has each format.
The file is long because each format has a writer of its own, beside what all say in the same words.
"""

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import safetensors.numpy
from absl import app, flags, logging
from jax import export as jax_export

from kdjax import __version__, operations
from kdjax.data.sizing import RESIZES, Size, Sizing
from kdjax.errors import Exit, UsageError, UserError
from kdjax.files import replace_bytes, sha256_of, write_json, writing
from kdjax.main import ended, parse_flags
from kdjax.models import RepPoints, complete, model_class
from kdjax.models.dense import DenseDetector, undecided
from kdjax.paths import Path, as_path, in_bucket
from kdjax.saved import describe, known_sizing, load_student, replacing
from kdjax.types import Model
from kdjax.weights import SOURCES, Serving, export_state_dict, lines_to_load

# Whoever imports several programs at once, as their tests do, has other ones' flags of these names.
_MODEL = flags.DEFINE_string(
    "model", "", "Folder of a model, or one step in the checkpoints of a stage.", allow_override=True
)
_OUTPUT = flags.DEFINE_string("output", "", "What to write; what is there is replaced.", allow_override=True)
_FORMAT = flags.DEFINE_string("format", "", "Format to write; docs/deploy.md has them all.")
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", "", "HEIGHTxWIDTH in pixels of the images that a program takes; by default those that the model saw."
)

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a StableHLO program is lowered for."""
_LEAST_SIDE, _MOST_SIDE = 32, 2**16 - 1

_INPUTS = "images", "image_size"
_ALONE = {"segmentation": "classes", "classification": "probabilities"}
"""By task, the name of what is found where it is one array."""
_MEANING = {
    "images": "RGB, scaled as sizing says, zeros below and to the right",
    "image_size": "height and width of each image without those zeros",
    "boxes": "xyxy in pixels of the scaled image, best first",
    "scores": "in [0, 1], descending; 0 where not valid",
    "labels": "place in class_names, from 0",
    "valid": "false for empty slots",
    "masks": "in [0, 1]: the box cut into equal cells, an object where at least 0.5",
    "whole_masks": "255 times the probability at every fourth pixel of the padded image, an object above one half",
    "classes": "of every pixel of the padded image, place in class_names, from 0",
    "probabilities": "in the order of class_names",
}
"""What inputs and outputs are."""


class Trained(NamedTuple):
    """A model as its folder has it, and what was asked for."""

    module: Model
    variables: dict[str, Any]
    """{"params": ..., "batch_stats": ...}, float32."""
    description: dict[str, Any]
    """What :func:`kdjax.saved.describe` says of it."""
    sizing: Sizing
    """How its images were scaled."""
    image_size: Size | None = None
    """Height and width that were asked for; None for those of ``sizing``."""

    @property
    def shape(self) -> Size:
        """Height and width of the padded images that a program takes.

        Raises:
            UsageError: the model saw several, and none was asked for.
        """
        if self.image_size:
            return self.image_size
        if len(self.sizing.shapes) > 1:
            known = " or ".join(f"--image_size={height}x{width}" for height, width in self.sizing.shapes)
            raise UsageError(f"The model saw images of several shapes, and a program takes one: say {known}.")
        return self.sizing.shapes[0]


def inference(model: Trained) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """Everything that inference is, as a function of two arrays to arrays by name.

    Returns:
        (images (N, H, W, 3) uint8, image_size (N, 2) int32) to what the task is about: of detectors the fields of
        :class:`kdjax.types.Detections`, of segmenters "classes" (N, H, W) uint8, of classifiers "probabilities" (N, K)
        float32.
    """

    def predict(images: jax.Array, image_size: jax.Array) -> dict[str, jax.Array]:
        return by_name(operations.predict(model.module, model.variables, images, image_size), model.module.task)

    return predict


def by_name(found: Any, task: str) -> dict[str, jax.Array]:
    """What a model finds, a NamedTuple, a dict or one array, as a dict without what is None."""
    fields = found._asdict() if hasattr(found, "_asdict") else found
    fields = fields if isinstance(fields, Mapping) else {_ALONE.get(task, "output"): fields}
    return {name: x for name, x in fields.items() if x is not None}


def _stablehlo(model: Trained, output: Path) -> dict[str, Any]:
    """Writes what ``jax.export`` makes of the inference: any number of images, for all of ``PLATFORMS``."""
    _need("flatbuffers", "export")
    program = jax_export.export(jax.jit(inference(model)), platforms=PLATFORMS)(*_inputs(model))
    replace_bytes(output, bytes(program.serialize()))
    return {
        "platforms": list(program.platforms),
        **_program(model, program.in_avals, jax.tree.unflatten(program.out_tree, program.out_avals)),
        "use": [
            "import jax, numpy as np",
            f"program = jax.export.deserialize(open({output.name!r}, 'rb').read())",
            *_zeros(model.shape),
            "found = jax.jit(program.call)(images, image_size)  # arrays by name",
        ],
    }


_OPEN_IN_ONNX = "mobilenet_v1", "mobilenet_v2"
"""Models whose number of images jax2onnx leaves open."""


def _check_becomes_onnx(model: Trained) -> None:
    """Raises UserError unless a model's inference has only what jax2onnx converts and ONNX Runtime then loads."""
    module, name = model.module, model.description["model"]["name"]
    if module.task == "detection" and not isinstance(module, DenseDetector):
        where = "between its two stages" if model_class(name).has_proposals else "between its scores and its masks"
        raise UserError(
            f"--format=onnx takes no {name}: non-maximum suppression, which does not become ONNX, stands {where}. Take "
            "--format=stablehlo."
        )
    if isinstance(module, RepPoints) or getattr(getattr(module, "backbone", None), "deformable", False):
        raise UserError(
            f"--format=onnx takes no {name} with deformable convolutions: ONNX Runtime does not load what jax2onnx "
            "makes of their loop over taps. Take --format=stablehlo."
        )


def _onnx(model: Trained, output: Path) -> dict[str, Any]:
    """Writes what jax2onnx makes of the inference: of MobileNets, of any number of images, otherwise of one.

    jax2onnx does not leave open the number of images where maps are padded or resized. Of dense detectors the program
    ends before non-maximum suppression: it gives the boxes and scores of all places, and the description what is to be
    done then.

    Raises:
        UserError: it is a detector of two stages or one without boxes, which suppress in between, has deformable
            convolutions, or jax2onnx is missing.
    """
    _check_becomes_onnx(model)
    _need("jax2onnx", "onnx", "`pip install --no-deps jax2onnx`")
    predict, after, name = inference(model), {}, model.description["model"]["name"]
    if isinstance(model.module, DenseDetector):
        predict, after = functools.partial(undecided, model.module, model.variables), _suppression(model.module)
    from jax2onnx import to_onnx

    inputs = _inputs(model, images=None if name in _OPEN_IN_ONNX else 1)
    outputs = jax.eval_shape(predict, *inputs)
    program = to_onnx(
        lambda *arrays: operator.itemgetter(*outputs)(predict(*arrays)),
        inputs,
        input_names=list(_INPUTS),
        output_names=list(outputs),
    )
    replace_bytes(output, program.SerializeToString())
    names = ", ".join(f"{name!r}: {name}" for name in _INPUTS)
    return {
        **_program(model, inputs, outputs),
        **after,
        "use": [
            "import numpy as np, onnxruntime",
            f"program = onnxruntime.InferenceSession({output.name!r})",
            *_zeros(model.shape),
            f"found = dict(zip({list(outputs)}, program.run({list(outputs)}, {{{names}}})))  # arrays by name",
        ],
    }


def _suppression(module: DenseDetector) -> dict[str, Any]:
    """What is left to be done where a program gives all places of a dense detector."""
    options = ("candidates", "score_threshold", "iou_threshold", "max_detections", "drop_empty")
    steps = (
        "Of each level take the pairs of a place and a class with scores above score_threshold, candidates at most; "
        "multiply by factors; drop empty boxes if drop_empty; of each class, by descending score, drop what overlaps a "
        "kept box by more than iou_threshold; of the rest take the best max_detections."
    )
    return {"suppression": {"steps": steps, **{name: getattr(module, name) for name in options}}}


def _savedmodel(model: Trained, output: Path) -> dict[str, Any]:
    """Writes the folder of a TensorFlow SavedModel, with the inference for all of ``PLATFORMS`` inside.

    Raises:
        UserError: TensorFlow is missing, or too old for what JAX writes, as one that knows no ``top_k`` of its is.
    """
    _need("tensorflow", "tfds")
    if in_bucket(output):
        raise UsageError(
            f"--output={output} is in a bucket, and TensorFlow writes a folder here: name one, and copy it."
        )
    if output.exists() and not (output / "saved_model.pb").is_file():
        raise UsageError(f"--output={output} exists and is no SavedModel; name one, or a new folder.")
    import tensorflow as tf
    from jax.experimental import jax2tf

    predict, inputs = inference(model), _inputs(model)
    converted = jax2tf.convert(
        predict,
        polymorphic_shapes=[f"({', '.join(map(str, x.shape))})" for x in inputs],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    signature = [
        tf.TensorSpec((None, *x.shape[1:]), x.dtype.name, name) for name, x in zip(_INPUTS, inputs, strict=True)
    ]
    module = tf.Module()
    module.predict = tf.function(converted, autograph=False, input_signature=signature)
    with replacing(output) as partial:
        tf.saved_model.save(module, str(partial), signatures={"serving_default": module.predict})
        one = {name: tf.zeros((1, *x.shape[1:]), x.dtype.name) for name, x in zip(_INPUTS, inputs, strict=True)}
        try:
            tf.saved_model.load(str(partial)).signatures["serving_default"](**one)
        except tf.errors.OpError as error:
            raise UserError(
                f"TensorFlow {tf.__version__} does not run what JAX {jax.__version__} makes of a "
                f"{model.description['model']['name']}: take a newer TensorFlow, or --format=stablehlo."
            ) from error
    return {
        "tensorflow": tf.__version__,
        "platforms": list(PLATFORMS),
        **_program(model, inputs, jax.eval_shape(predict, *inputs)),
        "use": [
            "import numpy as np, tensorflow as tf",
            f"program = tf.saved_model.load({output.name!r}).signatures['serving_default']",
            *_zeros(model.shape),
            "found = program(images=tf.constant(images), image_size=tf.constant(image_size))  # tensors by name",
        ],
    }


def _torch_weights(model: Trained, output: Path, source: str) -> dict[str, Any]:
    """Writes the weights by the names and in the layouts of a program in PyTorch, as safetensors."""
    config = complete(model.description["model"])
    names = model.description["class_names"]
    written = export_state_dict(model.variables, source, model=config, num_classes=len(names))
    replace_bytes(output, safetensors.numpy.save(written.state, {"format": "pt", "class_names": json.dumps(names)}))
    short = max(model.sizing.short_sides, default=min(model.sizing.shapes[0]))
    serving = Serving(len(names), output.name, short, model.sizing.long_side or max(model.sizing.shapes[0]))
    return {
        "sizing": _scaling(model.sizing),
        "pixel_mean": list(config["pixel_mean"]),
        "pixel_std": list(config["pixel_std"]),
        "first_label": written.first_label,
        "changes": list(written.changes),
        "use": lines_to_load(config, source, serving),
    }


FORMATS: dict[str, Callable[[Trained, Path], dict[str, Any]]] = {
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "savedmodel": _savedmodel,
    **{source: functools.partial(_torch_weights, source=source) for source in SOURCES},
}
"""By name, what writes a model to a path and returns what its description has beside what all have."""


def export(folder: str, form: str, output: Path, image_size: Size | None = None) -> dict[str, Any]:
    """Writes a trained model in a format, and beside it ``<output>.json``, which describes it.

    Args:
        folder: of the model, or one step of a run's checkpoints.
        form: a key of ``FORMATS``.
        output: where to; what is there is replaced.
        image_size: height and width of the images that a program takes; None for those that the model saw.

    Returns:
        the description.

    Raises:
        UsageError: the format is unknown, or the model saw images of several shapes.
        DataError: the folder is damaged, or does not say how images were scaled.
        UserError: a package is missing, or the format has no place for what the model does.
        StorageError: the output cannot be written.
    """
    if form not in FORMATS:
        raise UsageError(f"--format={form} is unknown; choose one of {', '.join(FORMATS)}.")
    described, sizing = describe(folder), known_sizing(folder)
    model = Trained(*load_student(folder), described, sizing, image_size)
    beside = output.with_name(f"{output.name}.json")
    with writing("output", output):
        own = FORMATS[form](model, output)
        description = {
            "format": form,
            "kdjax": __version__,
            "sha256": sha256_of(output) if output.is_file() else None,
            "task": model.module.task,
            "class_names": described["class_names"],
            "category_ids": described.get("category_ids", []),
            **own,
        }
        write_json(beside, description)
    return description


def _inputs(model: Trained, images: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a program takes, in the order of ``_INPUTS``; None leaves the number of images open."""
    count = images or jax_export.symbolic_shape("b")[0]
    pixels = jax.ShapeDtypeStruct((count, *model.shape, 3), jnp.uint8)
    return pixels, jax.ShapeDtypeStruct((count, 2), jnp.int32)


def _zeros(shape: Size) -> list[str]:
    """Lines of Python that make what a program takes, of one black image."""
    height, width = shape
    return [
        f"images = np.zeros((1, {height}, {width}, 3), np.uint8)  # RGB, scaled to fit, zeros below and right",
        f"image_size = np.array([[{height}, {width}]], np.int32)  # height and width without those zeros",
    ]


def _program(model: Trained, inputs: Sequence[Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the description of a program has: how images are scaled for it, what it takes, and what it gives."""
    scaled = model.sizing._replace(shapes=(model.shape,), eval_padding=0)
    return {
        "jax": jax.__version__,
        "sizing": _scaling(scaled),
        "inputs": _interface(dict(zip(_INPUTS, inputs, strict=True))),
        "outputs": _interface(outputs),
    }


def _scaling(sizing: Sizing) -> dict[str, Any]:
    """How images are scaled, for whoever does so without kdjax."""
    return {**sizing.described(), "antialias": RESIZES[sizing.resize].antialias}


def _interface(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each input or output its shape, with the name of a size that is open, its dtype, and what it means."""
    return {
        name: {
            "shape": [size if isinstance(size, int) else str(size) for size in x.shape],
            "dtype": x.dtype.name,
            **({"meaning": _MEANING[name]} if name in _MEANING else {}),
        }
        for name, x in arrays.items()
    }


def _need(package: str, extra: str, *further: str) -> None:
    """Raises UserError where a package is not installed; ``further`` commands are needed after that of the extra."""
    if util.find_spec(package) is None:
        commands = " and ".join([f"`pip install 'kdjax[{extra}]'`", *further])
        raise UserError(f"This format needs the package {package}: install it with {commands}.")


def read_size(text: str) -> Size | None:
    """The height and width in ``HEIGHTxWIDTH``; None of nothing.

    >>> read_size("800x1344")
    (800, 1344)

    Raises:
        UsageError: it is something else.
    """
    if not text:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and _LEAST_SIDE <= int(side) <= _MOST_SIDE for side in sides):
        raise UsageError(
            f"--image_size={text} must be height and width in pixels, each {_LEAST_SIDE} to {_MOST_SIDE}, such as "
            "--image_size=800x1344."
        )
    return int(sides[0]), int(sides[1])


def main(_: Sequence[str]) -> int:
    """Exports what the flags name; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        wanted = (
            (_MODEL, "a folder, such as --model=runs/first/student"),
            (_FORMAT, f"one of {', '.join(FORMATS)}"),
            (_OUTPUT, "what to write, such as --output=student.stablehlo"),
        )
        for flag, meaning in wanted:
            if not flag.value:
                raise UsageError(f"--{flag.name} is missing; name {meaning}.")
        output = as_path(_OUTPUT.value)
        description = export(_MODEL.value, _FORMAT.value, output, read_size(_IMAGE_SIZE.value))
        print(
            f"{output}: {description['task']}, {len(description['class_names'])} classes; {output.name}.json beside it "
            "says what it takes and gives."
        )
        return Exit.FINISHED

    return ended(work, "what was there is as it was, or replaced")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
