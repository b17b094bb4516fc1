"""The report of a run: what it says, of every task, of runs that are not finished too; and nothing in it is code."""

import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from kdjax.charts import Curves, Line, Matrix, as_json, drawn, from_json, thinned
from kdjax.errors import DataError, harmless
from kdjax.files import write_json
from kdjax.html_report import _folders
from kdjax.main import parse_flags
from kdjax.plan import resolve, restored
from kdjax.run import showcase
from kdjax.run.balance import balance, teaching_terms
from kdjax.run.page import write_report
from kdjax.run.record import stage_folder, write_charts
from tests.test_config import load
from tests.test_task_contract import ENTRIES, another, batches

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert('1')</script>\"&"


class Strict(html.parser.HTMLParser):
    """Refuses what is not balanced, and collects what a browser would load or run."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.loaded, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "action", "data", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text: str) -> Strict:
    found = Strict()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def told(text: str) -> str:
    return " ".join(" ".join(parsed(text).texts).split())


def places(figure: str) -> list[list[tuple[float, float]]]:
    """The points of every line of a chart."""
    return [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(r'<polyline points="([^"]*)"', figure)
    ]


def test_a_line_goes_from_the_lower_left_to_the_upper_right_and_is_broken_where_it_is_no_number():
    points = [(0, 0.0), (50, 1.0), (60, math.nan), (70, 4.0), (100, 10.0)]
    first, second = places(drawn(Curves("a", "step", "b", {"x": Line(points)})))
    assert first[0] == (44, 186)
    assert second[-1] == (350, 8)
    assert len(first) == len(second) == 2
    (line,) = places(drawn(Curves("a", "x", "y", {"x": Line([(0, 1.0), (1, 0.0), (2, 10.0), (3, 100.0)])}, True)))[1:]
    assert [y for _, y in line] == [97, 8]


def test_the_numbers_of_an_axis_are_round_and_stand_where_they_are():
    figure = drawn(Curves("a", "step", "b", {"x": Line([(0, 3.0), (400, 17.0)])}))
    named = {x: float(y) for y, x in re.findall(r'<text x="39" y="([\d.]+)" text-anchor="end">([\d.]+)<', figure)}
    assert [*named] == ["0", "5", "10", "15", "20"]
    assert re.findall(r'text-anchor="(?:middle|end)">(\d00)<', figure) == ["100", "200", "300", "400"]
    (line,) = places(figure)
    # 3 is between 0 and 5, as far up as it is between them.
    assert line[0][1] + 3.5 == pytest.approx(named["0"] + 0.6 * (named["5"] - named["0"]), abs=0.2)


def test_a_long_line_is_thinned_by_means_and_ends_where_it_ended():
    points = thinned([(float(x), float(x)) for x in range(10_001)])
    assert len(points) <= 200
    assert points[-1] == (10_000, 10_000)
    assert all(x == y for x, y in points)


@pytest.mark.parametrize(
    "chart",
    [
        Curves(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: Line([(0, 1.0), (1, 2.0)])}),
        Curves("empty", "x", "y", {}),
        Curves("level", "x", "y", {"a": Line([(0, 2.0)]), "b": Line([(0, 2.0)])}, True),
        Matrix(HOSTILE, [HOSTILE, "b"], [HOSTILE, "b"], [[75.0, 25.0], [0.0, 100.0]], HOSTILE),
    ],
)
def test_a_chart_is_html_whatever_its_names_are_and_comes_back_from_json(chart):
    assert "script" not in parsed(drawn(chart)).tags
    again = from_json(json.loads(json.dumps(as_json(chart))))
    assert drawn(again) == drawn(chart)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_task_tells_good_answers_from_bad_ones(name, data_dir):
    """What is right is better than what is not, and its charts are those of all processes together."""
    entry = ENTRIES[name]
    source = entry.source(data_dir)
    judges = [entry.task.judge(source) for _ in range(2)]
    for batch in batches(entry, source)[0]:
        right = entry.perfect(source, batch)
        judges[0].add(right, batch)
        judges[1].add(another(right), batch)
    if not hasattr(entry.task, "judged"):
        pytest.skip("the task shows no single images")
    good, bad = (judge.kept(6) for judge in judges)
    for position in range(6):
        example, names = source[position], source.class_names
        best, worst, truth = (entry.task.judged(example, x, names) for x in (good[position], bad[position], None))
        assert best.score > 90
        assert worst.score < 60
        assert best.drawing.image.shape == truth.drawing.image.shape == example.image.shape
    (matrix,) = (x for x in judges[0].charts([judges[0].state()]) if isinstance(x, Matrix))
    shares = np.array(matrix.shares)[:, : len(matrix.columns)]
    assert not (shares - np.diag(shares.diagonal())).any()
    wrong = judges[1].charts([judges[1].state()])
    both = entry.task.judge(source).charts([judge.state() for judge in judges])
    assert [chart.title for chart in wrong] == [chart.title for chart in both]
    found = [chart for charts in (wrong, both) for chart in charts if isinstance(chart, Matrix)]
    diagonal = [np.array(chart.shares).diagonal()[:-1].max() for chart in found]
    assert diagonal[0] < 20 < diagonal[1]


def test_precision_stays_at_100_until_what_is_found_ends(data_dir):
    entry = ENTRIES["detection"]
    source = entry.source(data_dir)
    judge = entry.task.judge(source)
    for batch in batches(entry, source)[0]:
        found = entry.perfect(source, batch)
        # Nothing is said of the second half of the images.
        judge.add(found._replace(valid=found.valid & (batch.index < len(source) // 2)[:, None]), batch)
    curves = judge.charts([judge.state()])[0]
    assert list(curves.lines) == ["IoU 0.5", "IoU 0.75"]
    points = curves.lines["IoU 0.5"].points
    assert points[0] == (0, 100)
    assert points[-1] == (100, 0)


def recorded(plan, workdir: Path, *, finished: bool = True, gain: float = 2.0, name: str = "circle") -> None:
    """A workdir as a run leaves it, without the hours."""
    write_json(workdir / "config.json", plan.content)
    for stage in plan.stages:
        folder = stage_folder(workdir, stage.name)
        folder.mkdir(parents=True)
        value = 10.0 + gain * (stage.name == plan.student)
        terms = {"cls": 1.0, "box": 0.5} | ({"mgd": 40.0} if stage.methods else {})
        row = {f"{kind}/{term}": x for kind in ("raw", "loss") for term, x in terms.items()}
        row |= {"raw/mgd/p3": 30.0, "raw/mgd/p4": 10.0} if stage.methods else {}
        rows = [{"step": step, **row, "grad_norm": 1.0, "eval/AP": value - 1 / step} for step in (1, 2)]
        done = finished or stage.name == "teacher"
        lines = [json.dumps(x) for x in rows] + ["[torn"]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        write_json(folder / "config.json", {"environment": {"jax": "0.8.0", "device": HOSTILE}})
        if done:
            metrics = {"AP": value, "AP50": None, "per_class": {name: value, "b": 1.0}}
            result = {"metrics": metrics, "teacher": None, "steps": 2, "images_per_second": 3.0, "parameters": 10**6}
            write_json(folder / "result.json", result)
            write_charts(folder, [Matrix("confused", [name], [name], [[100.0]])])
            found = {"boxes": [[1, 1, 20, 20]], "scores": [0.9], "labels": [0]}
            write_json(folder / "predictions.json", [found] * 12)


@pytest.fixture(scope="module")
def plan(data_dir):
    config = load(ROOT / "configs" / "mgd.py", "tiny")
    config.data.data_dir = str(data_dir)
    config.compare = True
    return resolve(config, devices=1)


@pytest.fixture(scope="module")
def source(data_dir):
    return ENTRIES["detection"].source(data_dir)


def test_a_report_is_one_file_that_loads_and_runs_nothing_whatever_names_are(plan, source, tmp_path):
    recorded(plan, tmp_path, name=HOSTILE)
    text = write_report(plan, {0: tmp_path}, tmp_path, source).read_text()
    found = parsed(text)
    assert found.tags.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert all(url.startswith(("data:image/jpeg;base64,", "#")) for url in found.loaded)
    assert sum(url.startswith("data:") for url in found.loaded) >= 8
    assert HOSTILE in " ".join(found.texts)
    assert len(text) < 3_000_000
    assert "url(" not in text
    words = told(text)
    assert "the student is +2.00 AP beside its twin" in words
    assert "gain beside the twin +2.0" in words
    assert "mgd is 96% of the loss" in words
    assert re.search(r"kdjax\.evaluate --model=\S+/student ", words)
    assert "student.method_share 0.0 3.0" in words


def test_a_report_of_a_run_that_is_not_finished_says_how_far_it_is(plan, tmp_path):
    recorded(plan, tmp_path, finished=False)
    words = told(write_report(plan, {0: tmp_path}, tmp_path, None).read_text())
    assert "student is at step 2 of 2; baseline is at step 2 of 2" in words
    assert "The student reaches AP 11.5; what the method is worth shows when its twin is through." in words
    assert "gain beside the twin +2.0" in words
    # What is farther is not compared with what is behind.
    path = stage_folder(tmp_path, "baseline") / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    assert "gain beside the twin - " in told(write_report(plan, {0: tmp_path}, tmp_path, None).read_text())


def test_a_report_of_a_run_that_has_hardly_begun_is_one(plan, tmp_path):
    words = told(write_report(plan, {0: tmp_path}, tmp_path, None).read_text())
    assert "Nothing can be said of the student yet." in words


def test_the_report_of_several_seeds_has_means_and_deviations_and_the_verdict(plan, tmp_path):
    folders = {seed: tmp_path / f"seed_{seed}" for seed in (0, 1, 2)}
    for seed, folder in folders.items():
        folder.mkdir()
        recorded(plan, folder, gain=2.0 + seed)
    assert _folders(tmp_path) == folders
    words = told(write_report(plan, folders, tmp_path, None).read_text())
    assert "A gain: over 3 seeds the student is +3.00 AP" in words
    assert "gain beside the twin +3.0 ± 1.0" in words
    assert "seed 2 14.0 10.0" in words


def test_the_plan_of_a_workdir_is_that_of_the_run(plan, tmp_path):
    write_json(tmp_path / "config.json", plan.content)
    again = restored(json.loads((tmp_path / "config.json").read_text()))
    assert again == plan


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is no folder of a run: it has no config.json"):
        _folders(tmp_path)
    assert parse_flags(["report", f"--workdir={tmp_path}"], foreign=("config",)) == ["report"]


def test_pictures_end_where_there_is_no_room(plan, source, monkeypatch):
    said = {"student": [{"boxes": [], "scores": [], "labels": []}] * 6}
    monkeypatch.setattr(showcase, "MOST_BYTES", 60_000)
    found = showcase.showcase(plan.task, source, said, "student", "")
    pictures = [view.picture for group in found.groups.values() for shown in group for view in shown.views]
    assert 0 < sum(map(len, pictures)) <= 60_000
    assert "" in pictures


def test_what_is_only_looked_at_hides_no_interruption():
    with pytest.raises(KeyboardInterrupt), harmless("it"):
        raise KeyboardInterrupt


def test_auxiliary_tasks_weigh_nothing_in_a_student():
    """Nor do terms of tokens, which have no student."""
    plan = resolve(load(ROOT / "configs" / "icd.py", "tiny"), devices=8)
    assert teaching_terms(plan["student"].methods, ("cls", "box")) == {"icd": "icd"}
    row = {"loss/cls": 1.0, "loss/box": 1.0, "loss/icd": 1.0, "loss/icd_auxiliary": 100.0}
    assert balance("student", [row], ("cls", "box"), {"icd": "icd"}).sentences == []
    plan = resolve(load(ROOT / "configs" / "maskd.py", "tiny"), devices=8)
    assert teaching_terms(plan["tokens"].methods, ("cls", "box")) == {}


def test_a_balance_names_the_coarse_levels_that_outweigh_the_finer_ones():
    """MasKD's loss by level on the embedded data, and MGD's, as experiments/2026-11-21-methods.md has them."""
    own = {"loss/cls": 0.8, "loss/box": 0.5}
    maskd = dict(zip(("p3", "p4", "p5", "p6", "p7"), (31.0, 14.0, 4.0, 38.0, 384.0), strict=True))
    row = own | {"raw/maskd": 471.0, "loss/maskd": 4.0} | {f"raw/maskd/{level}": x for level, x in maskd.items()}
    found = balance("student", [row], ("cls", "box"), {"maskd": "maskd"})
    assert found.flags == ["--config.student.methods.maskd.levels=\"('p3', 'p4', 'p5')\""]
    assert found.sentences[0].startswith("p6, p7 are 90% of maskd at first")
    row = own | {"raw/mgd": 7e5, "loss/mgd": 340.0, "raw/mgd/p3": 6e5, "raw/mgd/p4": 9e4, "raw/mgd/p5": 1e4}
    found = balance("student", [row], ("cls", "box"), {"mgd": "mgd"})
    assert found.flags == ["--config.student.method_share=3"]
    assert balance("student", [row], ("cls", "box"), {"mgd": "mgd"}, share=3.0).flags == []
    assert balance("student", [own], ("cls", "box"), {}).sentences == []
    assert balance("student", [own | {"loss/cls": None}, own], ("cls", "box"), {}).sentences == []
