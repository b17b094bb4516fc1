"""Losses against the formulas written out: ``python -m experiments.losses``, at 800x1344, P3..P7, 256 channels.

Each is compiled with its gradient and timed in turn with its naive or its bare counterpart, in one process: MasKD
against the (N, H, W, K, C) tensor and the 3x3 convolution, with which it must agree; MGD, DMKD and DFMSD against their
convolutions alone; ICD's temporary memory against the size of one attention tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.measure import check_agree, measure
from kdjax.distill import sums
from kdjax.losses import maskd_loss, token_masks, token_weights, uniform_statistics
from kdjax.methods import build_method
from kdjax.types import Targets, View

CHANNELS, TOKENS, HEIGHT, WIDTH = 256, 6, 800, 1344

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", ["maskd", "mgd", "dmkd", "dfmsd", "icd"], "Which losses.")


def pyramid(seed: int) -> dict[str, jax.Array]:
    """Random features of one image."""
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = {f"p{level}": (-(-HEIGHT // 2**level), -(-WIDTH // 2**level)) for level in range(3, 8)}
    return {
        level: jax.random.normal(key, (1, *size, CHANNELS))
        for key, (level, size) in zip(keys, sizes.items(), strict=True)
    }


def naive_maskd(student: Any, teacher: Any, tokens: Any, kernels: Any, biases: Any) -> jax.Array:
    """MasKD's formulas as they stand in the paper: every token's masked difference, and the 3x3 convolution."""
    hidden = jax.lax.conv_general_dilated(
        teacher, kernels[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    pooled = jnp.mean(hidden + biases[0], axis=(1, 2))
    weights = jax.nn.softmax(pooled @ kernels[1][0, 0] + biases[1])
    masks = token_masks(teacher, tokens)
    difference = masks[..., None] * (student - teacher)[..., None, :]  # (N, H, W, K, C)
    distance = jnp.sum(jnp.mean(jnp.square(difference), axis=-1), axis=(1, 2)) / jnp.sum(masks, axis=(1, 2))
    return jnp.mean(jnp.sum(weights * distance, axis=-1))


def fast_maskd(student: Any, teacher: Any, tokens: Any, kernels: Any, biases: Any) -> jax.Array:
    """The same by kdjax."""
    weights = token_weights(teacher, kernels, biases)
    return maskd_loss(student, teacher, tokens=tokens, weights=weights, step=0, warmup=1)


def compare(title: str, ours: Callable[..., Any], other: Callable[..., Any], arguments: Sequence[Any]) -> str:
    """A row: time and temporary memory of both, values and gradients of ``arguments[0]``."""
    own, others = measure([jax.value_and_grad(f) for f in (ours, other)], arguments, _ROUNDS.value)
    figures = (
        *(own.ms, others.ms, others.ms / own.ms),
        *(own.cpu_ms, others.cpu_ms, others.cpu_ms / own.cpu_ms),
        *(own.mib, others.mib, others.mib / max(own.mib, 1e-9)),
    )
    return " | ".join([f"| {title}", *(f"{x:.0f}" if x >= 100 else f"{x:.2f}" for x in figures), ""]).strip()


def maskd_row() -> str:
    """MasKD over all levels."""
    keys = jax.random.split(jax.random.key(2), 3)
    tokens = 0.01 * jax.random.normal(keys[0], (TOKENS, CHANNELS))
    kernels = (
        0.02 * jax.random.normal(keys[1], (3, 3, CHANNELS, CHANNELS)),
        0.1 * jax.random.normal(keys[2], (1, 1, CHANNELS, TOKENS)),
    )
    biases = jnp.zeros(CHANNELS), jnp.zeros(TOKENS)

    def over_levels(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def total(student: Any, teacher: Any, *rest: Any) -> jax.Array:
            return sum((loss(student[level], teacher[level], *rest) for level in student), jnp.zeros(()))

        return total

    arguments = (pyramid(0), pyramid(1), tokens, kernels, biases)
    fast, naive = over_levels(fast_maskd), over_levels(naive_maskd)
    row = compare("maskd, naive", fast, naive, arguments)
    check_agree([jax.value_and_grad(fast), jax.value_and_grad(naive)], arguments)
    return row


def method_row(name: str) -> str:
    """A method of dual or single generation against its convolutions alone."""
    params, ours, teacher = _method(name)
    student = pyramid(0)

    def convolutions(learnt: Any, teacher: Any) -> jax.Array:
        params, student = learnt
        total = jnp.zeros(())
        for block, weights in params.items():
            if not block.startswith(("generation", "spatial", "channel")):
                continue
            x = student[block.rsplit("_", 1)[-1]]
            for index in (0, 1):
                conv = weights[f"conv_{index}"]["conv"]
                x = jax.lax.conv_general_dilated(
                    x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = x + conv["bias"] if index else jax.nn.relu(x + conv["bias"])
            total += jnp.sum(jnp.square(x))
        return total

    return compare(f"{name}, its convolutions", ours, convolutions, ((params, student), teacher))


def icd_row() -> str:
    """ICD's temporary memory beside one attention tensor, 8 heads and 300 queries over all positions."""
    params, loss, teacher = _method("icd")
    student = pyramid(0)
    compiled = jax.jit(jax.value_and_grad(loss)).lower((params, student), teacher).compile()
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes / 2**20
    positions = sum(x.shape[1] * x.shape[2] for x in student.values())
    tensor = 8 * 300 * positions * 4 / 2**20
    return f"icd: {temporary:.0f} MiB of temporaries; one attention tensor (8, 300, {positions}): {tensor:.0f} MiB"


def _method(name: str) -> tuple[Any, Any, Any]:
    """Parameters, and the method's terms as one number of parameters, student and teacher."""
    method = build_method({"name": name})
    known = {
        "size": jnp.array([[HEIGHT, WIDTH]]),
        "targets": Targets(
            boxes=jnp.tile(jnp.array([[[100.0, 100.0, 500.0, 400.0]]]), (1, 10, 1)),
            labels=jnp.zeros((1, 10), jnp.int32),
            valid=jnp.ones((1, 10), bool),
        ),
        "keys": jax.random.split(jax.random.key(4), 1),
        "step": jnp.int32(10_000),
        "statistics": uniform_statistics(80),
    }
    needed = {need: known[need] for need in method.needs}
    strides = {level: 2 ** int(level[1:]) for level in pyramid(0)}

    def loss(learnt: Any, teacher: Any) -> jax.Array:
        params, student = learnt
        terms = method.apply({"params": params}, View(student, strides), View(teacher, strides), **needed)
        return sum(sums(terms).values(), jnp.zeros(()))

    views = View(pyramid(0), strides), View(pyramid(1), strides)
    return jax.jit(method.init)(jax.random.key(3), *views, **needed)["params"], loss, pyramid(1)


def main(_: Sequence[str]) -> None:
    """Prints the table."""
    device = jax.devices()[0].device_kind
    print(f"One image of {HEIGHT}x{WIDTH}, P3..P7, {CHANNELS} channels, float32; {device}, jax {jax.__version__}\n")
    print("| loss and gradient, beside | ms | beside | ratio | CPU ms | beside | ratio | temp MiB | beside | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in _ONLY.value:
        if name != "icd":
            print(maskd_row() if name == "maskd" else method_row(name), flush=True)
    if "icd" in _ONLY.value:
        print(f"\n{icd_row()}")


if __name__ == "__main__":
    app.run(main)
