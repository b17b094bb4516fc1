"""Options that declare themselves: the default, the rule and the words of a key stand at the field that it fills.

A field of a dataclass (a Flax module is one) is an option of configs where its annotation says so::

    mask_ratio: Annotated[float, number(0, 1), "Probability of hiding a position."] = 0.65

From it come the defaults of configs, the checks, the hint for a misspelt key and the table of all keys.
"""

import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from kdjax.errors import UserError

SCHEDULES = ("step", "cosine", "poly", "constant")
"""Of the learning rate, see :func:`kdjax.optim.make_schedule`."""

OPTIMIZERS = ("sgd", "adam", "adamw")
"""See :func:`kdjax.optim.make_optimizer`."""

WITHOUT_EFFECT = "without effect"
"""Mark of an option, behind its words, that changes nothing that is computed."""

T = TypeVar("T")


class Rule(NamedTuple):
    """What a key may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


class Option(NamedTuple):
    """A key of a config."""

    default: Any
    rule: Rule
    meaning: str
    effect: bool = True
    """Whether it changes what is computed: a run is resumed with other values of what does not."""


def whole(low: int) -> Rule:
    """A whole number, not below ``low``."""
    return Rule(f"a whole number of at least {low}", lambda value: type(value) is int and value >= low)


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number from ``low`` to ``high``; ``above`` and ``below`` leave out the ends."""
    words = f"a number above {low:g}" if above else f"a number of at least {low:g}"
    if math.isfinite(high):
        words += f" and below {high:g}" if below else f" and at most {high:g}"

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    return Rule(words, holds)


def choice(*choices: str) -> Rule:
    """One of some texts."""
    return Rule(f"one of {', '.join(x or repr(x) for x in choices)}", lambda value: value in choices)


def tuple_of(kind: type, words: str) -> Rule:
    """A tuple of any length."""
    return Rule(f"a tuple of {words}", lambda value: isinstance(value, tuple) and all(type(x) is kind for x in value))


FLAG = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))
RATIOS = Rule(
    "a tuple of numbers above 0",
    lambda value: isinstance(value, tuple) and value != () and all(map(number(0, above=True).holds, value)),
)


def _of_colours(rule: Rule) -> Rule:
    words = rule.words.replace("a number", "three numbers")
    return Rule(words, lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(rule.holds, value)))


COLOUR = _of_colours(Rule("a number, of red, green and blue", number(-math.inf).holds))
SPREAD = _of_colours(Rule("a number above 0, of red, green and blue", number(0, above=True).holds))


def declared(cls: Any) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name.

    >>> from typing import Annotated
    >>> @dataclasses.dataclass
    ... class Mask:
    ...     ratio: Annotated[float, number(0, 1), "Share of the positions to hide."] = 0.65
    ...     axis_name: str | None = None
    >>> declared(Mask)["ratio"].rule.words
    'a number of at least 0 and at most 1'
    >>> list(declared(Mask))
    ['ratio']
    """
    if cls not in _DECLARED:
        options = _DECLARED[cls] = {}
        for field in dataclasses.fields(cls):
            match getattr(field.type, "__metadata__", ()):
                case (Rule() as rule, str(meaning), *marks):
                    options[field.name] = Option(field.default, rule, meaning, WITHOUT_EFFECT not in marks)
    return _DECLARED[cls]


_DECLARED: dict[Any, dict[str, Option]] = {}
"""Of every class that was asked for: modules are made, and checked, at every trace."""


def defaults(cls: type) -> dict[str, Any]:
    """The options of a dataclass at their defaults."""
    return {name: option.default for name, option in declared(cls).items()}


def check(options: Mapping[str, Option], section: Mapping[str, Any], path: str) -> None:
    """Holds a section of a config against its options.

    Args:
        options: by name.
        section: name to value.
        path: of the section, ``config.student.optimizer``, for sentences.

    Raises:
        UserError: an unknown key, or a value that breaks its rule.
    """
    for name, value in section.items():
        if name not in options:
            raise UserError(f"{path}.{name} is not a key that kdjax knows; {hint(name, options, path)}.")
        if not options[name].rule.holds(value):
            raise UserError(f"{path}.{name} is {value!r}; it must be {options[name].rule.words}.")


def check_fields(instance: Any) -> None:
    """Holds the options of a dataclass, a module for one, against their rules.

    Raises:
        UserError: one breaks its rule.
    """
    for name, option in declared(type(instance)).items():
        if not option.rule.holds(value := getattr(instance, name)):
            raise UserError(f"{type(instance).__name__}'s {name} is {value!r}; it must be {option.rule.words}.")


def parse(cls: type[T], section: Mapping[str, Any], path: str) -> T:
    """A section of a config as the dataclass that declares its keys; keys that are absent have their defaults.

    Raises:
        UserError: as :func:`check`.
    """
    check(declared(cls), section, path)
    return cls(**section)


def hint(key: str, known: Iterable[str], prefix: str = "config") -> str:
    """What an unknown key may have meant: one of the same last part or its initials, one spelt alike, or what there is.

    >>> known = ["eval_batch_size", "student.batch_size", "student.optimizer.learning_rate", "teacher.batch_size"]
    >>> hint("student.lr", known)
    'perhaps config.student.optimizer.learning_rate is meant'
    >>> hint("batch_size", known)
    'perhaps config.student.batch_size or config.teacher.batch_size is meant'
    >>> hint("evalbatchsize", known)
    'perhaps config.eval_batch_size is meant'
    >>> hint("student.x", known)
    'config.student has batch_size, optimizer'

    Args:
        key: dotted path below ``prefix``.
        known: dotted paths below ``prefix``.
        prefix: what all of them stand below.
    """
    known = list(known)
    section, _, last = key.rpartition(".")
    while section and not any(path.startswith(section + ".") for path in known):
        section = section.rpartition(".")[0]
    inside = [path for path in known if not section or path.startswith(section + ".")]

    def last_part(path: str) -> str:
        return path.rpartition(".")[2]

    def initials(path: str) -> str:
        return "".join(part[:1] for part in last_part(path).split("_"))

    named = [path for path in inside if last_part(path) == last]
    named = named or [path for path in inside if len(last) > 1 and initials(path) == last]
    near = named or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not near:
        alike = difflib.get_close_matches(last, {last_part(path) for path in inside}, n=1, cutoff=0.7)
        near = [path for path in inside if alike and last_part(path) == alike[0]]
    if near:
        # The student's keys are those that people set most.
        near = sorted(near, key=lambda path: not path.startswith("student."))
        return f"perhaps {' or '.join(f'{prefix}.{path}' for path in near[:3])} is meant"
    start = section + "." if section else ""
    keys = dict.fromkeys(path.removeprefix(start).split(".")[0] for path in inside)
    return f"{prefix}{'.' if section else ''}{section} has {', '.join(keys)}"


def imported(name: str, what: str) -> Any:
    """What ``package.module:Name`` names, from somebody else's package.

    >>> imported("collections:OrderedDict", "method").__name__
    'OrderedDict'

    Args:
        name: the module and what to take from it.
        what: is looked for, in words, for sentences.

    Raises:
        UserError: there is no such module, or it has no such name. What the module raises itself keeps its traceback.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(f"{name!r} names no {what}; one of yours is named package.module:Name.")
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not (module + ".").startswith(error.name + "."):
            raise
        raise UserError(f"{name!r} names no {what}: there is no module {error.name}.") from error
    if not hasattr(found, attribute):
        raise UserError(f"{name!r} names no {what}: the module {module} has no {attribute!r}.")
    return getattr(found, attribute)


def chosen(name: str, choices: Mapping[str, T], what: str) -> T:
    """The entry of a registry, or what ``package.module:Name`` names.

    >>> chosen("b", {"a": 1, "b": 2}, "number")
    2
    >>> chosen("c", {"a": 1, "b": 2}, "number")
    Traceback (most recent call last):
    kdjax.errors.UserError: There is no number 'c'; choose one of a, b, or name one of yours as package.module:Name.

    Raises:
        UserError: there is no such entry.
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    if isinstance(name, str) and ":" in name:
        return imported(name, what)
    raise UserError(
        f"There is no {what} {name!r}; choose one of {', '.join(choices)}, or name one of yours as package.module:Name."
    )
