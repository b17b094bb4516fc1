"""Every COCO variant that a paper reports, resolved, is what the authors' files say, key by key."""

import pytest

from kdjax.models import build_model, complete
from kdjax.models.reppoints_head import INITIAL_WEIGHT
from kdjax.pairs import PAIRS
from kdjax.papers import METHODS, REPORTS, methods_of, table
from tests.authors import AUTHORS, NOT_SHIPPED
from tests.test_config import CONFIGS, load

FILES = {path.stem: path for path in CONFIGS}
REPORTED = {(method, pair.removeprefix("icd ")): settings for (method, pair), settings in AUTHORS.items()}


def resolved(config, key):
    """The value of a key, with the models' defaults, and () for all levels written out."""
    stage, *rest = key.split(".")
    if rest[:1] == ["model"]:
        value = complete(config[stage].model.to_dict())
        rest = rest[1:]
    else:
        value = config[stage]
    for part in rest:
        value = value[part]
    if rest[-1:] == ["levels"] and value == ():
        return tuple(build_model(config.student.model.to_dict(), num_classes=1).strides)
    return value


@pytest.mark.parametrize("name", REPORTED, ids=":".join)
def test_a_reported_variant_has_the_authors_values(name):
    method, pair = name
    config = load(FILES[method], pair)
    for key, (value, source) in REPORTED[name].items():
        # Keys without a dot are facts that no single option states.
        if "." in key:
            found = resolved(config, key)
            if key == "teacher.weights":
                # Where it is downloaded from tells a file of AdelaiDet by no name.
                value = found if value.endswith("/download") else value.rpartition("/")[2]
            assert found == (pytest.approx(value) if isinstance(value, int | float | tuple) else value), (key, source)


def facts(settings, *keys):
    return tuple(settings[key][0] if key in settings else None for key in keys)


@pytest.mark.parametrize("name", REPORTED, ids=":".join)
def test_what_is_reported_is_what_the_authors_state(name):
    settings = REPORTED[name]
    for report in REPORTS[name]:
        kind = "mask_" if report.of == "masks" else ""
        expected = facts(settings, "teacher.published", f"baseline_{kind}ap", f"distilled_{kind}ap")
        assert (report.teacher, report.alone, report.distilled) == expected


@pytest.mark.parametrize("name", REPORTED, ids=":".join)
def test_facts_without_an_option_of_their_name_are_kept_too(name):
    """Batch norm's affine, boxes' classes, the imitated boxes: each where kdjax has it."""
    method, pair = name
    config, settings = load(FILES[method], pair), REPORTED[name]
    student = config.student
    if affine := facts(settings, "batch_norm_affine")[0]:
        assert ("student/backbone/*bn*" in student.freeze) == (affine == "frozen")
    if "reg_class_agnostic" in settings:
        assert resolved(config, "student.model.head.class_agnostic") == settings["reg_class_agnostic"][0]
    if method == "maskd":
        kind = facts(settings, "box_imitation_kind")[0]
        assert (student.methods.box_imitation.loss if "box_imitation" in student.methods else None) == kind
    if initial := facts(settings, "box_imitation_weight_initial")[0]:
        assert student.loss_weights.box_imitation * INITIAL_WEIGHT == pytest.approx(initial)


def test_each_report_is_of_a_pair_and_stands_in_the_table():
    assert REPORTS.keys() == REPORTED.keys()
    assert {pair for _, pair in REPORTS} <= PAIRS.keys()
    assert all(method in methods_of(pair) for method, pair in REPORTS)
    assert NOT_SHIPPED.keys() <= set(METHODS)
    text = "\n".join(table())
    assert all(f"`{method}:{pair}`" in text for method, pair in REPORTS)


def test_the_page_is_the_table():
    page = CONFIGS[0].parents[1] / "docs" / "papers.md"
    assert page.read_text() == "\n".join(table()) + "\n", "python -m kdjax.papers > docs/papers.md"
