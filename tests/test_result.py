"""A stage is finished if all that it left is as it was written; of other folders nothing is guessed."""

import json
import math
import types

import jax.numpy as jnp
import pytest

from kdjax.errors import DataError
from kdjax.files import write_json
from kdjax.run.record import check_claim, environment, kept_predictions
from kdjax.run.result import finished_result, write_result
from kdjax.saved import describe_model, save_method, save_model

STAGE = types.SimpleNamespace(name="student", steps=4)
RESULT = {
    "metrics": {"AP": 41.5, "AP_large": math.nan, "per_class": {"cat": 41.5}},
    "teacher": None,
    "steps": 4,
    "images_per_second": 10.5,
    "parameters": 6,
}
FILES = ("result.json", "predictions.json", "model/model.json", "method/method.json")


def finished_stage(folder):
    """What a finished stage leaves, without checkpoints."""
    save_model(folder / "model", {"params": {"a": jnp.arange(6.0)}}, describe_model({"name": "x"}, ["cat"], (64, 64)))
    save_method(folder / "method", {"b": jnp.ones(2)}, {"name": "mgd"})
    write_json(folder / "predictions.json", [{"scores": [0.5]}])
    write_result(folder, RESULT)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A finished stage's, with a checkpoint."""
    (tmp_path / "student" / "checkpoints" / "4").mkdir(parents=True)
    return finished_stage(tmp_path / "student")


def found(folder):
    return finished_result(STAGE, folder, "AP")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(file, data: bytes, how: str) -> None:
    """Puts damaged data in the place of a file."""
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "flipped":  # A digit, which leaves JSON as sound as it was.
        at = next(k for k, byte in enumerate(data) if chr(byte).isdigit())
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif how != "gone":
        others = {"empty": b"", "cut": data[: len(data) // 2], "bytes": b"\xff", "list": b"[1]", "deep": b"[" * 10**5}
        file.write_bytes(others[how])


def test_what_was_written_is_found_with_its_nans(folder):
    result = found(folder)
    assert math.isnan(result["metrics"].pop("AP_large"))
    assert result == {**RESULT, "metrics": {"AP": 41.5, "per_class": {"cat": 41.5}}}
    (folder / "result.json").unlink()
    assert found(folder) is None


HOWS = ("flipped", "empty", "cut", "bytes", "list", "deep", "folder", "gone")
CASES = [(name, how) for name in FILES for how in HOWS if (name, how) != ("result.json", "gone")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_what_is_damaged_is_said_and_set_aside_and_the_stage_is_finished_again(name, how, folder, capsys):
    data = (folder / name).read_bytes()
    put(folder / name, data, how)
    assert found(folder) is None
    said = capsys.readouterr().out
    assert said.startswith("[student] is finished, but damaged: ")
    assert str(folder / name) in said
    aside = name.partition("/")[0]
    assert (folder / f"{aside}.corrupt").exists() == (how != "gone" or aside != name)
    left = {"predictions.json", "model", "method"} - {aside}
    assert {path.name for path in folder.iterdir() if path.suffix != ".corrupt"} == {"checkpoints", *left}


def test_arrays_that_are_not_those_that_were_saved_are_found(folder, capsys):
    """Orbax reads other numbers without a word."""
    save_model(
        folder / "other", {"params": {"a": jnp.arange(6.0) + 1}}, {"model": {}, "class_names": [], "image_size": []}
    )
    described = (folder / "model" / "model.json").read_bytes()
    for path in (folder / "model", folder / "other"):
        (path / "model.json").unlink()
    (folder / "model").rename(folder / "first")
    (folder / "other").rename(folder / "model")
    (folder / "model" / "model.json").write_bytes(described)
    assert found(folder) is None
    assert "[student] is finished, but damaged: The arrays in " in capsys.readouterr().out
    assert (folder / "model.corrupt" / "model.json").exists()


@pytest.mark.parametrize("name", ["result.json", "model/model.json"])
def test_without_a_checkpoint_nothing_is_written_and_the_stage_is_refused(name, folder):
    (folder / "checkpoints" / "4").rmdir()
    (folder / name).write_text("{")
    before = files(folder)
    with pytest.raises(DataError, match=r"is damaged.* There is no checkpoint to finish it from again: .* or delete"):
        found(folder)
    assert files(folder) == before


def test_pictures_alone_are_no_reason_to_refuse_a_stage(folder, capsys):
    (folder / "checkpoints" / "4").rmdir()
    (folder / "predictions.json").write_text("{")
    assert found(folder)["steps"] == 4
    assert kept_predictions(folder) == []
    assert "[student] is not drawn: " in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["metrics", "teacher", "steps", "parameters", "images_per_second", "AP"])
def test_a_result_without_a_digest_as_earlier_versions_wrote_it_is_held_against_what_it_must_have(lost, folder):
    result = json.loads((folder / "result.json").read_text())
    del result["sha256"], result["files"]
    write_json(folder / "result.json", result)
    assert found(folder)["steps"] == 4
    (result["metrics"] if lost == "AP" else result).pop(lost)
    write_json(folder / "result.json", result)
    assert found(folder) is None


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_a_stage_of_which_is_not_known_whose_it_is_is_refused(state, how, folder):
    if state == "begun":
        (folder / "result.json").unlink()
    known = {"seed": 0, "data": {"train": "1"}, "stage": {"methods": {}, "optimizer": {}}, "from": {}}
    write_json(folder / "config.json", {"kdjax": "0.2.0", **known})
    data = (folder / "config.json").read_bytes()
    put(folder / "config.json", data.replace(b"0.2.0", b"1.2.0"), how)
    before = files(folder)
    words = "holds a run of another config" if how == "flipped" else "put an undamaged one in its place, or delete its"
    with pytest.raises(ValueError, match=words):
        check_claim(folder, {**known, "seed": 1})
    assert files(folder) == before


@pytest.mark.parametrize("section", ["stage", "from", "data"])
def test_an_identity_of_other_types_is_damaged(section, folder):
    known = {"seed": 0, "data": {}, "stage": {"methods": {}, "optimizer": {}}, "from": {}}
    write_json(folder / "config.json", {"kdjax": "0.2.0", **known, section: [1]})
    with pytest.raises(DataError, match=r"config.json is damaged \(.*\); put an undamaged one in its place"):
        check_claim(folder, known)


def test_other_packages_are_named_where_a_stage_goes_on_and_are_no_other_config(folder, capsys):
    (folder / "result.json").unlink()
    then = environment() | {"jax": "0.0.1", "devices": 1}
    write_json(folder / "config.json", {"kdjax": "0.2.0", "environment": then, "seed": 0})
    check_claim(folder, {"seed": 0})
    now = environment()
    assert f"devices: 1 -> {now['devices']}; jax: '0.0.1' -> '{now['jax']}'" in capsys.readouterr().out
    write_json(folder / "config.json", {"kdjax": "0.2.0", "environment": now, "seed": 0})
    check_claim(folder, {"seed": 0})
    # One of before they were recorded.
    write_json(folder / "config.json", {"kdjax": "0.2.0", "seed": 0})
    check_claim(folder, {"seed": 0})
    assert capsys.readouterr().out == ""
