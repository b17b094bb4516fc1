"""Programs whose traffic and collectives are known, written by hand and compiled here."""

import os
import subprocess
import sys
from importlib import util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.hlo import collectives, open_loops, read_program, traffic, uncounted_flops
from kdjax.tpu import _ENVIRONMENT, CHIPS

TEXT = """HloModule example, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %values = f32[8]{0} get-tuple-element(%state), index=1
  %doubled = f32[8]{0} add(%values, %values)
  ROOT %next = (s32[], f32[8]{0}) tuple(%count, %doubled)
}

ENTRY %main (x: f32[8], y: bf16[4,2]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(1)
  %reduced = bf16[4,2]{1,0} all-reduce(%y), channel_id=1, to_apply=%sum
  %started = f32[8]{0} all-reduce-start(%x), channel_id=2, to_apply=%sum
  %done = f32[8]{0} all-reduce-done(%started)
  %gathering = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), channel_id=3, dimensions={0}
  %gathered = f32[64]{0} all-gather-done(%gathering)
  %moving = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)
  %moved = f32[8]{0:S(1)} copy-done(%moving)
  %zero = s32[] constant(0)
  %both = (s32[], f32[8]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[8]{0}) while(%both), condition=%some, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_text_is_counted_by_its_operands_results_and_trips():
    program = read_program(TEXT)
    assert program.entry == "main"
    # 16 bytes in and out, three times 32 bytes in and out, and five times two in and one out.
    assert traffic(program) == 2 * 16 + 3 * 2 * 32 + 5 * 3 * 32
    assert collectives(program) == (3, {"bf16": 8, "f32": 16})
    assert open_loops(program) == 0


def test_a_loop_whose_turns_are_not_known_is_counted_once():
    program = read_program(TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
    assert open_loops(program) == 1
    assert traffic(program) == 2 * 16 + 3 * 2 * 32 + 3 * 32


BOUND = """
%some (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%count, %bound), direction=LT
}

ENTRY"""


def test_a_loop_that_counts_to_a_constant_runs_as_often():
    """As for TPUs, whose texts do not say it otherwise."""
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace("ENTRY", BOUND)
    assert open_loops(read_program(text)) == 0
    assert traffic(read_program(text)) == 2 * 16 + 3 * 2 * 32 + 7 * 3 * 32
    both = text.replace("ROOT %less", "%less").replace(
        "direction=LT\n", "direction=LT\n  ROOT %x = pred[] and(%less, %y)\n"
    )
    assert open_loops(read_program(both)) == 1
    assert open_loops(read_program(text.replace("%bound = s32[] constant(7)", "%bound = s32[] copy(%end)"))) == 1


def products(lowered) -> float:
    """Operations of all products of a program: XLA's count has one turn of each loop."""
    return lowered.cost_analysis()["flops"] + uncounted_flops(read_program(lowered.as_text("hlo")))


def test_operations_in_loops_are_those_of_their_turns_written_out():
    x, w = jnp.zeros((5, 2, 9, 11, 8)), jnp.zeros((3, 3, 4, 6))

    def convolved(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=dims, feature_group_count=2)

    def mapped(x, w):
        return jax.lax.map(lambda y: jax.lax.map(lambda z: convolved(z[None], w), y), x).sum()

    def written(x, w):
        return sum(convolved(x[k, n][None], w).sum() for k in range(5) for n in range(2))

    once = jax.jit(written).lower(x, w).cost_analysis()["flops"]
    # Beside the products there are a few sums; the gradient has one product for each operand.
    assert products(jax.jit(mapped).lower(x, w)) == pytest.approx(once, rel=0.02)
    assert products(jax.jit(jax.grad(mapped, (0, 1))).lower(x, w)) == pytest.approx(2 * once, rel=0.02)


FOR_A_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from kdjax.hlo import open_loops, read_program, traffic, uncounted_flops

def mapped(x, w):
    return jax.lax.map(lambda y: jnp.sin(y @ w), x)

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[:1]
step = jax.pmap(mapped, in_axes=(0, None), devices=devices)
compiled = step.lower(jnp.zeros((1, 16, 256, 512)), jnp.zeros((512, 512))).compile()
program = read_program(compiled.as_text())
print(open_loops(program), uncounted_flops(program) / (2 * 256 * 512 * 512), traffic(program) / 2**20)
"""


DEFORMED_ON_A_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from kdjax.hlo import read_program, traffic
from kdjax.models.deformable import deformable_conv

arguments = [((1, 8, 32, 64, 256), "bfloat16"), ((1, 8, 32, 64, 18), "float32"), ((1, 3, 3, 8, 256), "bfloat16")]
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[:1]
step = jax.pmap(lambda *given: deformable_conv(*given, groups=32), devices=devices)
compiled = step.lower(*(jax.ShapeDtypeStruct(*given) for given in arguments)).compile()
print(traffic(read_program(compiled.as_text())) / (9 * 8 * 32 * 64 * 256 * 2))
"""

for_a_tpu = pytest.mark.skipif(not util.find_spec("libtpu"), reason="the compiler for TPUs, libtpu, is not installed")


def printed(script: str) -> list[float]:
    """The numbers that a script prints which compiles for TPUs, in a process of its own."""
    environment = {**os.environ, **_ENVIRONMENT, "TPU_ACCELERATOR_TYPE": CHIPS["v5e"].accelerator}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [float(word) for word in run.stdout.split()]


@pytest.mark.slow
@for_a_tpu
def test_taps_of_a_grouped_deformable_convolution_are_not_transposed_on_a_tpu():
    # Of each tap four cells are read and written, then read, and a sample is written, and read for a sum in float32.
    # That is 18 maps, and a few that places need. Where cells were transposed, in float32, it was 34.
    [maps] = printed(DEFORMED_ON_A_TPU)
    assert maps < 25


@pytest.mark.slow
@for_a_tpu
def test_a_loop_for_a_tpu_is_counted_by_its_turns_and_its_slices():
    loops, turns, moved = printed(FOR_A_TPU)
    assert loops == 0
    assert turns == 15
    # A turn reads half a MiB of images and one of weights, and writes half a one; all images are allocated once.
    assert 16 * 2 <= moved < 16 * 2 + 8.1


def test_what_is_compiled_here_is_read():
    def step(x):
        return jax.lax.psum(jnp.sum(x), "devices") + jax.lax.pmean(x, "devices")

    mapped = jax.pmap(step, axis_name="devices").lower(np.zeros((8, 100), np.float32))
    told = collectives(read_program(mapped.compile().as_text()))
    assert told.elements == {"f32": 101}
    assert traffic(read_program(mapped.compile().as_text())) > 2 * 400
