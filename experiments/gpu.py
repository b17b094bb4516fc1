"""Training steps on one GPU, beside PyTorch doing the same work: ``python -m experiments.gpu --output=gpu.json``.

A rented GPU is paid by the minute: what matters most is measured first, everything that is measured is written at once,
what has not ended after ``--minutes`` is ended, and what the output already has is not measured again. Each
case runs in a process of its own, so that its memory is its own and one that finds no room stops nothing. Images are
random and lie on the GPU; weights are random as well. The processes share JAX's cache of compiled programs and of
what was found fastest for an operation: cases after the first of a dtype compile in less time than they would alone.

Of every case: seconds to compile, images a second (the median of ten steps), the share of the GPU's published peak that
the operations of these images are, as the step is written, and memory: of ours what the compiler plans for the step, of
PyTorch's its allocator's peak. PyTorch's cases are torchvision's RetinaNet as student and teacher with MGD's formula,
channels last, under autocast for bfloat16, backbones compiled by ``torch.compile``; without torch and torchvision they
are left out by name. ``pip install -e '.[cuda]'`` is all that ours need. ``--tiny`` tries it on a CPU.
"""

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from kdjax.benchmark import parts_of
from kdjax.config import load_config
from kdjax.files import write_json
from kdjax.plan import Plan, resolve
from kdjax.run.lowered import written_flops
from kdjax.types import Batch

_OUTPUT = flags.DEFINE_string("output", "gpu.json", "JSON file for all cases.")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "What has not ended by then is ended.")
_TINY = flags.DEFINE_bool("tiny", False, "Small images, small detectors and two of everything, to try the script.")
_TRACE = flags.DEFINE_string(
    "trace", "", "Folder for a profile of three steps of each of our cases, as XProf reads it."
)
_CASE = flags.DEFINE_string("case", "", "Run this one here, given as JSON; the script does that for itself.")
_COUNT = flags.DEFINE_bool("count", False, "Count the operations of all cases here; the script does that for itself.")

_PEAKS = {
    r"H100 80GB HBM3|H200$": (989e12, 495e12),
    r"H100 PCIe": (756e12, 378e12),
    r"A100": (312e12, 156e12),
    r"L40S": (362e12, 183e12),
    r"L4": (121e12, 60e12),
}
"""Published dense peaks of bfloat16 and of TF32, operations a second, by the words of the device's name."""
_STEPS, _WARM, _TRACED = 10, 3, 3
_CLASSES = 80
_TEACHERS = {"retinanet_r101_r50": "resnet101", "retinanet_x101_r50": "resnext101_64x4d"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    framework: str
    method: str
    pair: str
    dtype: str
    batch: int
    tiny: bool = False


def cases(tiny: bool) -> list[Case]:
    """What is measured, the most important first."""
    r101, x101 = _TEACHERS
    pairs = [(framework, dtype) for dtype in ("bfloat16", "float32") for framework in ("kdjax", "torch")]
    wanted = [Case(framework, "mgd", r101, dtype, 8) for framework, dtype in pairs]
    wanted += [Case(framework, "mgd", x101, "bfloat16", 8) for framework in ("kdjax", "torch")]
    wanted += [Case("kdjax", method, r101, "bfloat16", 8) for method in ("icd", "maskd", "dmkd", "dfmsd", "mimic")]
    wanted += [Case(framework, "mgd", r101, "bfloat16", 32) for framework in ("kdjax", "torch")]
    wanted += [Case("kdjax", "none", r101, "bfloat16", 8), Case("kdjax", "mgd", x101, "float32", 8)]
    batches = (64, 128, 16, 2)
    wanted += [Case(framework, "mgd", r101, "bfloat16", batch) for batch in batches for framework in ("kdjax", "torch")]
    return [dataclasses.replace(case, batch=2, tiny=True) for case in wanted[:3]] if tiny else wanted


def plan_of(case: Case) -> Plan:
    """The plan of a case on the devices that are here."""
    config = load_config(f"{case.method}:{case.pair}{':tiny' * case.tiny}")
    for name in config.stages:
        config[name].update(batch_size=case.batch, dtype=case.dtype)
    config.eval_batch_size = jax.device_count()
    return resolve(config, devices=jax.device_count())


def random_batch(plan: Plan, images: int) -> Batch:
    """Noise, and ten boxes in every image."""
    rng, (height, width) = np.random.default_rng(0), plan.data.sizing.shapes[0]
    targets = plan.task.targets(images, (height, width))
    count = min(10, targets.valid.shape[1])
    corner = rng.uniform(0, 0.5, (images, count, 2)) * (width, height)
    targets.boxes[:, :count] = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, corner.shape) * height], axis=-1)
    targets.labels[:, :count], targets.valid[:, :count] = rng.integers(0, _CLASSES, (images, count)), True
    pixels = rng.integers(0, 256, (images, height, width, 3), np.uint8)
    size = np.tile(np.array([height, width], np.int32), (images, 1))
    return Batch(pixels, size, np.arange(images, dtype=np.int32), targets)  # type: ignore[arg-type]


def measure_kdjax(case: Case) -> dict[str, Any]:
    """The distillation step of a case, or the student's where nobody teaches."""
    plan = plan_of(case)
    parts = parts_of(plan, random_batch(plan, case.batch), _CLASSES)
    part = list(parts.values())[-1]()
    seconds = [part.call() for _ in range(_WARM + _STEPS)][_WARM:]
    if _TRACE.value:
        with jax.profiler.trace(str(Path(_TRACE.value) / "_".join(map(str, vars(case).values())))):
            for _ in range(_TRACED):
                part.call()
    device, memory = jax.devices()[0], part.compiled.memory_analysis()
    return {
        "device": device.device_kind,
        "compile_seconds": part.compile_seconds,
        "images_per_second": case.batch / statistics.median(seconds),
        "memory_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }


def measure_torch(case: Case) -> dict[str, Any]:
    """The RetinaNet of torchvision, taught by another one's pyramid by MGD's formula."""
    import torch
    from torch import nn
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    cuda = torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    def retinanet(backbone: str) -> Any:
        last = LastLevelP6P7(256, 256)
        pyramid = resnet_fpn_backbone(
            backbone_name=backbone, weights=None, returned_layers=[2, 3, 4], extra_blocks=last, trainable_layers=3
        )
        return RetinaNet(pyramid, _CLASSES).to(place, memory_format=torch.channels_last)

    student = retinanet("resnet18" if case.tiny else "resnet50").train()
    teacher = retinanet("resnet18" if case.tiny else _TEACHERS[case.pair]).eval()
    generation = nn.ModuleList(
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1)) for _ in range(5)
    ).to(place, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([*student.parameters(), *generation.parameters()], lr=1e-6, momentum=0.9)
    height, width = (64, 64) if case.tiny else (800, 1344)
    images = torch.randn(case.batch, 3, height, width, device=place).to(memory_format=torch.channels_last)
    corner = torch.rand(10, 2, device=place) * height / 2
    target = {"boxes": torch.cat([corner, corner + height / 4], 1), "labels": torch.arange(10, device=place)}
    listed = ImageList(images, [(height, width)] * case.batch)
    see, teach = (torch.compile(model.backbone) if cuda else model.backbone for model in (student, teacher))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            features = list(see(images).values())
            outputs = student.head(features)
            with torch.no_grad():
                taught = list(teach(images).values())
            terms = []
            for generate, ours, theirs in zip(generation, features, taught, strict=True):
                keep = torch.rand(len(ours), 1, *ours.shape[2:], device=place) < 0.35
                terms.append((generate(ours * keep).float() - theirs.float()).square().sum() / len(ours))
        outputs = {name: x.float() for name, x in outputs.items()}
        anchors = student.anchor_generator(listed, features)
        losses = student.compute_loss([target] * case.batch, outputs, anchors)
        (sum(losses.values()) + 2e-5 * sum(terms)).backward()
        optimizer.step()

    def timed() -> float:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = timed()
    seconds = [timed() for _ in range(_WARM + _STEPS)][_WARM:]
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "compile_seconds": first - statistics.median(seconds),
        "images_per_second": case.batch / statistics.median(seconds),
        "memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


_FRAMEWORKS: dict[str, Callable[[Case], dict[str, Any]]] = {"kdjax": measure_kdjax, "torch": measure_torch}


def count(wanted: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Operations of an image, the same in every framework, dtype and batch: by "method:pair" and by part."""
    distinct = {f"{case.method}:{case.pair}": dataclasses.replace(case, batch=jax.device_count()) for case in wanted}
    return {name: written_flops(plan_of(case), share=1, classes=_CLASSES) for name, case in distinct.items()}


def with_share(result: dict[str, Any], flops: dict[str, Any]) -> dict[str, Any]:
    """A result with its operations, and the part of a known device's published peak that it reaches."""
    of = flops.get(f"{result['method']}:{result['pair']}")
    if "failed" in result or not of:
        return result
    device = result["device"]
    each, peaks = sum(of.values()), [peaks for name, peaks in _PEAKS.items() if re.search(rf"\b({name})\b", device)]
    rate = result["images_per_second"] * each
    share = rate / peaks[0][result["dtype"] == "float32"] if peaks else None
    return {**result, "flops_per_image": each, "flops_per_image_of": of, "share_of_peak": share}


def own_process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """This script with other arguments, in a process of its own, which sees one GPU: PyTorch would take no more."""
    command = [sys.executable, "-m", "experiments.gpu", *arguments]
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": one, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def said_by(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """What a process printed last, or why it gives nothing; it is ended after so many seconds."""
    try:
        output, errors = process.communicate(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": "no time"}
    if process.returncode:
        no_room = any(sign in errors for sign in ("RESOURCE_EXHAUSTED", "OutOfMemoryError"))
        return {"failed": "no room" if no_room else errors[-500:].strip() or f"exit code {process.returncode}"}
    return json.loads(output.splitlines()[-1])


def missing(case: Case) -> list[str]:
    """What a case needs and cannot import."""
    return [name for name in ("torch", "torchvision") if case.framework == "torch" and not util.find_spec(name)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row for each case."""
    columns = ("case", "device", "batch", "images/s", "share of peak", "compile s", "memory GB")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for x in results:
        name = f"| {x['framework']} {x['method']}:{x['pair']} {x['dtype']} | {x.get('device', '')} | {x['batch']} |"
        if "failed" in x:
            rows.append(f"{name} {x['failed'].splitlines()[-1]} |")
            continue
        share = "" if x.get("share_of_peak") is None else f"{x['share_of_peak']:.0%}"
        memory = "" if x["memory_bytes"] is None else f"{x['memory_bytes'] / 1e9:.1f}"
        rows.append(f"{name} {x['images_per_second']:.1f} | {share} | {x['compile_seconds']:.0f} | {memory} |")
    return "\n".join(rows)


def measured(output: Path) -> dict[Case, dict[str, Any]]:
    """What an earlier start has measured."""
    known = json.loads(output.read_text())["cases"] if output.exists() else []
    fields = [field.name for field in dataclasses.fields(Case)]
    return {Case(**{name: x.pop(name) for name in fields}): x for x in known if "failed" not in x}


def main(_: Sequence[str]) -> None:
    """Runs the cases while there is time, and prints the table."""
    wanted, output = cases(_TINY.value), Path(_OUTPUT.value)
    if _CASE.value:
        case = Case(**json.loads(_CASE.value))
        print(json.dumps(_FRAMEWORKS[case.framework](case)))
        return
    if _COUNT.value:
        print(json.dumps(count(wanted)))
        return
    started, known = time.monotonic(), measured(output)
    end = started + 60 * _MINUTES.value
    results: list[dict[str, Any]] = []
    counting: subprocess.Popen[str] | None = None
    flops: dict[str, Any] = {}
    with contextlib.ExitStack() as ending:
        cache = ending.enter_context(tempfile.TemporaryDirectory())
        for case in wanted:
            if case in known:
                said: dict[str, Any] = known[case]
            elif lacking := missing(case):
                said = {"failed": f"{' and '.join(lacking)} cannot be imported"}
            elif time.monotonic() > end:
                said = {"failed": "no time"}
            else:
                own = own_process(
                    f"--case={json.dumps(vars(case))}", f"--trace={_TRACE.value}", JAX_COMPILATION_CACHE_DIR=cache
                )
                said = said_by(own, end - time.monotonic())
            results.append({**vars(case), **said})
            print(table(results[-1:]).splitlines()[-1], flush=True)
            if counting is None:  # Not earlier, as the first case's compile time is measured.
                counting = own_process("--count", f"--tiny={_TINY.value}", JAX_PLATFORMS="cpu")
                ending.callback(counting.kill)
            if not flops and (counting.poll() is not None or case == wanted[-1]):
                flops = said_by(counting, end - time.monotonic())
                if "failed" in flops:
                    print(f"Operations are not counted: {flops['failed']}", flush=True)
            results = [with_share(x, flops) for x in results]
            write_json(output, {"minutes": (time.monotonic() - started) / 60, "cases": results})
    print(table(results))


if __name__ == "__main__":
    app.run(main)
