"""What a stage begins with: its teacher, and its student's first weights, from wherever the config says.

Weights come from a file of another framework, from a model folder or a checkpoint, from an earlier stage, and from the
teacher. Whatever is taken over is printed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.data.check import compare_classes
from kdjax.errors import UserError
from kdjax.models import build_model, class_outputs, complete, other_meaning, with_classes
from kdjax.models.kernels import cast_kernels
from kdjax.paths import Path, as_path
from kdjax.plan import MethodPlan, StagePlan
from kdjax.run.record import Finished
from kdjax.saved import describe, load_method, load_student, load_variables
from kdjax.state import Variables
from kdjax.types import Model
from kdjax.weights import (
    COCO_NAMES,
    SOURCES,
    Imported,
    are_imagenet,
    count_classes,
    expected_model,
    import_state_dict,
    inherit,
    learnt_tokens,
    load_into,
    merged,
    read_weights,
    without,
)


class Teacher(NamedTuple):
    """A trained model that teaches."""

    module: Model
    variables: Variables
    """Of a stage, as :func:`kdjax.models.kernels.cast_kernels` makes them; float32 as they are loaded."""


class Origins(NamedTuple):
    """What a stage begins with."""

    model: Mapping[str, Any]
    """The student's section of the config, with what its first weights expect."""
    start: Callable[[Variables], Variables]
    """Takes the student's fresh variables to those that it starts from."""
    teacher: Teacher | None
    given: Mapping[str, Variables]
    """By method: parts of its parameters, by name, that an earlier stage learnt; they do not move."""


def load_origins(
    stage: StagePlan, class_names: tuple[str, ...], earlier: Mapping[str, Finished], resize: str
) -> Origins:
    """Reads what a stage begins with, and says what was loaded from where.

    Args:
        stage: of the plan.
        class_names: of the data.
        earlier: the stages before it, by name.
        resize: how images are scaled, a key of ``kdjax.data.sizing.RESIZES``.

    Raises:
        UserError: something is damaged, or does not fit the detector or the data.
    """
    name, options = stage.name, stage.options

    def folder(origin: str) -> Path:
        return earlier[origin].model if origin in earlier else as_path(origin)

    teacher = loaded = None
    if options.teacher:
        loaded, words = load_model(folder(options.teacher), class_names, options.dtype)
        # On the host: a device need not have room for what is inherited, which is float32.
        loaded = loaded._replace(variables=jax.device_get(loaded.variables))
        image_size = describe(folder(options.teacher))["image_size"]
        teacher = loaded._replace(variables=cast_kernels(*loaded, options.dtype, image_size))
        loaded = loaded if options.inherit else None
        told = [f"all its {len(jax.tree.leaves(teacher.variables))} arrays read", *filter(None, [words])]
        print(f"[{name}] teacher: {folder(options.teacher)}, {'; '.join(told)}.", flush=True)

    model, imported = options.model, None
    if options.weights:
        imported = _import(stage, class_names)
        model = imported.model
        usual = SOURCES[options.source].resize_of(model["name"])
        if usual not in (None, resize) and not imported.report.untouched:
            print(
                f"[{name}] {options.weights} is of a detector whose images were scaled as {usual} does, here they are "
                f"as {resize} does, and it finds a little less: config.data.resize={usual} scales them so.",
                flush=True,
            )
    elif options.init:
        theirs = describe(folder(options.init)).get("model", model)
        model = _as_expected(model, theirs, whole=options.init_strict)
        if options.init_strict and (difference := other_meaning(model, theirs)):
            print(f"[{name}] what it starts from has a head that means something else: {difference}", flush=True)

    def start(variables: Variables) -> Variables:
        if imported:
            variables, report = load_into(variables, imported.variables, origin=options.weights, strict=False)
            print(f"[{name}] starts from {options.weights}: {imported.report}; {report}", flush=True)
        if options.init:
            origin = folder(options.init)
            saved, words = _saved(origin, model, class_names, strict=options.init_strict)
            variables, report = load_into(variables, saved, origin=str(origin), strict=options.init_strict)
            print(f"[{name}] starts from {origin}: {'; '.join(filter(None, (words, str(report))))}", flush=True)
        if loaded:
            variables, words = _inherited(variables, loaded, options.inherit, model, folder(options.teacher))
            print(f"[{name}] inherits {words}", flush=True)
        return variables

    given = {}
    for key, method in stage.methods.items():
        if method.init in earlier:
            given[key] = load_method(earlier[method.init].method(key))
        elif method.init:
            given[key] = learnt_elsewhere(method, teacher.module.strides if teacher else ())
    return Origins(model, start, teacher, given)


def learnt_elsewhere(method: MethodPlan, levels: Iterable[str]) -> Variables:
    """What a method takes over from the path that its ``init`` is: a file of its authors' program, or a folder.

    Args:
        method: of a stage's plan.
        levels: of the teacher's maps, by their names.

    Raises:
        UserError: it cannot be used.
    """
    if not as_path(method.init).is_file():
        return load_method(method.init)
    maps = [x for x in levels if x in method.levels or not method.levels]
    return learnt_tokens(read_weights(method.init).tensors, maps, method.init)


def _inherited(
    variables: Variables, teacher: Teacher, parts: Sequence[str], model: Mapping[str, Any], folder: Path
) -> tuple[Variables, str]:
    """A student's variables with parts of its teacher's, and what was taken, in words.

    Not the head where it means something else: its arrays may have the same shapes, and would be nonsense.
    """
    difference = other_meaning(model, describe(folder)["model"]) if "head" in parts else ""
    taken = [part for part in parts if part != "head" or not difference]
    words = f"{', '.join(taken) or 'nothing'} from the teacher"
    if taken:
        variables, report = inherit(variables, teacher.variables, taken)
        words += f": {report.as_inherited()}"
    return variables, words + f"; not its head, which means something else: {difference}" * bool(difference)


def import_detector(
    model: Mapping[str, Any], weights: str, source: str, num_classes: int | None = None, *, key: str = ""
) -> Imported:
    """The weights in a file, as those of a model.

    Args:
        model: config of the model, as :func:`kdjax.models.build_model` takes it.
        weights: path of the file.
        source: a key of ``kdjax.weights.SOURCES``.
        num_classes: how many classes it must tell apart, without a background; None for as many as it does.
        key: of the state dict in a file that holds several; "" for the usual ones.

    Raises:
        UserError: one sentence says what does not fit.
    """
    file = read_weights(weights, key)
    expected = expected_model(complete(model), source, file.tensors, weights, file.config)

    def like(classes: int) -> Any:
        module = build_model(expected.model, num_classes=classes)
        return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))

    if num_classes is None:
        # A backbone alone tells nothing apart.
        num_classes = count_classes(file.tensors, source, model=expected.model, like=like(1), num_classes=1) or 1
    imported = import_state_dict(
        file.tensors,
        source,
        model=expected.model,
        like=like(num_classes),
        num_classes=num_classes,
        origin=weights,
        config=file.config,
    )
    report = imported.report._replace(changes=(*file.notes, *expected.changes, *imported.report.changes))
    return imported._replace(report=report, class_names=file.class_names or imported.class_names)


def _import(stage: StagePlan, class_names: tuple[str, ...]) -> Imported:
    """The weights in the file that a stage names, with its classes as those of the data, where all are taken over.

    Raises:
        UserError: they do not fit, or are of other classes.
    """
    options, model = stage.options, stage.options.model
    otherwise = (
        f"config.{stage.name}.init_strict=False takes over what does not depend on classes, in a stage that trains"
    )
    number = len(class_names) if options.init_strict else None
    try:
        imported = import_detector(model, options.weights, options.source, number, key=options.weights_key)
    except UserError as error:
        if not options.init_strict or len(class_names) == len(COCO_NAMES):
            raise
        raise UserError(
            f"{error} The data have {len(class_names)} classes; if the file has others, {otherwise}."
        ) from error
    if imported.report.untouched:
        # A backbone alone tells nothing apart.
        return imported
    known, words = imported.class_names, ""
    if known and are_imagenet(class_names) and len(known) == len(class_names) and not are_imagenet(known):
        known, words = class_names, "it names its classes in words, and the data by ids, in whose order they are taken"
    if known is None and options.init_strict:
        known, words = class_names, "it does not say what its classes are, which are taken for the data's"
    if options.init_strict and known and class_order(known, class_names) is None:
        difference = other_classes(options.weights, known, "the data", class_names)
        raise UserError(f"config.{stage.name}.weights: {difference}; {otherwise}.")
    variables, reordered = _of_classes(imported.variables, imported.model, known, class_names)
    changes = (*imported.report.changes, *filter(None, (words, reordered)))
    return imported._replace(variables=variables, report=imported.report._replace(changes=changes))


def _plain(name: str) -> str:
    """A class's name as all files write it: some have ``traffic_light``."""
    return name.lower().replace("_", " ")


def other_classes(file: str, known: Sequence[str], theirs: str, class_names: Sequence[str]) -> str:
    """How the classes of a file of weights differ from others, in words; empty if they are the same in the same order.

    Files write the same names in several ways.
    """
    spelt = {_plain(name): name for name in class_names}
    return compare_classes(file, [spelt.get(_plain(name), name) for name in known], theirs, class_names)


def class_order(known: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """Where each of the data's classes stands among those of weights; None unless both have the same names.

    >>> class_order(["bolt", "Hex_nut"], ["hex nut", "bolt"])
    [1, 0]
    """

    def ranked(names: Sequence[str]) -> list[tuple[str, str, int]]:
        return sorted((_plain(name), name, place) for place, name in enumerate(names))

    theirs, ours = ranked(known), ranked(class_names)
    if [name for name, *_ in theirs] != [name for name, *_ in ours]:
        return None
    places = {place: there for (*_, place), (*_, there) in zip(ours, theirs, strict=True)}
    return [places[place] for place in range(len(ours))]


def _of_classes(
    variables: Variables, model: Mapping[str, Any], known: Sequence[str] | None, class_names: Sequence[str]
) -> tuple[Variables, str]:
    """A model's variables with its classes in the order of the data's, and what became of them, in words.

    Without those that tell classes apart, unless they are known to be the data's: that there are as many says nothing.
    """
    order = class_order(known, class_names) if known else None
    if order is None:
        kept = without(variables, class_outputs(model))
        fewer = len(jax.tree.leaves(kept)) < len(jax.tree.leaves(variables))
        return kept, "what depends on its classes, which are not the data's, starts afresh" * fewer
    if order == sorted(order):
        return variables, ""
    return with_classes(model, variables, order), "its classes are put in the order of the data's"


_EXPECTED = {
    "backbone": ("style", "epsilon"),
    "neck": ("extra_relu",),
    "head": ("convention", "norm_on_box", "centerness_on_box", "align_corners", "dilations"),
}
"""What weights decide and no array shows, by section; besides the statistics of pixels."""


def _as_expected(model: Mapping[str, Any], origin: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """The config of a model with what the weights of another one, which it starts from, expect.

    A head that takes over only what fits goes on learning, as its own config says.
    """
    expected = {key: origin[key] for key in ("pixel_mean", "pixel_std") if key in origin}
    for section, fields in _EXPECTED.items():
        theirs = origin.get(section, {})
        decided = {key: theirs[key] for key in fields if key in theirs}
        # Not every model has every section.
        if decided and (section != "head" or (whole and origin.get("name") == model["name"])):
            expected[section] = decided
    return merged(model, expected)


def _saved(folder: Path, model: Mapping[str, Any], class_names: tuple[str, ...], strict: bool) -> tuple[Variables, str]:
    """The variables of a trained model to start from, with its classes as the data's, and what became of them.

    All of them, or those that do not depend on other classes.

    Raises:
        UserError: ``strict``, and the model tells other classes apart than the data do.
    """
    description = describe(folder)
    known = description.get("class_names")
    if strict:
        known = _known_classes(folder, known, class_names)
    return _of_classes(load_variables(folder), description.get("model", model), known, class_names)


def load_model(folder: Path, class_names: tuple[str, ...], dtype: str) -> tuple[Teacher, str]:
    """A trained model with its classes as the data's, and what became of them, in words.

    Raises:
        UserError: it cannot be loaded, or tells other classes apart than the data do.
    """
    description = describe(folder)
    known = _known_classes(folder, description.get("class_names"), class_names)
    module, variables = load_student(folder, dtype=dtype)
    variables, words = _of_classes(variables, description["model"], known, class_names)
    return Teacher(module, variables), words


def _known_classes(folder: Path, known: Sequence[str] | None, class_names: tuple[str, ...]) -> Sequence[str]:
    """The classes of a model's folder, those of the data where it does not say; refuses others than the data's."""
    if known is None:
        return class_names
    if class_order(known, class_names) is None:
        difference = compare_classes(f"the model in {folder}", known, "the data", class_names)
        raise UserError(f"{difference}; both must have the same classes.")
    return known
