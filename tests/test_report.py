"""Records survive interruption; what is printed says what was given."""

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from kdjax import report
from kdjax.config.schema import Run
from kdjax.errors import StorageError, UserError
from kdjax.files import storing, write_json
from kdjax.options import declared
from kdjax.report import (
    MetricWriter,
    Row,
    Throughput,
    parameter_table,
    progress_line,
    summary_table,
)
from kdjax.sinks import SINKS, check_sinks
from kdjax.tasks import Detection


def rows(workdir) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir) -> list[Event]:
    """All TensorBoard events of a folder, file by file, read without TensorBoard: length, CRC, bytes, CRC."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_rows_are_flat_and_in_order(tmp_path):
    with MetricWriter(tmp_path / "run", clock=Clock()) as writer:
        writer.write(5, {"loss": {"box": np.float32(0.5), "cls": jnp.ones(())}, "lr": 0.01})
        # Before the writer closes: a killed run has its rows.
        assert rows(tmp_path / "run") == [{"step": 5, "wall_time": 100.0, "loss/box": 0.5, "loss/cls": 1.0, "lr": 0.01}]
        writer.write(np.int32(10), {"eval": {"AP": 31.25, "per_class": {"cat": 30, "dog": math.nan}}, "loss": math.inf})
    assert next(iter(rows(tmp_path / "run")[0])) == "step"
    assert rows(tmp_path / "run")[1] == {
        "step": 10,
        "wall_time": 100.0,
        "eval/AP": 31.25,
        "eval/per_class/cat": 30.0,
        "eval/per_class/dog": None,
        "loss": None,
    }


def test_events_hold_the_same_scalars(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": {"box": 0.5}})
        writer.write(6, {"loss": {"box": 0.25}, "lr": 0.01})
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(5, "loss/box", 0.5), (6, "loss/box", 0.25), (6, "lr", pytest.approx(0.01))]


def test_a_resumed_run_reads_as_one_never_stopped(tmp_path):
    def record(workdir, step, steps):
        with MetricWriter(workdir, step, clock=Clock()) as writer:
            for s in range(step + 1, steps + 1):
                writer.write(s, {"loss": 1 / s})

    record(tmp_path / "whole", 0, 9)
    record(tmp_path / "parts", 0, 7)
    # Killed in the middle of a line, with its last checkpoint at step 4; then again, before the next one.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    record(tmp_path / "parts", 4, 5)
    record(tmp_path / "parts", 4, 9)
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()

    # What TensorBoard shows: a restart at step s hides earlier files' events from s on.
    shown: dict[int, float] = {}
    for event in events(tmp_path / "parts"):
        if event.session_log.status == event.session_log.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[event.step] = value.simple_value
    assert shown == {s: pytest.approx(1 / s) for s in range(1, 10)}
    assert len(list((tmp_path / "parts").glob("events*"))) == 3


class Service(types.ModuleType):
    """Stands in for wandb and for mlflow: keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.recorded, self.ended = [], [], 0
        self.info = types.SimpleNamespace(run_id="of the server")

    def init(self, **options):
        self.started.append(options)
        return self

    def start_run(self, **options):
        self.started.append(options)
        return self

    def log(self, scalars, step):
        self.recorded.append((step, scalars))

    def log_metrics(self, scalars, step):
        self.recorded.append((step, scalars))

    def finish(self):
        self.ended += 1

    def end_run(self):
        self.ended += 1


@pytest.fixture
def services(monkeypatch):
    found = {name: Service(name) for name in ("wandb", "mlflow")}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service)
    return found


def test_every_chosen_sink_gets_the_scalars_and_no_other_does(services, tmp_path):
    folder = tmp_path / "first" / "stages" / "student"
    with MetricWriter(folder, sinks=("wandb", "mlflow")) as writer:
        writer.write(np.int32(5), {"eval": {"per_class": {"a<b": 1.0, "dog": math.nan}}, "loss": 0.5})
    assert [step for step, _ in services["wandb"].recorded] == [5]
    recorded = services["wandb"].recorded[0][1]
    assert recorded == {
        "eval/per_class/a<b": 1.0,
        "eval/per_class/dog": pytest.approx(math.nan, nan_ok=True),
        "loss": 0.5,
    }
    assert services["mlflow"].recorded == [(5, {"eval/per_class/a_b": 1.0, "loss": 0.5})]
    assert [service.ended for service in services.values()] == [1, 1]
    assert services["wandb"].started[0]["name"] == services["mlflow"].started[0]["run_name"] == "first/student"
    assert not events(folder)
    assert len(rows(folder)) == 1


def test_a_resumed_stage_goes_on_in_its_run_and_a_new_one_gets_another(services, tmp_path):
    for step in (0, 4, 0):
        with MetricWriter(tmp_path, step, sinks=("wandb", "mlflow")):
            pass
    first, resumed, new = (options["id"] for options in services["wandb"].started)
    assert first == resumed != new
    assert [options["run_id"] for options in services["mlflow"].started] == [None, "of the server", None]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    check_sinks(["tensorboard"])
    with pytest.raises(UserError, match=rf"^config.sinks has '{name}', but the package {name} cannot be imported"):
        check_sinks(["tensorboard", name])


def test_a_service_that_does_not_start_is_one_sentence_and_leaves_nothing_open(services, tmp_path, monkeypatch):
    def refuses(**_):
        raise RuntimeError("no API key.\nLog in.")

    monkeypatch.setattr(services["mlflow"], "start_run", refuses)
    with pytest.raises(UserError, match=r"config.sinks has 'mlflow', which does not start: no API key. Log in.$"):
        MetricWriter(tmp_path, sinks=("wandb", "mlflow"))
    assert services["wandb"].ended == 1


def test_the_rule_of_the_key_is_about_the_sinks_that_there_are():
    rule = declared(Run)["sinks"].rule
    assert rule.holds(tuple(SINKS))
    assert rule.holds(())
    for wrong in (("tensorboard", "tensorboard"), ("comet",), "wandb", (3,), [], ([],)):
        assert not rule.holds(wrong), wrong


def test_damaged_rows_are_dropped_and_counted_where_a_run_goes_on(tmp_path, capsys):
    with MetricWriter(tmp_path, clock=Clock(), sinks=()) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for line in (b"\xff\xfe", b"[1]", b"3", b"{}", b'{"step": "1"}', b'{"step": true}', b"[" * 10**5, b""):
        path.write_bytes(line + b"\n" + whole + b'{"step": 3, "lo')
        MetricWriter(tmp_path, 2, sinks=()).close()
        assert path.read_bytes() == whole
        # The last one was cut short by a kill, which is no damage.
        assert capsys.readouterr().out == f"{path}: 1 of 3 rows are damaged, and dropped.\n"
    MetricWriter(tmp_path, 2, sinks=()).close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_file_of_a_services_runs_begins_a_new_one(text, services, tmp_path, capsys):
    (tmp_path / "sinks.json").write_text(text)
    with MetricWriter(tmp_path, 2, sinks=("wandb",)):
        pass
    assert "sinks.json is damaged" in capsys.readouterr().out
    assert json.loads((tmp_path / "sinks.json").read_text()).keys() == {"wandb"}


def test_a_new_run_starts_empty(tmp_path):
    for _ in range(2):
        with MetricWriter(tmp_path) as writer:
            writer.write(1, {"loss": 1.0})
    assert len(rows(tmp_path)) == 1


def test_json_is_plain_and_readable(tmp_path):
    path = tmp_path / "summary.json"
    value = {
        "teacher": {"AP": math.nan, "per_class": {"cat": np.float32(1.5)}},
        "baseline": None,
        "steps": np.int64(3),
        "shape": (2, jnp.arange(2)),
        "compare": True,
        7: [-math.inf, "mgd"],
    }
    write_json(path, value)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "teacher": {"AP": None, "per_class": {"cat": 1.5}},
        "baseline": None,
        "steps": 3,
        "shape": [2, [0, 1]],
        "compare": True,
        "7": [None, "mgd"],
    }


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(StorageError, match=r"metrics.json.* cannot be written .*Is a directory"), storing(tmp_path):
        write_json(tmp_path / "metrics.json", {})


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"AP": 1})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"AP": 2})
    assert json.loads(path.read_text()) == {"AP": 1}
    with pytest.raises(TypeError):
        write_json(path, {"AP": object()})
    assert json.loads(path.read_text()) == {"AP": 1}
    write_json(path, {"AP": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    throughput = Throughput(steps=100, batch_size=16, clock=clock)
    clock.now += 60  # compiling
    assert all(math.isnan(value) for value in throughput.measure(1))
    assert math.isnan(throughput.images_per_second)
    clock.now += 5
    assert throughput.measure(11) == (pytest.approx(32), 0, pytest.approx(89 / 2))
    clock.now += 5
    with throughput.paused():
        clock.now += 1000
    with throughput.waiting():
        clock.now += 3
    clock.now += 2
    # 10 steps in 10 seconds now, 20 in 15 altogether.
    assert throughput.measure(21) == (pytest.approx(16), pytest.approx(0.3), pytest.approx(79 * 15 / 20))
    assert throughput.images_per_second == pytest.approx(16 * 20 / 15)
    clock.now += 40
    assert throughput.measure(100)[1:] == (0, 0)


def test_throughput_leaves_out_steps_that_were_compiled_meanwhile():
    clock = Clock()
    throughput = Throughput(steps=20, batch_size=16, clock=clock)
    throughput.measure(1)
    clock.now += 3
    with throughput.paused(steps=1):
        clock.now += 60
    clock.now += 6
    # 9 of the 10 steps in 9 seconds.
    assert throughput.measure(11) == (pytest.approx(16), 0, pytest.approx(9))
    assert throughput.images_per_second == pytest.approx(16)


def test_throughput_counts_pauses_that_end_in_an_error():
    clock = Clock()
    throughput = Throughput(steps=10, batch_size=2, clock=clock)
    throughput.measure(1)

    def evaluation_that_fails():
        with throughput.paused():
            clock.now += 50
            raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluation_that_fails()
    clock.now += 1
    assert throughput.measure(2).images_per_second == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            (120, 800, {"box": 0.4, "mgd": 0.2}, 0.01, 31.24, 0.034, 192),
            "step 120/800  epoch 0.5/3.0  loss 0.600 (box 0.400 mgd 0.200)  lr 0.0100  31.2 img/s  data 3%  ETA 3:12",
        ),
        (
            (1, 90_000, {"cls": 0.00123}, 1e-5, math.nan, math.nan, math.nan),
            "step     1/90000  epoch 0.5/3.0  loss 1.2e-03 (cls 1.2e-03)  lr 1.0e-05  - img/s  data -  ETA -",
        ),
        (
            (7, 10, {"c": math.nan, "box": 0.0}, 0.5, 1234.56, 1.0, 3.6e5 + 59.6),
            "step  7/10  epoch 0.5/3.0  loss nan (c nan box 0.000)  lr 0.5000  1234.6 img/s  data 100%  ETA 100:01:00",
        ),
        (
            (7, 10, {"cls": 2.5e7}, 0.5, 8, 0, 0),
            "step  7/10  epoch 0.5/3.0  loss 2.5e+07 (cls 2.5e+07)  lr 0.5000  8.0 img/s  data 0%  ETA 0:00",
        ),
    ],
)
def test_progress_line(arguments, line):
    assert progress_line(*arguments, epochs=(0.5, 3)) == line


@pytest.mark.parametrize(
    ("eta", "later", "words"), [(192, 60, "4:12"), (0, 3600, "1:00:00"), (math.nan, math.nan, "-")]
)
def test_a_line_says_when_all_stages_end_where_others_follow(eta, later, words):
    line = progress_line(7, 10, {"cls": 0.5}, 0.01, 8, 0, eta, epochs=(0.5, 3), later=later)
    assert line.endswith(f", all stages {words}")


def metrics(*values: float) -> dict[str, float]:
    return dict(zip(["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"], values, strict=True))


def test_summary_table():
    nan = math.nan
    # Nobody has masks here, and there are no large objects: their columns are left out.
    columns = Detection.columns
    teacher = Row("teacher", metrics(48.06, 70, 50.5, 20, 45, nan), 12_345_678)
    student = Row("student (mgd)", metrics(40.2, 60, 44, 15.0, 41, nan), 1_300_000)
    baseline = Row("baseline", metrics(36.8, 61.5, 40, 10, nan, nan), 1_300_000)
    assert summary_table([teacher, student], columns, baseline).splitlines() == [
        "model            AP  AP50  AP75   APs   APm   params",
        "----------------------------------------------------",
        "teacher        48.1  70.0  50.5  20.0  45.0  12.35 M",
        "student (mgd)  40.2  60.0  44.0  15.0  41.0   1.30 M",
        "baseline       36.8  61.5  40.0  10.0     -   1.30 M",
        "gain           +3.4  -1.5  +4.0  +5.0     -",
    ]
    assert summary_table([teacher, student], columns).splitlines()[2:] == [
        "teacher        48.1  70.0  50.5  20.0  45.0  12.35 M",
        "student (mgd)  40.2  60.0  44.0  15.0  41.0   1.30 M",
    ]


def test_parameter_table():
    student = {"backbone": {"conv": {"kernel": np.zeros((3, 3, 3, 64))}}, "head": {"bias": np.zeros(9)}}
    table = parameter_table({"student": student, "method": {"token": jnp.zeros((2, 5))}, "none": {}})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert cells == [
        ["Model", "Module", "Parameters"],
        ["student", "backbone", "1,728"],
        ["student", "head", "9"],
        ["method", "token", "10"],
    ]
    assert table.splitlines()[-1] == "Total: student 1,737, method 10, none 0"
