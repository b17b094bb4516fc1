"""What is read from a bucket and written into one: a stand-in on this machine, which the real clients talk to."""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import kdjax
from kdjax import lock, main
from kdjax.checkpoint import Checkpoints, recorded
from kdjax.data.flaws import Checks
from kdjax.data.sources import open_source
from kdjax.data.workers import from_processes
from kdjax.devices import cache_compilations
from kdjax.errors import AwayError, Exit, StorageError, UnreachedError, UserError
from kdjax.files import write_json
from kdjax.lock import take
from kdjax.paths import as_path, files_in, move
from kdjax.processes import everywhere
from kdjax.report import MetricWriter
from kdjax.run.agreement import check_workdir
from kdjax.run.result import finished_result
from kdjax.saved import copy_model, describe, describe_model, load_method, load_variables, save_method, save_model
from kdjax.visualize import Drawing, save_contact_sheet
from kdjax.weights import read_weights
from tests.bucket import stand_in
from tests.data import test_map_folders, test_voc, test_yolo
from tests.data.folders import content, encoded, write
from tests.slow import slow_but
from tests.test_lock import contend
from tests.test_processes import DIFFERENT, ROOT, as_processes, ended, killed_and_resumed, started, training
from tests.test_result import STAGE, finished_stage
from tests.weights.pickles import write_pth

pytestmark = pytest.mark.skipif(util.find_spec("gcsfs") is None, reason="kdjax[gcs] is not installed")


@pytest.fixture(scope="module")
def server():
    with stand_in("bucket", "objects") as server:
        yield server


@pytest.fixture
def bucket(server, request):
    """A folder in a bucket, of this test alone."""
    server.asked.clear()
    return f"gs://bucket/{abs(hash(request.node.name))}"


def written(server, folder):
    """What was written and deleted in a folder, in order."""
    prefix = folder.removeprefix("gs://") + "/"
    return [entry.replace(prefix, "") for entry in server.asked if prefix in entry]


def put(server, folder, source: Path):
    """Puts all files of a local folder into one in a bucket."""
    for path in source.rglob("*"):
        if path.is_file():
            server.put("bucket", f"{folder.removeprefix('gs://bucket/')}/{path.relative_to(source)}", path.read_bytes())
    return folder


def http_error(code, words):
    from gcsfs.retry import HttpError

    return HttpError({"code": code, "message": words})


def google_error(name, words):
    """Of the client by which Orbax asks for buckets."""
    from google.api_core import exceptions

    return getattr(exceptions, name)(words)


def connection_error(words):
    import aiohttp

    return aiohttp.ClientConnectorError(None, OSError(111, words))


def test_a_bucket_that_is_away_asks_all_processes_to_be_started_again():
    def fail():
        if jax.process_index() == 1:
            raise http_error(503, "Service Unavailable")

    first, second = as_processes(2, lambda: everywhere(fail))
    assert first.exit_code == second.exit_code == Exit.AGAIN
    assert str(first) == f"Process 1 cannot go on: {second}"
    assert str(second).startswith("A bucket cannot be reached any more (HttpError: Service Unavailable")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: http_error(503, "away"), Exit.AGAIN),
        (lambda: TimeoutError("away"), Exit.AGAIN),
        (lambda: AwayError("HttpError: away"), Exit.AGAIN),
        (lambda: google_error("ServiceUnavailable", "away"), Exit.AGAIN),
        (lambda: google_error("TooManyRequests", "away"), Exit.AGAIN),
        (lambda: http_error(400, "ours"), None),
        (lambda: google_error("BadRequest", "ours"), None),
        (lambda: OSError("ours"), None),
        (lambda: ValueError("ours"), None),
    ],
)
def test_of_a_buckets_errors_only_an_outage_asks_for_another_start(error, code, capsys):
    def work():
        raise error()

    if code is None:
        with pytest.raises(type(error()), match="ours"):
            main.ended(work, "nothing is lost")
    else:
        assert main.ended(work, "nothing is lost") == code
        assert "A bucket cannot be reached any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        lambda: http_error(401, "no such account"),
        lambda: google_error("Forbidden", "not for this account"),
        lambda: OSError("Forbidden: https://storage.googleapis.com/b/bucket\nnot for this account"),
    ],
)
def test_what_a_bucket_does_not_let_an_account_do_is_a_matter_of_storage(error, capsys):
    def work():
        raise error()

    assert main.ended(work, "nothing is lost") == Exit.STORAGE
    assert "A bucket does not let this account do all that a run does there (" in capsys.readouterr().err


@pytest.fixture
def outage(monkeypatch):
    """Called, it takes all buckets away, as if their client had tried for a minute."""
    import gcsfs

    async def unanswered(*_, **__):
        raise http_error(503, "Service Unavailable")

    return lambda: monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", unanswered)


def test_no_answer_of_a_bucket_is_neither_no_nor_a_missing_file(bucket, outage):
    path = as_path(bucket) / "words.txt"
    path.write_text("there")
    assert path.exists()
    assert path.is_file()
    assert path.parent.is_dir()
    outage()
    for ask in (
        path.exists,
        path.is_file,
        path.is_dir,
        path.stat,
        path.read_bytes,
        path.unlink,
        lambda: path.write_text("anew"),
        lambda: list(path.parent.iterdir()),
        lambda: list(path.parent.glob("*")),
    ):
        with pytest.raises(AwayError, match="HttpError: Service Unavailable"):
            ask()


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: open_source(f"coco_json:{folder}", "train"),
        lambda folder: read_weights(f"{folder}/weights.pth"),
        lambda folder: describe(f"{folder}/student"),
        lambda folder: load_variables(as_path(folder) / "student"),
        lambda folder: finished_result(STAGE, as_path(folder) / "teacher", "AP"),
        lambda folder: recorded(as_path(folder) / "checkpoints" / "1"),
    ],
    ids=["data", "weights", "a description", "a model", "a stage", "a checkpoint"],
)
def test_what_a_bucket_does_not_answer_for_is_not_taken_for_damaged(read, bucket, outage):
    as_path(bucket)
    outage()
    with pytest.raises(AwayError):
        read(bucket)


def test_an_image_whose_bucket_is_away_asks_for_another_start_and_one_that_is_refused_does_not(
    bucket, server, tmp_path
):
    write(tmp_path, content())
    source = open_source(f"coco_json:{put(server, bucket, tmp_path)}", "train")
    for error, kind in ((connection_error("refused"), UnreachedError), (OSError("Forbidden: 5.png"), StorageError)):
        failing = dataclasses.replace(source, read=lambda row, error=error: refuse(error))
        with pytest.raises(kind, match=r"5\.png.* cannot be read any more \((refused|Forbidden: 5\.png)\)"):
            failing[0]


def refuse(error):
    raise error


def test_paths_keep_their_scheme_and_a_bucket_that_is_not_there_is_refused(server, bucket):
    assert str(as_path(bucket) / "x") == str(as_path(Path(bucket)) / "x") == str(as_path(as_path(bucket + "/x")))
    assert str(as_path("gs://bucket")) == str(as_path("gs://bucket/")) == "gs://bucket"
    with pytest.raises(UserError, match=r"^gs://elsewhere cannot be reached \(FileNotFoundError: .*: check its name"):
        check_workdir(as_path("gs://elsewhere/run"))
    check_workdir(as_path(bucket))
    assert written(server, bucket) == ["PUT .writable", "DELETE .writable"]
    assert not Path("gs:").exists()


def test_a_bucket_of_others_is_one_sentence(server, caplog):
    with pytest.raises(UserError, match=r"^gs://private cannot be reached \(HttpError: Anonymous caller does not have"):
        as_path("gs://private/data")
    assert not caplog.records


def test_a_workdir_needs_the_bucket_itself_and_what_is_written_there_can_be_removed(server, bucket, monkeypatch):
    """Orbax asks for the bucket, as reading and writing objects does not; and a run removes old checkpoints."""
    import gcsfs

    asking = gcsfs.GCSFileSystem._request

    async def kept(client, method, *given, **named):
        if method == "DELETE":
            raise OSError("Forbidden: nobody does not have storage.objects.delete access")
        return await asking(client, method, *given, **named)

    server.put("objects", "data/a", b"")
    assert as_path("gs://objects/data/a").exists()
    with pytest.raises(StorageError, match=r"^--workdir=gs://objects/run cannot be used .*storage\.buckets\.get"):
        check_workdir(as_path("gs://objects/run"))
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", kept)
    with pytest.raises(
        StorageError, match=rf"^Nothing can be removed from --workdir={bucket} .*storage\.objects\.delete"
    ):
        check_workdir(as_path(bucket))


def test_the_folders_that_a_console_makes_are_no_files(server, bucket):
    folder = as_path(bucket)
    for name in ("1/", "1/inner/", "1/inner/file", "1/1"):
        data = b"" if name.endswith("/") else b"x"
        server.put("bucket", f"{bucket.removeprefix('gs://bucket/')}/{name}", data)
    move(folder / "1", folder / "2")
    assert sorted(str(file.relative_to(folder)) for file in files_in(folder)) == ["2/1", "2/inner/file"]


def test_a_cache_in_a_bucket_that_the_environment_names_goes_through_our_client_too(monkeypatch):
    """JAX looks there at the first connection, and what is taken for it is taken from then on."""
    done = []
    monkeypatch.setattr(main, "connect", lambda *_: done.append("connect"))
    monkeypatch.setattr(main.paths, "take_client", lambda url: done.append(url))
    monkeypatch.setattr(main, "cache_compilations", lambda _: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    flags.FLAGS.mark_as_parsed()
    main.begin()
    assert done == ["gs://bucket/xla", "connect"]


class _Away:
    """Makes no batch, as its bucket is away."""

    source, most_bytes = None, 1

    def __call__(self, *_):
        import fsspec

        raise http_error(503 if "kdjax" in type(fsspec.filesystem("gcs")).__module__ else 400, "away")


def test_a_bucket_that_is_away_from_a_process_that_prepares_images_is_one_that_is_away(bucket):
    as_path(bucket)
    with pytest.raises(UnreachedError, match=r"^A bucket cannot be reached any more \(HttpError: away"):
        next(from_processes(_Away(), first_step=0, processes=1))


def test_a_workdir_whose_owner_cannot_be_read_is_not_taken(bucket, monkeypatch):
    """A refused question is no answer: somebody may be in it."""
    import gcsfs

    asking = gcsfs.GCSFileSystem._request

    async def unread(client, method, *given, **named):
        if method == "GET" and any(".lock" in str(x) for x in given):
            raise http_error(503, "Service Unavailable")
        return await asking(client, method, *given, **named)

    owner = {"pid": 1, "host": "elsewhere", "started": "", "renewed": time.time(), "token": "theirs"}
    (as_path(bucket) / ".lock").write_text(json.dumps(owner))
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", unread)
    with pytest.raises(AwayError, match="Service Unavailable"):
        take(as_path(bucket))
    monkeypatch.undo()
    assert json.loads((as_path(bucket) / ".lock").read_text()) == owner


def test_metrics_are_written_whole_and_a_resumed_run_keeps_what_it_had(server, bucket):
    file = as_path(bucket) / "metrics.jsonl"
    with MetricWriter(bucket, clock=lambda: 0.0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": {"box": float(step)}})
            assert len(file.read_text().splitlines()) == step
    with MetricWriter(bucket, step=2, clock=lambda: 0.0, sinks=()) as writer:
        writer.write(3, {"loss": {"box": np.nan}})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["loss/box"]) for row in rows] == [(1, 1), (2, 2), (3, None)]
    assert any("events.out.tfevents" in entry for entry in written(server, bucket))


def test_arrays_are_described_last_and_what_was_not_finished_is_none(server, bucket):
    params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2))}}
    folder = as_path(bucket) / "method"
    for number in (1.0, 2.0):
        save_method(folder, jax.tree.map(lambda x, by=number: x * by, params), {"name": "mgd"})
        jax.tree.map(
            np.testing.assert_array_equal, load_method(folder), jax.tree.map(lambda x, by=number: x * by, params)
        )
        assert written(server, str(folder))[-1] == "PUT method.json"
    again = written(server, str(folder))
    assert again.index("DELETE method.json") < min(k for k, entry in enumerate(again) if "DELETE variables" in entry)
    (folder / "method.json").unlink()
    with pytest.raises(UserError, match="holds no method"):
        load_method(str(folder))
    with pytest.raises(UserError, match="holds no kdjax model"):
        describe(folder)


def test_a_model_is_copied_with_its_description_last(server, bucket):
    source, target = as_path(bucket) / "model", as_path(bucket) / "student"
    save_model(source, {"params": {"a": jnp.arange(3.0)}}, describe_model({"name": "x"}, ["cat"], (64, 64)))
    copy_model(source, target)
    assert describe(target) == describe(source)
    np.testing.assert_array_equal(load_variables(str(target))["params"]["a"], [0, 1, 2])
    assert written(server, str(target))[-1] == "PUT model.json"
    assert sorted(path.relative_to(source) for path in files_in(source)) == sorted(
        path.relative_to(target) for path in files_in(target)
    )


MARK = "commit_success.txt"
"""Orbax's last file of a step in a bucket."""


# What the client was about to write when it was cut off: Python 3.13 tells of its memory.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.BytesIO object:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("away", slow_but({"1"}, ["1", "1.replaced"]))
def test_a_step_that_is_moved_is_whole_wherever_that_is_cut_off(bucket, away, monkeypatch):
    """Once to where it is kept while it is saved anew, and once back."""
    import gcsfs

    name = {"1": "1.replaced", "1.replaced": "1"}[away]
    asking, left = gcsfs.GCSFileSystem._request, math.inf

    async def answered(client, method, *given, **named):
        nonlocal left
        left -= method != "GET"
        if left < 0:
            raise http_error(503, "Service Unavailable")
        return await asking(client, method, *given, **named)

    files = {file: f"of {file}" for file in ("rest/a", "rest/d/b", "student/c", MARK, f"student/{MARK}")}
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", answered)
    for allowed in itertools.count():
        folder = as_path(bucket) / str(allowed)
        for file, text in files.items():
            (folder / away / file).write_text(text)
        left = allowed
        with contextlib.suppress(AwayError):
            move(folder / away, folder / name, MARK)
        finished, left = left >= 0, math.inf
        with Checkpoints(folder, metric="AP") as checkpoints:
            assert checkpoints.latest() == 1
        assert {str(file.relative_to(folder)): file.read_text() for file in files_in(folder)} == {
            f"1/{file}": text for file, text in files.items()
        }
        if finished:
            break
    gc.collect()  # Or it would be told of in another test.
    assert allowed >= 2 * len(files)


def test_json_and_pictures_are_written(bucket):
    write_json(f"{bucket}/m.json", {"AP": np.float32(0.5)})
    assert json.loads((as_path(bucket) / "m.json").read_text()) == {"AP": 0.5}
    save_contact_sheet(f"{bucket}/p.png", [Drawing(np.zeros((8, 8, 3), np.uint8))])
    assert (as_path(bucket) / "p.png").read_bytes().startswith(b"\x89PNG")


LAYOUTS = {f"yolo {name}": ("yolo:", *layout) for name, layout in test_yolo.LAYOUTS.items()}
LAYOUTS |= {f"voc {name}": ("voc:", *layout) for name, layout in test_voc.LAYOUTS.items()}
_MAP = test_map_folders.map_of(test_map_folders.truth(0, size=(30, 40)))
LAYOUTS |= {
    "classes": ("class_folders:", {f"train/{kind}/{k}.png": None for kind in "ab" for k in range(2)}, "train"),
    "maps": (
        "index_maps:",
        {"classes.txt": "a\nb\nc\n", "images/val/sub/a.png": None, "labels/val/sub/a.png": _MAP},
        "validation",
    ),
}


def same_data(name, folder, bucket, split):
    """A split of data in a bucket, which must be that in a folder."""
    ours, theirs = (open_source(f"{name}{place}", split) for place in (bucket, folder))
    assert ours.fingerprint == theirs.fingerprint
    np.testing.assert_array_equal(ours[0].image, theirs[0].image)
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peoples_own_data_are_the_same_as_in_a_folder(server, bucket, tmp_path, layout):
    kind, files, split = LAYOUTS[layout]
    test_yolo.put(tmp_path, files)
    same_data(kind, tmp_path, put(server, bucket, tmp_path), split)


@pytest.mark.parametrize("layout", ["yolo ultralytics", "voc voc", "classes", "maps"])
def test_processes_read_a_bucket_together_and_folders_alone(server, bucket, tmp_path, layout, monkeypatch):
    kind, files, split = LAYOUTS[layout]
    test_yolo.put(tmp_path, files)
    put(server, bucket, tmp_path)
    monkeypatch.setattr("kdjax.data.indexed._MEASURED", 0)  # Of a few images each process looks at the values.

    def read(processes, place):
        """What each process found, and how often each file of an image was read."""
        server.read.clear()
        checks = Checks(together=True)
        found = as_processes(processes, lambda: everywhere(lambda: open_source(f"{kind}{place}", split, checks=checks)))
        of_images = Counter(name for name in server.read if name.endswith((".png", ".xml", "a.txt", "b.txt")))
        return [json.dumps(source.report_dict()) for source in found], of_images

    [alone], once = read(1, bucket)
    both, together = read(2, bucket)
    assert both == [alone] * 2
    assert together == once != Counter()
    assert read(2, tmp_path)[0] == [alone.replace(bucket, str(tmp_path))] * 2


def told(name):
    """What is said of the training split of data."""
    try:
        return json.dumps(open_source(name, "train").report_dict())
    except UserError as error:
        return str(error)


def test_cocos_data_are_the_same_and_what_is_wrong_with_them_is_said(server, bucket, tmp_path):
    write(tmp_path, content() | {"images": [dict(x, file_name=f"A/{x['id']}.png") for x in content()["images"]]})
    (tmp_path / "train" / "A").rename(tmp_path / "train" / "a")
    put(server, bucket, tmp_path)
    source = same_data("coco_json:", tmp_path, bucket, "train")
    assert [source.name(k) for k in range(3)] == ["a/5.png", "a/7.png", "a/9.png"]
    assert len(open_source(f"coco_json:{bucket.rpartition('/')[2]}", "train[:2]", "gs://bucket")) == 2
    for name, data in {"empty": b"", "cut": encoded(30, 40)[:-100], "none": None, "text": b"text"}.items():
        (tmp_path / "train" / "a" / "7.png").unlink()
        if data is not None:
            (tmp_path / "train" / "a" / "7.png").write_bytes(data)
        put(server, f"{bucket}{name}", tmp_path)
        theirs, ours = (
            told(f"coco_json:{place}").replace(str(place), "DATA") for place in (tmp_path, f"{bucket}{name}")
        )
        assert ours == theirs
        assert "7.png" in ours
        (tmp_path / "train" / "a" / "7.png").touch()
    with pytest.raises(UserError, match=r"coco_json:gs://bucket/nothing is no folder that can be read"):
        open_source("coco_json:gs://bucket/nothing", "train")


def test_data_that_tfds_has_prepared_are_read(server, bucket, data_dir):
    theirs = open_source("shapes/tiny", "train", data_dir)
    ours = open_source("shapes/tiny", "train", put(server, bucket, data_dir))
    assert ours.fingerprint == theirs.fingerprint
    np.testing.assert_array_equal(ours[3].image, theirs[3].image)
    with pytest.raises(
        UserError, match=r"shapes is not in gs://bucket/none/.*: generate it in a local config.data.data"
    ):
        open_source("shapes/tiny", "train", "gs://bucket/none")


def test_weights_of_every_format_are_read(server, bucket, tmp_path):
    from safetensors.numpy import save_file

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    save_file(arrays, tmp_path / "w.safetensors")
    write_pth(tmp_path / "w.pth", arrays)
    (tmp_path / "w.json").write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "w.safetensors")}))
    put(server, bucket, tmp_path)
    for file in ("w.npz", "w.safetensors", "w.pth", "w.json"):
        tensors = read_weights(f"{bucket}/{file}").tensors
        jax.tree.map(np.testing.assert_array_equal, tensors, arrays)
    with pytest.raises(UserError, match=r"The weights in gs://bucket/.*none.pth cannot be read"):
        read_weights(f"{bucket}/none.pth")


def test_the_compile_cache_is_in_a_workdir_in_a_bucket_unless_it_is_said(bucket, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache_compilations(bucket)
    assert found == {"jax_compilation_cache_dir": f"{bucket}/xla", "jax_persistent_cache_enable_xla_caches": "none"}
    found.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    cache_compilations(bucket)
    assert found == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache_compilations("runs/first")
    assert list(found) == ["jax_compilation_cache_dir"]
    assert "://" not in found["jax_compilation_cache_dir"]


def rows(workdir, stage):
    lines = (as_path(workdir) / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in DIFFERENT} for line in lines]


@pytest.mark.slow
def test_a_run_in_a_bucket_that_was_killed_ends_as_one_in_a_folder(server, bucket, tmp_path, monkeypatch):
    """Training, checkpoints, a kill, resuming, export, loading and evaluation."""
    [(code, _, stderr)] = ended(started(training(tmp_path / "run"), processes=1))
    assert code == 0, stderr
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    [running] = started(training(f"{bucket}/run"), processes=1)
    for line in running.stdout:
        if "[student] step 5/6" in line:
            running.kill()
            break
    assert ended([running])[0][0] == -signal.SIGKILL
    assert any("/xla/" in entry for entry in server.asked)
    [(code, told, stderr)] = ended(started(training(f"{bucket}/run"), processes=1))
    assert code == 0, stderr
    assert "continues from the checkpoint of step" in told
    for stage in ("teacher", "student"):
        assert rows(f"{bucket}/run", stage) == rows(tmp_path / "run", stage)
    assert describe(f"{bucket}/run/student")["sha256"] == describe(tmp_path / "run" / "student")["sha256"]
    assert not Path(ROOT / "gs:").exists()
    _, variables = kdjax.load_student(f"{bucket}/run/student")
    jax.tree.map(np.testing.assert_array_equal, variables, kdjax.load_student(tmp_path / "run" / "student")[1])
    # Last in its stage, of everything.
    of_student = [entry for entry in written(server, f"{bucket}/run/stages/student") if "events" not in entry]
    assert of_student[-1] == "PUT result.json"
    evaluation = [sys.executable, "-m", "kdjax.evaluate", f"--model={bucket}/run/student", "--config=mgd:tiny"]
    subprocess.run([*evaluation, f"--json={bucket}/m.json"], cwd=ROOT, check=True, env=dict(os.environ))
    summary = json.loads((as_path(bucket) / "run" / "summary.json").read_text())
    assert json.loads((as_path(bucket) / "m.json").read_text())["AP"] == pytest.approx(summary["student"]["AP"])


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["there", "elsewhere"])
def test_a_bucket_that_one_process_may_not_read_ends_both_with_its_sentence(bucket, cached, monkeypatch):
    if cached == "there":
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    flags = training(f"{bucket}/run")
    for code, _, stderr in ended(
        started(flags, processes=2, of_each=lambda process: ["--workdir=gs://private/run"] * process)
    ):
        assert code == Exit.STORAGE, stderr
        assert "gs://private cannot be reached (HttpError: Anonymous caller does not have" in stderr


@pytest.mark.slow
def test_two_processes_share_a_bucket_with_its_data_and_what_is_compiled_and_go_on_there(
    server, bucket, data_dir, monkeypatch
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    open_source("shapes/tiny", "train", data_dir)
    put(server, f"{bucket}/data", data_dir)
    for code, _, stderr in killed_and_resumed(bucket, f"--config.data.data_dir={bucket}/data"):
        assert code == 0, stderr
    cached = {entry.partition(" ")[2] for entry in server.asked if "/xla/" in entry and "-cache" in entry}
    # The main process alone writes; at the second start each of the two reads what the first one compiled.
    taken = Counter(name for name in server.read if name in cached)
    assert max(taken.values()) >= 2
    assert describe(f"{bucket}/student")["class_names"]
    assert [row["step"] for row in rows(bucket, "student")] == list(range(1, 7))


def test_of_those_that_want_a_workdir_in_a_bucket_at_once_one_has_it(server, bucket, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLING", 0.5)
    as_path(bucket)
    for _ in range(2):
        assert len(contend(as_path(bucket), 4)) == 3
        assert written(server, bucket)[-1] == "DELETE .lock"


def test_a_workdir_in_a_bucket_whose_owner_was_killed_is_taken_over(server, bucket, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLING", 0.0)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    dead = {"pid": gone.pid, "host": platform.node(), "started": "", "renewed": time.time(), "token": "dead"}
    (as_path(bucket) / ".lock").write_text(json.dumps(dead))
    with take(as_path(bucket)):
        pass
    # Of one on another host nobody knows, before three minutes have passed.
    (as_path(bucket) / ".lock").write_text(json.dumps(dead | {"host": "elsewhere"}))
    with pytest.raises(UserError, match=f"by process {gone.pid} on elsewhere.*start again in three") as refused:
        take(as_path(bucket))
    assert refused.value.exit_code == Exit.AGAIN
    (as_path(bucket) / ".lock").write_text(json.dumps(dead | {"host": "elsewhere", "renewed": time.time() - 181}))
    take(as_path(bucket)).close()


def test_what_is_damaged_of_a_finished_stage_in_a_bucket_is_set_aside(bucket):
    folder = finished_stage(as_path(bucket) / "student")
    assert finished_result(STAGE, folder, "AP")["steps"] == 4
    (folder / "checkpoints" / "4" / "x").write_text("")
    for name in ("result.json", "predictions.json", "model/model.json"):
        finished_stage(folder)
        (folder / name).write_text("{")
        assert finished_result(STAGE, folder, "AP") is None
        aside = name.partition("/")[0]
        assert (folder / f"{aside}.corrupt").exists()
        assert not (folder / aside).exists()
        assert not (folder / "result.json").exists()
    assert (folder / "model.corrupt" / "model.json").read_text() == "{"
