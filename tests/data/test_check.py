"""What reports say, and how classes are compared; what is found in files is tested beside those who read them."""

import json

import pytest

from kdjax.data.check import compare_classes
from kdjax.data.flaws import Checks, DataReport, Flaw
from kdjax.errors import UserError
from tests.data.folders import content, write
from tests.data.test_coco import opened

LEFT_OUT = Flaw("boxes of gold", "annotation", "left out", "they must be of wood")
REPAIRED = Flaw("boxes of lead", "annotation", "repaired")
LENIENT = Flaw("boxes of tin", "annotation", "refused unless lenient", "be lenient")
REFUSED = Flaw("boxes of glass", "annotation", "refused")


@pytest.mark.parametrize(
    ("checks", "tolerated"),
    [
        (Checks(), {LEFT_OUT, REPAIRED}),
        (Checks(lenient=True), {LEFT_OUT, REPAIRED, LENIENT}),
        (Checks(strict=True), set()),
        (Checks(strict=True, lenient=True), set()),
    ],
)
def test_each_flaw_has_its_outcome(checks, tolerated):
    for flaw in (LEFT_OUT, REPAIRED, LENIENT, REFUSED):
        report = DataReport("a.json", checks)
        report.settle(flaw, [], str)
        assert not report.flaws
        if flaw in tolerated:
            report.settle(flaw, [4, 9], str)
            assert report.flaws == {flaw: [4, 9]}
            assert report.outcome(flaw) == ("repaired" if flaw is REPAIRED else "left out")
        else:
            with pytest.raises(UserError, match=f"a.json has {flaw.what}: "):
                report.settle(flaw, [4, 9], str)


def test_a_sentence_names_the_first_and_counts_the_others():
    with pytest.raises(UserError) as error:
        DataReport("a.json", Checks(strict=True)).settle(LEFT_OUT, range(10, 19), "box {}".format)
    assert str(error.value) == (
        "a.json has boxes of gold: box 0, box 1, box 2, box 3, box 4 and 4 more; they must be of wood."
    )


def test_the_report_has_every_id_and_a_few_lines(tmp_path):
    tree = content()
    tree["images"] = [{"id": 5, "file_name": "5.png", "width": 40, "height": 30}]
    tree["annotations"] = [
        {"id": k, "image_id": 5, "category_id": 1 + k % 2, "bbox": [k, 3, 10, 0 if k < 20 else 10]} for k in range(30)
    ]
    source = opened(write(tmp_path, tree), max_objects=8)
    assert source.report_lines() == [
        f"{tmp_path}/annotations_train.json: 1 images, 0 of them without objects; 10 objects of 2 classes, 0 of them "
        "crowds.",
        "  left out: 20 boxes without area (annotation 0 of 5.png, 1 of 5.png, 2 of 5.png, ...)",
        "  truncated: 1 images with more objects than config.data.max_objects (image 5.png)",
    ]
    report = json.loads(json.dumps(source.report_dict()))
    assert report["fingerprint"] == source.fingerprint
    del report["fingerprint"]
    assert report == {
        "origin": f"{tmp_path}/annotations_train.json",
        "images": 1,
        "images_without_objects": 0,
        "objects": 10,
        "crowds": 0,
        "classes": {"cat": 1, "dog": 2},
        "flaws": [
            {
                "what": "boxes without area",
                "outcome": "left out",
                "of": "annotation",
                "count": 20,
                "ids": list(range(20)),
                "files": ["5.png"] * 20,
            },
            {
                "what": "images with more objects than config.data.max_objects",
                "outcome": "truncated",
                "of": "image",
                "count": 1,
                "ids": [5],
                "files": ["5.png"],
            },
        ],
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (["a", "b"], ("a", "b"), ""),
        (["a", "b"], ["b", "a"], "X and Y have the same classes in another order: number 1 is 'a' here and 'b' there"),
        (["a", "b", "c"], ["a", "c", "b"], "number 2 is 'b' here and 'c' there"),
        (["a", "b"], ["a"], "X has 2 classes, Y 1: 'b' only in X"),
        (["a"], ["b", "a"], "X has 1 classes, Y 2: 'b' only in Y"),
        (["a", "b"], ["a", "c"], "X has 2 classes, Y 2: 'b' only in X; 'c' only in Y"),
        (list("abcdefgh"), ["x"], "'a', 'b', 'c', 'd', 'e', ... only in X; 'x' only in Y"),
        (["a", "a"], ["a"], "X has 2 classes, Y 1"),
    ],
)
def test_classes_are_compared_by_name_and_order(ours, theirs, words):
    difference = compare_classes("X", ours, "Y", theirs)
    assert words in difference
    assert bool(difference) == bool(words)
