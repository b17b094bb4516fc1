"""The report of a run, ``report.html``: one file for a person, that needs no network and holds no program.

What was the method worth, how did it come to that, on which images, and what comes next. It is made of what the
workdir holds and of the task's facts: no metric is named here. The file is long because each of its sections is a
function, in the order of the page.
"""

import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.charts import Chart, Curves, Line, drawn
from kdjax.config import base_config
from kdjax.files import replace_text
from kdjax.markup import Html, element, joined, table
from kdjax.models import build_model
from kdjax.paths import Path
from kdjax.plan import BASELINE, Plan
from kdjax.report import known
from kdjax.run.balance import Row, balance, teaching_terms
from kdjax.run.commands import commands, methods_of
from kdjax.run.document import document
from kdjax.run.record import changes
from kdjax.run.showcase import Shown, showcase
from kdjax.run.story import Story, stories
from kdjax.run.verdict import Verdict, judge
from kdjax.types import Source

REPORT_FILE = "report.html"

_MOST_CLASSES = 40
"""In the table by class: of more, those that differ most."""
_LOG_FROM = 20.0
"""How many times the least of what is drawn the largest must be for an axis to be logarithmic."""


class _Run(NamedTuple):
    """A run, as far as it has come."""

    plan: Plan
    seeds: Mapping[int, Mapping[str, Story]]
    """By seed, its stages by name."""

    @property
    def first(self) -> Mapping[str, Story]:
        """The stages of the first seed, of which details are shown."""
        return next(iter(self.seeds.values()))

    def of(self, stage: str) -> list[Mapping[str, Any]]:
        """The metrics of a stage, of the seeds that have some."""
        return [metrics for told in self.seeds.values() if (metrics := told[stage].metrics) is not None]

    def label(self, stage: str) -> str:
        """What a stage is called, here."""
        if stage == self.plan.student:
            return f"{stage} ({methods_of(self.plan)})"
        return f"{stage} (the same alone)" if stage == BASELINE else stage

    @property
    def colours(self) -> dict[str, int]:
        """The same for a stage in every chart: the student's first, then its twin's."""
        names = [stage.name for stage in self.plan.stages]
        ordered = sorted(names, key=lambda name: (name != self.plan.student, name != BASELINE))
        return {name: number for number, name in enumerate(ordered)}


def write_report(plan: Plan, folders: Mapping[int, Path], place: Path, source: Source | None) -> Path:
    """Writes the report of a run that is finished, or as far as it has come; returns where it is.

    Args:
        plan: of one seed of the run.
        folders: of every seed, where its stages are.
        place: the folder that the report is written into.
        source: what models are evaluated on, for pictures; None where it is not to be had.
    """
    run = _Run(plan, {seed: stories(plan, folder) for seed, folder in folders.items()})
    path = place / REPORT_FILE
    replace_text(path, page(run, folders, place, source))
    return path


def page(run: _Run, folders: Mapping[int, Path], place: Path, source: Source | None) -> Html:
    """The whole document; the arguments are those of :func:`write_report`."""
    sections = {
        "Worth": _worth(run),
        "Learning": _learning(run),
        "Terms": _terms(run),
        "Classes": _classes(run),
        "Images": _images(run, source),
        "Config": _config(run.plan),
        "Environment": _environment(run),
        "What comes next": _next(run, folders, place),
    }
    title = f"{methods_of(run.plan)} on {run.plan.data.name}"
    return document(title, f"{run.plan.task.name}, {place}", sections)


def _paragraph(text: str, **attributes: str) -> Html:
    return element("p", text, **attributes)


# What it was worth


def _worth(run: _Run) -> Html:
    verdict = _verdict(run)
    told = [_paragraph(verdict.sentence, class_=f"verdict {verdict.outcome}")] if verdict else []
    if not verdict:
        told = [_paragraph(_without_verdict(run), class_="verdict")]
    unfinished = [
        f"{prefix}{name} is {story.progress}"
        for seed, stages in run.seeds.items()
        for prefix in [f"seed {seed}: " * (len(run.seeds) > 1)]
        for name, story in stages.items()
        if story.result is None
    ]
    if unfinished:
        told.append(_paragraph(f"The run is not finished: {'; '.join(unfinished)}. Numbers are those of now."))
    skipped = {name: round(sum(row.get("skipped") or 0 for row in story.rows)) for name, story in run.first.items()}
    told += [
        _paragraph(f"{count} steps of {name} were skipped: something in them was not finite.")
        for name, count in skipped.items()
        if count
    ]
    return joined(*told, _numbers(run), _by_seed(run))


def _verdict(run: _Run) -> Verdict | None:
    """What the seeds that are through say together; None where there is nothing to compare."""
    task = run.plan.task
    pairs = [(_value(ours, task.primary), _value(theirs, task.primary)) for ours, theirs in _pairs(run, finished=True)]
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    return judge(ours, theirs, task.primary, higher_is_better=task.higher_is_better)


def _pairs(run: _Run, *, finished: bool = False) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The metrics of student and twin, of the seeds in which both have come as far, or to the end."""
    stages = [(told[run.plan.student], told[BASELINE]) for told in run.seeds.values() if BASELINE in told]
    return [
        (ours.metrics, theirs.metrics)
        for ours, theirs in stages
        if ours.metrics
        and theirs.metrics
        and ours.at == theirs.at
        and (not finished or (ours.result and theirs.result))
    ]


def _without_verdict(run: _Run) -> str:
    metrics, primary = run.of(run.plan.student), run.plan.task.primary
    if not metrics:
        return "Nothing can be said of the student yet."
    reached = f"The student reaches {primary} {known(_mean([x.get(primary, math.nan) for x in metrics]), '.1f')}"
    if run.plan.baseline:
        return f"{reached}; what the method is worth shows when its twin is through."
    return f"{reached}; what the method was worth only its identical twin can tell (--config.compare=True)."


def _numbers(run: _Run) -> Html:
    """The table: a row for each model, means and deviations over the seeds, and the gain."""
    shown = [*run.plan.run.stages, *([BASELINE] if run.plan.baseline else [])]
    metrics: dict[str, list[Mapping[str, Any]]] = {run.label(name): run.of(name) for name in shown}
    results = [x for told in run.seeds.values() if (x := told[run.plan.student].result)]
    taught = [result["teacher"] for result in results if result.get("teacher")]
    if taught and run.plan[run.plan.student].options.teacher not in run.plan:
        metrics = {"teacher": taught, **metrics}
    columns = {
        heading: metric
        for heading, metric in run.plan.task.columns.items()
        if any(math.isfinite(_value(found, metric)) for several in metrics.values() for found in several)
    }
    sizes = {run.label(name): _parameters(run, name) for name in shown}
    rows = [
        [label, *(_spread([_value(x, metric) for x in several]) for metric in columns.values()), sizes.get(label, "")]
        for label, several in metrics.items()
    ]
    if run.plan.baseline:
        gains = [
            _spread([_value(ours, metric) - _value(theirs, metric) for ours, theirs in _pairs(run)], sign="+")
            for metric in columns.values()
        ]
        rows.append(["gain beside the twin", *gains, ""])
    more = len(run.seeds) > 1
    remark = f"Mean and standard deviation over {len(run.seeds)} seeds; the gain is of pairs." if more else ""
    return joined(
        table(["", *columns, "parameters"], rows, sum_=run.plan.baseline is not None),
        _paragraph(remark, class_="remark"),
    )


def _parameters(run: _Run, stage: str) -> str:
    result = run.first[stage].result
    return f"{result['parameters'] / 1e6:.2f} M" if result else ""


def _value(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    return value if isinstance(value, float | int) else math.nan


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation.

    >>> _spread([1.0, 3.0]), _spread([2.5], sign="+"), _spread([math.nan])
    ('2.0 ± 1.4', '+2.5', '-')
    """
    finite = [value for value in values if math.isfinite(value)]
    deviation = f" ± {statistics.stdev(finite):.1f}" if len(finite) > 1 else ""
    return known(_mean(values), f"{sign}.1f") + deviation


def _by_seed(run: _Run) -> Html:
    """Of several seeds each by itself, with the way to its own report."""
    if len(run.seeds) < 2:
        return Html()
    primary, shown = run.plan.task.primary, [run.plan.student, *([BASELINE] if run.plan.baseline else [])]
    rows = [
        [f"seed {seed}", *(known(_value(stages[name].metrics or {}, primary), ".1f") for name in shown)]
        for seed, stages in run.seeds.items()
    ]
    links = [element("a", f"seed {seed}", href=f"seed_{seed}/{REPORT_FILE}") for seed in run.seeds]
    between = [part for link in links for part in (" ", link)]
    return joined(
        element("h3", f"{primary} by seed"),
        table(["", *shown], rows),
        element("p", "Each has a report of its own:", *between),
    )


# How it was learnt


def _learning(run: _Run) -> Html:
    primary, colours, several = run.plan.task.primary, run.colours, len(run.seeds) > 1
    lines = {
        name + f", seed {seed}" * several: Line(_points(stages[name].rows, f"eval/{primary}"), colours[name], number)
        for name in colours
        for number, (seed, stages) in enumerate(run.seeds.items())
    }
    charts = [Curves(f"{primary} on the evaluation split", "step", primary, _with_points(lines), ends=True)]
    for name, story in run.first.items():
        shares = [key for key in _keys(story.rows, "loss/") if key.count("/") == 1]
        terms = {key.removeprefix("loss/"): key for key in shares}
        charts.append(_loss_chart(f"Loss of {name} by term, as weighted", story.rows, terms))
    return _grid([chart for chart in charts if chart.lines])


def _grid(charts: Sequence[Chart]) -> Html:
    return element("div", *map(drawn, charts), class_="charts") if charts else Html()


def _keys(rows: Sequence[Row], prefix: str) -> list[str]:
    """Keys of what was recorded below a name, in the order in which they came."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """What was recorded of one number; a gap is not a number."""
    there = [(row["step"], row[key]) for row in rows if key in row]
    return [(math.nan if x is None else x, math.nan if y is None else y) for x, y in there]


def _with_points(lines: Mapping[str, Line]) -> dict[str, Line]:
    return {name: line for name, line in lines.items() if line.points}


def _loss_chart(title: str, rows: Sequence[Row], keys: Mapping[str, str]) -> Curves:
    """Numbers that are recorded under ``keys``, by name, on an axis that shows small ones beside large ones."""
    lines = {name: Line(_points(rows, key), colour, colour // 8) for colour, (name, key) in enumerate(keys.items())}
    values = [y for line in lines.values() for _, y in line.points if math.isfinite(y)]
    logarithmic = bool(values) and min(values) > 0 and max(values) > _LOG_FROM * min(values)
    return Curves(title, "step", "loss", _with_points(lines), logarithmic, ends=True)


# What its terms and levels are


def _terms(run: _Run) -> Html:
    return joined(*(part for name, story in run.first.items() if story.plan.methods for part in _balanced(run, name)))


def _balanced(run: _Run, name: str) -> Iterator[Html]:
    """What a stage's terms and levels are worth beside each other, in words, numbers and curves."""
    story = run.first[name]
    own = build_model(story.plan.options.model, num_classes=1).terms
    taught = teaching_terms(story.plan.methods, own)
    found = balance(name, story.rows, own, taught, share=story.plan.options.method_share)
    yield from (_paragraph(sentence) for sentence in found.sentences)
    if found.flags:
        yield _paragraph("In another workdir, to weigh it otherwise:")
        yield element("pre", " ".join(found.flags))
    if not found.sentences and story.rows:
        yield _paragraph(f"No term and no level dominates the loss of {name}.")
    raw = _keys(story.rows, "raw/")
    yield _table_of_terms(story.rows, raw)
    charts = []
    for term in dict.fromkeys(key.split("/")[1] for key in raw):
        levels = {key.removeprefix(f"raw/{term}/"): key for key in raw if key.startswith(f"raw/{term}/")}
        charts.append(_loss_chart(f"{term} of {name} by level, without its weight", story.rows, levels))
    norm = Line(_points(story.rows, "grad_norm"), run.colours[name])
    charts.append(Curves(f"Norm of the gradient of {name}", "step", "norm", _with_points({"all terms": norm})))
    yield _grid([chart for chart in charts if chart.lines])


def _table_of_terms(rows: Sequence[Row], raw: Sequence[str]) -> Html:
    """Of each term and level what it is without and with its weight, at first and at last."""
    if not rows:
        return Html()

    def numbers(key: str) -> list[str]:
        term = key.removeprefix("raw/").partition("/")[0]
        values = []
        for row in (rows[0], rows[-1]):
            # Levels have no weight of their own: that of their term, and what scales all of them.
            whole, weighted, part = (row.get(x) for x in (f"raw/{term}", f"loss/{term}", key))
            values += [part, part * weighted / whole if part is not None and weighted is not None and whole else None]
        return ["-" if value is None else f"{value:.3g}" for value in values]

    head = ["", "first, raw", "first, weighted", "last, raw", "last, weighted"]
    return table(head, [[key.removeprefix("raw/").replace("/", ", "), *numbers(key)] for key in sorted(raw)])


# Its classes, and what else its judge shows


def _classes(run: _Run) -> Html:
    compared = [run.plan.student, *([BASELINE] if run.plan.baseline else [])]
    merged: dict[str, Curves] = {}
    matrices = []
    for name, number in run.colours.items():
        for chart in run.first[name].charts:
            if isinstance(chart, Curves):
                before = merged.get(chart.title, chart._replace(lines={}))
                lines = {
                    ", ".join(filter(None, (name, key))): line._replace(colour=number)
                    for key, line in chart.lines.items()
                }
                merged[chart.title] = before._replace(lines={**before.lines, **lines})
            elif name in compared:
                matrices.append(chart._replace(title=f"{chart.title}, {name}"))
    return joined(_grid([*merged.values(), *matrices]), _by_class(run, compared))


def _by_class(run: _Run, compared: Sequence[str]) -> Html:
    """The metrics that are by class, of the student beside its twin: means over seeds."""
    found = {name: run.of(name) for name in compared}
    tables = []
    for metric, values in (found[run.plan.student][0] if found[run.plan.student] else {}).items():
        if not isinstance(values, Mapping) or any(isinstance(x, Mapping) for x in values.values()):
            continue
        means = {
            name: {label: _mean([_value(x.get(metric, {}), label) for x in several]) for label in values}
            for name, several in found.items()
        }
        ours, theirs = means[run.plan.student], means.get(BASELINE)
        gains = {label: ours[label] - theirs[label] if theirs else math.nan for label in values}
        order = sorted(values, key=lambda label: -abs(gains[label]) if math.isfinite(gains[label]) else 0)
        chosen = [label for label in values if label in set(order[:_MOST_CLASSES])]
        rows = [
            [
                label,
                *(known(of_model[label], ".1f") for of_model in means.values()),
                *([known(gains[label], "+.1f")] if theirs else []),
            ]
            for label in chosen
        ]
        title = metric.replace("per_class", run.plan.task.primary)
        some = f", those {len(chosen)} of {len(values)} classes that differ most" * (len(chosen) < len(values))
        tables += [
            element("h3", f"{title} by class{some}"),
            table(["", *means, *(["gain"] if theirs else [])], rows),
        ]
    return joined(*tables)


# Its images


def _images(run: _Run, source: Source | None) -> Html:
    student = run.plan.student
    said = {name: run.first[name].kept for name in run.colours if run.first[name].kept}
    if source is None or student not in said or not hasattr(run.plan.task, "judged"):
        return Html()
    found = showcase(run.plan.task, source, said, student, BASELINE if BASELINE in said else "")
    if not found.groups:
        return Html()
    of_seeds = f"Of seed {next(iter(run.seeds))}. " * (len(run.seeds) > 1)
    told = _paragraph(
        f"{of_seeds}Chosen from the first {found.images} images of {source.origin}, by how good each answer is, 0 to "
        "100.",
        class_="remark",
    )
    keys = [
        element("li", element("span", "", class_="swatch", style=f"background: rgb{mark.colour}"), mark.text)
        for mark in found.legend
    ]
    legend = element("ul", *keys, class_="legend") if keys else Html()
    groups = [
        part
        for title, shown in found.groups.items()
        for part in (element("h3", title), element("div", *map(_article, shown), class_="pictures"))
    ]
    return joined(told, legend, *groups)


def _article(shown: Shown) -> Html:
    """One image: the truth, and what each model said."""
    views = [
        element(
            "figure",
            *(
                [element("img", src=view.picture, alt=f"{view.name}: {view.words}", loading="lazy")]
                if view.picture
                else []
            ),
            element("figcaption", element("b", view.name), f" {view.words}"),
        )
        for view in shown.views
    ]
    return element("article", element("h4", shown.name), element("div", *views, class_="views"))


# What it was made with, and what comes next


def _config(plan: Plan) -> Html:
    twins = [name for name in plan.content if name.startswith(BASELINE)]
    content = {key: value for key, value in plan.content.items() if key not in twins}
    rows = [[key, _written(old), _written(new)] for key, old, new in changes(base_config().to_dict(), content)]
    told = "What differs from the config that all start from; what is chosen from the data is in it."
    return joined(_paragraph(told, class_="remark"), table(["", "there", "here"], rows, class_="words"))


def _written(value: Any) -> str:
    return "" if value == "absent" else f"{value!r}"


def _environment(run: _Run) -> Html:
    """What the stages were computed with; once where all had the same."""
    found = {name: story.environment for name, story in run.first.items() if story.environment}
    if not found:
        return Html()
    keys = list(dict.fromkeys(key for environment in found.values() for key in environment))
    same = len({tuple(sorted(map(str, environment.items()))) for environment in found.values()}) == 1
    shown = dict(list(found.items())[:1]) if same else found
    rows = [[key, *(str(environment.get(key, "")) for environment in shown.values())] for key in keys]
    speeds = [
        [name, f"{result['images_per_second']:.1f} images a second"]
        for name, story in run.first.items()
        if (result := story.result) and result["images_per_second"]
    ]
    return joined(
        table(["", "all stages"] if same else ["", *shown], rows, class_="words"),
        element("h3", "How fast"),
        table(["", "in training"], speeds, class_="words"),
    )


def _next(run: _Run, folders: Mapping[int, Path], place: Path) -> Html:
    parts = []
    if any(story.result is None for stages in run.seeds.values() for story in stages.values()):
        parts.append(_paragraph("The command that began the run goes on from its last checkpoint."))
    if len(run.seeds) < 2 and run.plan.baseline:
        parts.append(_paragraph('One run proves little: --config.seeds="(0, 1, 2)" in another workdir repeats it.'))
    for what, command in commands(run.plan, next(iter(folders.values()))):
        parts += [_paragraph(f"{what[0].upper()}{what[1:]}:"), element("pre", command)]
    parts += [_paragraph("This page again:"), element("pre", shlex.join(["kdjax", "report", f"--workdir={place}"]))]
    return joined(*parts)
