"""Programs whose traffic and collectives are known, written by hand and compiled here."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.hlo import collectives, open_loops, read_program, traffic

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


def test_what_is_compiled_here_is_read():
    def step(x):
        return jax.lax.psum(jnp.sum(x), "devices") + jax.lax.pmean(x, "devices")

    mapped = jax.pmap(step, axis_name="devices").lower(np.zeros((8, 100), np.float32))
    told = collectives(read_program(mapped.compile().as_text()))
    assert told.elements == {"f32": 101}
    assert traffic(read_program(mapped.compile().as_text())) > 2 * 400
