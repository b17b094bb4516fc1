"""A run's step compiled for slices of TPUs that are not there, by libtpu, on any Linux machine; nothing runs on one."""

import multiprocessing
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import util
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from kdjax.errors import UsageError, UserError, parsing, quoted
from kdjax.plan import resolve
from kdjax.run.data import is_open
from kdjax.run.lowered import examine, lower_step, written_flops


class CrashedError(UserError):
    """The compiler died or failed over a step; others may compile."""


class Chip(NamedTuple):
    """What is published of a generation of TPUs (cloud.google.com/tpu/docs)."""

    accelerator: str
    """A type of machine with them, which libtpu wants to know."""
    flops: float
    """Peak of bfloat16 a second."""
    hbm: int
    """Bytes of memory that the compiler gives a program: what libtpu 0.0.42 says where there is no room."""
    bandwidth: float
    """Bytes a second between a chip and its memory."""
    links: float
    """Bytes a second between a chip and all its neighbours together."""


CHIPS = {
    "v5e": Chip("v5litepod-8", 197e12, int(15.75 * 2**30), 819e9, 200e9),
    "v5p": Chip("v5p-8", 459e12, int(95.74 * 2**30), 2765e9, 600e9),
    "v6e": Chip("v6e-8", 918e12, int(31.25 * 2**30), 1640e9, 448e9),
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # A quarter of the time to compile, 6 % more memory at the peak, and the same operations.
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def compile_for(
    content: Mapping[str, Any], topology: str, per_chip: int | None, classes: int, in_parts: bool = True
) -> dict[str, Any]:
    """Compiles the step of a config for a topology of TPUs; call it in a process of its own, for libtpu can crash.

    Args:
        content: of the config, plain.
        topology: such as "v5e:2x4".
        per_chip: images of a step on a chip, or None for what the config says.
        classes: of the data.
        in_parts: say as well of how many operations student, teacher and method are, "flops_per_image_of".

    Returns:
        what :func:`examine` does, and "chips", "per_chip" and "classes".

    Raises:
        UsageError: there is no such topology.
        UserError: the config cannot be used.
    """
    from jax.experimental import topologies

    with parsing(UsageError):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = ConfigDict(content)
    config.eval_batch_size = len(devices)
    if per_chip is None:
        alone = resolve(config, devices=1)
        if (images := alone[alone.student].options.batch_size) % len(devices):
            raise UserError(
                f"The {len(devices)} chips of --topology={topology} cannot share the config's {images} images of a "
                "step: say how many each takes, such as --per_chip=8."
            )
    else:
        for stage in config.stages:
            config[stage].batch_size = per_chip * len(devices)
    plan = resolve(config, devices=len(devices))
    if is_open(plan.data, plan.task):
        raise UserError(
            f"A run chooses from {plan.data.name} how large its images are, and nothing is read here: say so, by "
            "--config.data.image_size and --config.data.max_objects, as the run prints them."
        )
    share = plan[plan.student].options.batch_size // len(devices)
    step = lower_step(plan, plan[plan.student], devices, share=share, classes=classes)
    report = {"chips": len(devices), "per_chip": share, "classes": classes, **examine(step, share)}
    if in_parts and report["fits"]:
        report["flops_per_image_of"] = written_flops(plan, share=share, classes=classes)
    return report


def largest(fits: Callable[[int], bool], known: int) -> int:
    """The largest number that fits, 0 where none does; what fits is all up to some number.

    >>> [largest(lambda n: n <= most, 8) for most in (0, 3, 8, 11, 40)]
    [0, 3, 8, 11, 40]

    Args:
        fits: asked as seldom as can be.
        known: where to begin.
    """
    low, high = 0, known
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimated_rate(report: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Images per second of all chips together, and the milliseconds that a step takes at least by each of its limits.

    The roofline (Williams et al., 2009): compute and memory at their published peaks overlap, and a ring's all-reduce,
    which passes every byte twice, does not.
    """
    images = report["per_chip"]
    reduced = sum(
        count * {"bf16": 2, "f16": 2}.get(dtype, 4) for dtype, count in report["all_reduce_elements_by_dtype"].items()
    )
    seconds = {
        "compute": images * report["flops_per_image"] / chip.flops,
        "memory": images * report["traffic_bytes_per_image"] / chip.bandwidth,
        "links": 2 * reduced * (report["chips"] - 1) / report["chips"] / chip.links,
    }
    step = max(seconds["compute"], seconds["memory"]) + seconds["links"]
    return {
        "images_per_second_estimate": report["chips"] * images / step,
        **{f"{name}_milliseconds": 1e3 * x for name, x in seconds.items()},
    }


class _Compiler:
    """Compiles each batch once, each in a process of its own."""

    def __init__(self, content: Mapping[str, Any], topology: str, classes: int):
        self._arguments = content, topology, classes
        self.reports: dict[int | None, dict[str, Any]] = {}

    def __call__(self, per_chip: int | None) -> dict[str, Any]:
        if per_chip not in self.reports:
            content, topology, classes = self._arguments
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    asked = not self.reports  # And not looked for among others.
                    report = pool.submit(compile_for, content, topology, per_chip, classes, asked).result()
            except jax.errors.JaxRuntimeError as error:
                raise CrashedError(
                    f"The TPU compiler failed over --topology={topology} with {per_chip or 'its'} images per chip "
                    f"({quoted(error)}): try another topology or batch, or another version of libtpu."
                ) from error
            except BrokenProcessPool as error:
                raise CrashedError(
                    f"The TPU compiler crashed over --topology={topology} with {per_chip or 'its'} images per chip: "
                    "either it was killed for memory, of which a compile takes up to 5 GB, or that is a fault "
                    "of libtpu; try another topology or batch, or another version of it."
                ) from error
            self.reports[per_chip] = self.reports[report["per_chip"]] = report
            fits = f"fits, {report['peak_bytes'] / 1e9:.2f} GB" if report["fits"] else f"no room: {report['refused']}"
            print(f"{report['per_chip']} images per chip: {fits}", flush=True)
        return self.reports[per_chip]

    def fits(self, per_chip: int) -> bool:
        """Whether a batch has room; one that the compiler crashes over, which is said, counts as none that has."""
        try:
            return self(per_chip)["fits"]
        except CrashedError as error:
            print(error, flush=True)
            return False


def preflight(
    config: ConfigDict, topology: str, *, per_chip: int | None, classes: int, bisect: bool = False
) -> dict[str, Any]:
    """What the step of a config's last stage is for a topology of TPUs.

    Args:
        config: of a run.
        topology: generation and shape, such as "v5e:16x16".
        per_chip: images of a step on a chip; None for what the config says.
        classes: of the data.
        bisect: find the largest batch that fits as well.

    Returns:
        plain JSON: "topology", "chips", "per_chip", "hbm_bytes", and what :func:`examine` and :func:`estimated_rate`
        say; with ``bisect``, and where there is no room, also "largest_batch", of images per chip.

    Raises:
        UsageError: there is no such topology.
        CrashedError: the compiler died or failed over the step that is asked for.
        UserError: what is asked for cannot be compiled.
    """
    chip = _chip(topology)
    os.environ.update(_ENVIRONMENT, TPU_ACCELERATOR_TYPE=chip.accelerator)
    compiler = _Compiler(config.to_dict(), topology, classes)
    report = compiler(per_chip)
    known = {"topology": topology, "hbm_bytes": chip.hbm, **report}
    if bisect or not report["fits"]:
        student = config[config.stages[-1]]
        parts = student.get("accumulate", 1)
        most = largest(lambda images: compiler.fits(images * parts), report["per_chip"] // parts)
        known["largest_batch"] = most * parts
    return known | (estimated_rate(report, chip) if report["fits"] else {})


def _chip(topology: str) -> Chip:
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UsageError(
            f"--topology={topology} is none that is known: it is a generation ({', '.join(CHIPS)}) and a shape, such "
            "as v5e:16x16 or v5p:2x2x2."
        )
    if not util.find_spec("libtpu"):
        raise UserError(
            "The compiler for TPUs, libtpu, is not installed: pip install 'kdjax[preflight]' on Linux, anywhere."
        )
    return CHIPS[generation]


def in_words(report: Mapping[str, Any]) -> str:
    """A report for people, of a step that fits."""
    parts = ", ".join(f"{name} {x / 1e12:.3g}" for name, x in report["flops_per_image_of"].items())
    gigabytes = {name: x / 1e9 for name, x in report.items() if name.endswith(("_bytes", "_bytes_per_image"))}
    loops = report["open_loops"]
    uncounted = f" (one turn of each of {loops} loops that run as often as what they work on asks)" if loops else ""
    lines = [
        f"Compiled for {report['chips']} chips of {report['topology']}, {report['per_chip']} images on each, with "
        f"{report['classes']} classes, in {report['compile_seconds']:.0f} s; nothing ran.",
        f"memory of a chip: {gigabytes['peak_bytes']:.2f} GB at the peak of {gigabytes['hbm_bytes']:.2f} (arguments "
        f"{gigabytes['argument_bytes']:.2f}, temporary {gigabytes['temporary_bytes']:.2f}, results "
        f"{gigabytes['output_bytes']:.2f})",
        f"TFLOP per image: {report['flops_per_image'] / 1e12:.3g} as compiled{uncounted}; as written: {parts}",
        f"traffic to memory per image: {gigabytes['traffic_bytes_per_image']:.2f} GB{uncounted}",
        f"between chips: {report['collectives']} operations, {report['all_reduce_elements']} elements, "
        f"{report['all_reduce_bf16_elements']} of them bfloat16, for {report['trained_parameters']} trained parameters",
        f"estimate from published peaks: at most {report['images_per_second_estimate']:.0f} images/s in all (a step: "
        f"compute {report['compute_milliseconds']:.0f} ms, memory {report['memory_milliseconds']:.0f} ms, links "
        f"{report['links_milliseconds']:.0f} ms)",
    ]
    if "largest_batch" in report:
        lines.append(f"the largest batch that fits: {report['largest_batch']} images per chip")
    return "\n".join(lines)
