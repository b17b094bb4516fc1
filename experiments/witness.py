"""``kdjax.main`` under a witness: ``python -m experiments.witness --config=mgd:tiny --workdir=...``, with its flags.

It writes down, in the workdir, which states were saved and gone on from, and which images each step saw.
"""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from kdjax.arrays import digest
from kdjax.checkpoint import Checkpoints
from kdjax.run import train
from kdjax.state import TrainState
from kdjax.types import Batch


class Seen(NamedTuple):
    """What the processes of a run saw of its last stage."""

    saved: dict[int, str]
    """By step, the digest of all arrays of the state that was saved."""
    restored: dict[int, str]
    """The same of what the run went on from."""
    images: dict[int, dict[int, str]]
    """By step, counted from 1, and by position in the global batch: the digest of an image and its targets."""


def seen(workdir: Path) -> Seen:
    """What all processes of a run wrote down; where they contradict each other, the digests are "different"."""
    found = Seen({}, {}, {})
    for file in sorted(workdir.glob("witness_*.jsonl")):
        for kind, step, said in map(json.loads, file.read_text().splitlines()):
            if kind == "images":
                found.images.setdefault(step, {}).update({int(position): x for position, x in said.items()})
            else:
                of_kind = getattr(found, kind)
                of_kind[step] = said if of_kind.get(step, said) == said else "different"
    return found


def _note(kind: str, step: int, said: Any) -> None:
    file = Path(flags.FLAGS.workdir) / f"witness_{jax.process_index()}.jsonl"
    with file.open("a") as lines:
        lines.write(json.dumps([kind, step, said]) + "\n")


def _witnessed() -> None:
    """Puts the witness between the loop of a stage and what it saves, goes on from, and sees."""
    save, resume, open_batches = Checkpoints.save, Checkpoints.resume, train.open_batches

    def saved(self: Checkpoints, state: TrainState, value: float | None = None) -> None:
        _note("saved", int(state.step), digest(jax.device_get(state)))
        save(self, state, value)

    def resumed(self: Checkpoints, state: TrainState) -> TrainState:
        restored = resume(self, state)
        _note("restored", int(restored.step), digest(jax.device_get(restored)))
        return restored

    def opened(plan: Any, stage: Any, source: Any, first_step: int, **options: Any) -> Generator[Batch, None, None]:
        with contextlib.closing(open_batches(plan, stage, source, first_step, **options)) as batches:
            for step, batch in enumerate(batches, first_step + 1):
                rows = (batch.images, batch.size, batch.targets)
                found = {
                    int(x): digest(jax.tree.map(lambda y, row=row: y[row], rows)) for row, x in enumerate(batch.index)
                }
                _note("images", step, found)
                yield batch

    Checkpoints.save, Checkpoints.resume, train.open_batches = saved, resumed, opened  # type: ignore[method-assign]


if __name__ == "__main__":
    from kdjax import main  # With its flags, which others that read what was seen have not.

    _witnessed()
    app.run(main.main, flags_parser=main.parse)
