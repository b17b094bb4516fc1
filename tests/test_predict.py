"""A saved model asked about photographs, by one function and by one command: what it says is what it was judged by."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import kdjax
from kdjax import cli, main, predict
from kdjax.data.examples import Example
from kdjax.data.sizing import Reading, Sizing
from kdjax.errors import DataError, Exit, UsageError, UserError
from kdjax.evaluation import evaluate
from kdjax.models import build_model, model_class
from kdjax.saved import FORMAT, describe, describe_model, reading_of, save_model
from kdjax.tasks import Classification, Detection, Segmentation
from kdjax.tasks.found_objects import ObjectResults
from kdjax.types import Detections
from tests.pages import blocks, read
from tests.sources import OfExamples

ROOT = Path(__file__).parents[1]
NAMES = ("кот", "dog", "鸟", "بطة")
"""Of scripts that Pillow's font has, and has not."""
SIZING = Sizing(((64, 96), (96, 64)))


def saved(folder: Path, name: str, sizing: Sizing = SIZING, **options) -> Path:
    """A model folder of a tiny model that says something of noise, different for each image."""
    config = {"name": name, **model_class(name).tiny}
    module = build_model(config, len(NAMES))
    variables = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 64, 64, 3)))
    flat = flatten_dict(variables, sep="/")
    # As they are initialised, detectors find nothing, and classes differ by nothing.
    flat |= {path: 0 * x for path, x in flat.items() if path.endswith("cls_logits/bias")}
    flat |= {path: 60 * x for path, x in flat.items() if path.endswith("cls_logits/kernel")}
    arrays = unflatten_dict(flat, sep="/")
    save_model(folder, arrays, describe_model(config, NAMES, sizing, (3, 5, 8, 9), **options))
    return folder


@pytest.fixture(scope="module")
def photographs():
    rng = np.random.default_rng(0)
    sizes = [(80, 60), (40, 90), (64, 96), (30, 20), (128, 100), (50, 50), (61, 33), (33, 61), (90, 90), (20, 70)]
    coarse = [rng.integers(0, 256, (-(-h // 10), -(-w // 10), 3), dtype=np.uint8) for h, w in sizes]
    return [np.kron(x, np.ones((10, 10, 1), np.uint8))[:h, :w] for x, (h, w) in zip(coarse, sizes, strict=True)]


@pytest.fixture(scope="module")
def images(photographs, tmp_path_factory):
    """The same in files, one of them in a folder below."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "more").mkdir()
    for k, photograph in enumerate(photographs):
        Image.fromarray(photograph).save(root / f"{'more/' * (k == 9)}{k}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    square = Sizing(((64, 64),))
    return {
        "detection": saved(root / "detector", "retinanet", task="detection"),
        "segmentation": saved(root / "segmenter", "deeplabv3_mobilenet_v2", square),
        "classification": saved(root / "classifier", "resnet_classifier", square._replace(centre_crop=True)),
    }


@pytest.fixture(scope="module")
def predictors(folders):
    return {task: kdjax.load_predictor(folder) for task, folder in folders.items()}


class Listed(list, OfExamples):
    class_names, category_ids = NAMES, (3, 5, 8, 9)


@pytest.fixture(scope="module")
def judged(folders, photographs):
    """The photographs with some objects, what the detector finds in them in an evaluation, and its metrics."""
    boxes, labels, none = np.array([[5, 5, 25, 18], [0, 2, 15, 19]], np.float32), np.array([1, 0]), np.zeros(2, bool)
    area = np.array([260, 255], np.float32)
    source = Listed(Example(image, 10 + k, boxes, labels, none, area) for k, image in enumerate(photographs))
    predictor = kdjax.load_predictor(folders["detection"], threshold=0)
    metrics, judge = evaluate(
        predictor._predict, predictor._variables, source, Detection(), batch_size=8, image_size=SIZING
    )
    return predictor, source, {found.position: found for found in judge.images(judge.state())}, metrics


def test_what_is_predicted_is_what_was_evaluated_to_the_bit(judged, photographs, images):
    predictor, _, expected, _ = judged
    in_files = [images / f"{'more/' * (k == 9)}{k}.png" for k in range(len(photographs))]
    for given in (photographs, in_files):
        results = predictor(given)
        assert len(results) == len(photographs)
        for k, result in enumerate(results):
            for field in ("boxes", "scores", "labels"):
                np.testing.assert_array_equal(getattr(result, field), getattr(expected[k], field))
            assert result.names == tuple(NAMES[label] for label in result.labels.tolist())
    assert sum(len(result.scores) for result in results) > 50
    assert predictor([]) == []


@pytest.mark.parametrize("page", ["docs/predict.md", "docs/quickstart.md"])
def test_the_pages_example_runs(page, folders, photographs, capsys):
    (block,) = (block for block in blocks(read(page), "python") if block.text.startswith("import kdjax\n"))
    written = block.text.replace("runs/first/student", str(folders["detection"]))
    exec(compile(written, page, "exec"), {"photographs": photographs[:3]})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_a_threshold_is_the_callers_or_the_folders_or_the_tasks(judged, folders, photographs, tmp_path):
    predictor, _, expected, _ = judged
    scores = np.sort(np.concatenate([found.scores for found in expected.values()]))
    high = float(scores[-5])
    folder = shutil.copytree(folders["detection"], tmp_path / "model")
    described = json.loads((folder / "model.json").read_text())
    assert kdjax.load_predictor(folder).results.threshold == 0.3
    (folder / "model.json").write_text(json.dumps(described | {"threshold": high}))
    assert kdjax.load_predictor(folder).results.threshold == high
    assert kdjax.load_predictor(folder, threshold=0.5).results.threshold == 0.5
    results = ObjectResults(NAMES, (3, 5, 8, 9), high)
    found = list(type(predictor)(**vars(predictor) | {"results": results})(photographs))
    assert sum(len(result.scores) for result in found) == np.count_nonzero(scores >= high)


def test_masks_are_in_pixels_of_the_photograph():
    grid = np.zeros((1, 2, 4, 4), np.float32)
    grid[0, 0, :, :2] = 1
    boxes = np.array([[[8, 4, 24, 12], [0, 0, 8, 8]]], np.float32)
    output = Detections(boxes, np.array([[0.9, 0.2]], np.float32), np.array([[2, 0]]), np.ones((1, 2), bool), grid)
    results = ObjectResults(NAMES, (3, 5, 8, 9))
    found = results.of(output, 0, (16, 32), (32, 64))
    np.testing.assert_array_equal(found.boxes, [[16, 8, 48, 24]])
    assert found.names == ("鸟",)
    (mask,) = found.masks
    assert mask["size"] == [32, 64]
    (mark,) = results.drawn(np.zeros((32, 64, 3), np.uint8), found).marks
    rows, columns = np.nonzero(coco_mask.decode(mark.mask))
    assert (rows.min(), rows.max(), columns.min()) == (8, 23, 16)
    assert 30 <= columns.max() <= 33


def test_a_classifier_says_the_most_probable_classes(predictors, photographs):
    results = predictors["classification"](photographs)
    for result in results:
        assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
        assert result.scores.sum() == pytest.approx(1, abs=1e-5)
        assert result.names == tuple(NAMES[label] for label in result.labels.tolist())


def test_a_segmenter_says_the_class_of_every_pixel(predictors, photographs):
    for photograph, result in zip(photographs, predictors["segmentation"](photographs), strict=True):
        assert result.classes.shape == photograph.shape[:2]
        assert result.classes.dtype == np.uint8
        assert result.names == {label: NAMES[label] for label in np.unique(result.classes).tolist()}


def test_detections_in_a_file_are_judged_by_pycocotools_as_in_an_evaluation(judged, folders, images, tmp_path):
    _, source, _, metrics = judged
    names = [f"{'more/' * (k == 9)}{k}.png" for k in range(10)]
    truth = {
        "images": [
            {"id": 10 + k, "file_name": Path(name).name, "height": h, "width": w}
            for k, (name, (h, w)) in enumerate(zip(names, (e.image.shape[:2] for e in source), strict=True))
        ],
        "categories": [{"id": number, "name": name} for number, name in zip((3, 5, 8, 9), NAMES, strict=True)],
        "annotations": [
            {
                "id": 1 + 2 * k + j,
                "image_id": 10 + k,
                "category_id": (3, 5)[label],
                "area": area,
                "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            for k, e in enumerate(source)
            for j, ((x1, y1, x2, y2), label, area) in enumerate(
                zip(e.boxes.tolist(), e.labels.tolist(), e.area.tolist(), strict=True)
            )
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    said = predict.predict(
        str(folders["detection"]),
        str(images),
        str(tmp_path / "out"),
        threshold=0.0,
        annotations=str(tmp_path / "truth.json"),
        batch_size=8,
        most_drawn=2,
    )
    assert "10 photographs" in said
    assert "the first 2 of them drawn (--pictures=10 draws all)" in said
    (block,) = (block for block in blocks(read("docs/predict.md"), "python") if "COCOeval" in block.text)
    named = {"instances_val2017.json": "truth.json", "found/detections.json": "out/detections.json"}
    written = functools.reduce(lambda code, name: code.replace(name, str(tmp_path / named[name])), named, block.text)
    names: dict = {"COCO": COCO, "COCOeval": COCOeval}
    exec(compile(written, "predict.md", "exec"), names)
    judge = names["judge"]
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert 100 * judge.stats[0] == pytest.approx(metrics["AP"], rel=1e-9)
    assert metrics["AP"] > 0
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.jpg")}
    assert drawn == {"drawn/0.jpg", "drawn/1.jpg"}


def test_without_annotations_images_json_says_what_the_ids_mean(folders, images, tmp_path):
    predict.predict(str(folders["detection"]), str(images / "*.png"), str(tmp_path / "out"), most_drawn=0)
    known = COCO(str(tmp_path / "out" / "images.json"))
    assert known.imgs[1] == {"id": 1, "file_name": "0.png", "height": 80, "width": 60}
    assert len(known.imgs) == 9
    assert known.cats[8] == {"id": 8, "name": "鸟"}
    found = known.loadRes(str(tmp_path / "out" / "detections.json"))
    assert all(annotation["score"] >= 0.3 for annotation in found.anns.values())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_other_tasks_write_their_own_files_and_draw(task, predictors, folders, images, photographs, tmp_path):
    predict.predict(str(folders[task]), str(images), str(tmp_path), batch_size=8)
    expected = predictors[task](photographs)
    assert sorted(path.name for path in (tmp_path / "drawn").rglob("*.jpg")) == [f"{k}.jpg" for k in range(10)]
    classes = json.loads((tmp_path / "classes.json").read_text())
    if task == "classification":
        by_name = {entry["file_name"]: entry["classes"] for entry in classes}
        assert by_name["more/9.png"][0]["name"] == expected[9].names[0]
        assert by_name["3.png"][0]["score"] == expected[3].scores[0]
        return
    assert classes == {str(label): name for label, name in enumerate(NAMES)}
    with Image.open(tmp_path / "maps" / "more" / "9.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(picture, expected[9].classes)


def test_photographs_that_cannot_be_read_are_named_and_the_others_are_done(folders, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "photographs")
    (root / "5.png").write_bytes(b"")
    broken = bytearray((root / "7.png").read_bytes())
    broken[60:90] = bytes(30)
    (root / "7.png").write_bytes(broken)
    with pytest.raises(
        DataError, match=r"^2 of 10 photographs are left out: 5\.png \(is empty\), 7\.png \(cannot be dec"
    ):
        predict.predict(str(folders["classification"]), str(root), str(tmp_path / "out"), batch_size=8)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert {entry["file_name"] for entry in classes} == {*(f"{k}.png" for k in (0, 1, 2, 3, 4, 6, 8)), "more/9.png"}
    with pytest.raises(DataError, match=r"^.*7\.png cannot be decoded"):
        kdjax.load_predictor(folders["classification"])([root / "7.png"])


def test_what_does_not_fit_is_one_sentence(folders, images, tmp_path):
    model, out = str(folders["detection"]), str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "categories": [{"id": 3, "name": "horse"}]}))
    (tmp_path / "b.json").write_text(json.dumps({"images": [], "categories": []}))
    for error, words, arguments, options in (
        (UsageError, "is a file; name a folder", (model, str(images), str(tmp_path / "file")), {}),
        (UsageError, "is a folder without image files", (model, str(tmp_path / "empty"), out), {}),
        (UsageError, r"no pattern of any file", (model, str(tmp_path / "*.png"), out), {}),
        (UsageError, "is inside of --input", (model, str(images), str(images / "out")), {}),
        (
            UsageError,
            r"threshold is 1\.5; it must be a number of at least 0 and at most 1",
            (model, str(images), out),
            {"threshold": 1.5},
        ),
        (UsageError, "threshold is nan", (model, str(images), out), {"threshold": float("nan")}),
        (UsageError, "batch_size is 3; it must be a multiple of 8", (model, str(images), out), {"batch_size": 3}),
        (
            UsageError,
            r"threshold is 0\.5, which is for detectors",
            (str(folders["segmentation"]), str(images), out),
            {"threshold": 0.5},
        ),
        (DataError, "holds no kdjax model", (str(tmp_path), str(images), out), {}),
        (
            DataError,
            "calls category 3 'horse', the model 'кот'",
            (model, str(images), out),
            {"annotations": str(tmp_path / "a.json")},
        ),
        (
            DataError,
            "lacks 10 of 10 photographs: 0.png",
            (model, str(images), out),
            {"annotations": str(tmp_path / "b.json")},
        ),
        (
            DataError,
            "is no file of COCO's annotations",
            (model, str(images), out),
            {"annotations": str(folders["detection"] / "model.json")},
        ),
    ):
        with pytest.raises(error, match=words):
            predict.predict(*arguments, **options)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1, "kdjax": "9.1"}, r"written by kdjax 9\.1, in format \d+, .*install a newer one"),
        ({"format": "new"}, "format is 'new', and must be a whole number"),
        ({"task": 3}, "task is 3, and must be a text"),
        ({"threshold": 30}, "threshold is 30, and must be a number of at least 0 and at most 1"),
        ({"task": "pose"}, "There is no task 'pose'"),
        ({"reading": {"upright": True, "colour": 3}}, "does not say how image files are read"),
        ({"reading": {"value_range": "all"}}, "does not say how image files are read"),
        ({"sizing": {"image_size": [[64, 64]], "resize": "mine"}}, "does not say how its images were scaled"),
        ({"sizing": {"image_size": [[64, "wide"]]}}, "does not say how its images were scaled"),
    ],
)
def test_a_folder_that_is_damaged_or_newer_is_refused_in_words(change, words, folders, tmp_path):
    folder = shutil.copytree(folders["classification"], tmp_path / "model")
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | change))
    with pytest.raises(UserError, match=words):
        kdjax.load_predictor(folder)


def test_model_json_says_what_a_stranger_needs_and_old_ones_that_do_not_are_read(folders, tmp_path):
    reading = Reading(True, (0, 4095), 1000)
    described = describe_model({}, NAMES, SIZING, task="detection", reading=reading, dtype="bfloat16")
    assert described["format"] == FORMAT
    assert described["task"] == "detection"
    assert described["dtype"] == "bfloat16"
    (tmp_path / "model.json").write_text(json.dumps({**described, "sha256": ""}))
    assert reading_of(tmp_path) == reading
    folder = shutil.copytree(folders["classification"], tmp_path / "model")
    known = describe(folder)
    old = {key: x for key, x in known.items() if key not in ("format", "task", "reading", "dtype")}
    (folder / "model.json").write_text(json.dumps(old))
    predictor = kdjax.load_predictor(folder)
    assert predictor.reading == Reading()
    assert type(predictor.results).__name__ == "ClassResults"


def test_a_task_without_results_is_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders["classification"], tmp_path / "model")
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | {"task": "tests.classification:Patterns"}))
    with pytest.raises(UserError, match=r"tests\.classification:Patterns does not say what its models' outputs mean"):
        kdjax.load_predictor(folder)


def test_the_tasks_take_what_the_contract_gives():
    for task in (Detection(), Segmentation(), Classification()):
        assert task.results(NAMES, (1, 2, 3, 4), None)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kdjax.cli", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_answers_without_importing_a_program(capsys):
    assert cli.main(["kdjax", "--help"]) == 0
    assert "evaluate   measure a saved model on any split" in capsys.readouterr().out
    for arguments, words in (
        ([], "usage: kdjax <program>"),
        (["trian"], "'trian' is no program of kdjax; perhaps train is meant."),
        (["--model=x"], "there are train, evaluate, predict, export"),
    ):
        assert cli.main(["kdjax", *arguments]) == Exit.USAGE
        assert words in capsys.readouterr().err
    program = "import sys; from kdjax import cli; cli.main(['kdjax', 'x']); print({'jax', 'absl'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_every_program_of_the_command_is_there():
    assert all(importlib.util.find_spec(module) for module, _ in cli.PROGRAMS.values())


@pytest.mark.slow
def test_the_command_is_the_program_by_its_own_flags(folders, images, tmp_path):
    flags = f"--model={folders['classification']}", f"--input={images / '0.png'}", f"--output={tmp_path}"
    done = run("predict", *flags)
    assert done.returncode == 0, done.stderr
    assert "1 photographs" in done.stdout
    assert len(json.loads((tmp_path / "classes.json").read_text())) == 1
    done = run("inspect", "--model=x")
    assert done.returncode == Exit.USAGE
    assert done.stderr.splitlines() == [
        "kdjax: --config is missing; name a config, such as --config=mgd, or the path of a config file."
    ]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config=mgd", "kdjax: --config is no flag of this program"),
        ("--config.data.name=shapes", "kdjax: --config.data.name is no flag of this program"),
        ("stray", "kdjax: 'stray' is no flag; every option is --flag=value."),
        ("--outptu=x", "kdjax: Unknown command line flag 'outptu'. Did you mean: output ?"),
        ("--pictures=many", "kdjax: flag --pictures=many: invalid literal"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argument, words, capsys):
    with pytest.raises(SystemExit) as end:
        main.parse_flags(["predict", "--model=x", argument])
    assert end.value.code == Exit.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


def test_a_missing_flag_is_said(monkeypatch, capsys):
    monkeypatch.setattr(predict, "_MODEL", types.SimpleNamespace(name="model", value=""))
    assert predict.main([]) == Exit.USAGE
    assert capsys.readouterr().err == "kdjax: --model is missing; it names the folder of a model.\n"
