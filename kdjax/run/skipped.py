"""Steps that were skipped because something in them was not finite: what is said of them, and when they end a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kdjax.errors import NumericError, quoted
from kdjax.files import write_json
from kdjax.paths import Path
from kdjax.plan import Plan, StagePlan
from kdjax.processes import on_main
from kdjax.run.data import images_of_step, open_batches
from kdjax.types import Batch, Source

MOST_IN_A_ROW = 5
"""As many skipped steps that follow one another end a run: those that come next would most likely be skipped too."""

REPORT_FILE = "nan_report.json"
"""In the folder of a stage that ended so."""


class _Skipped(NamedTuple):
    """A step that was skipped."""

    step: int
    """As lines of progress count: the first one is step 1."""
    metrics: Mapping[str, float]
    """Those of :func:`kdjax.distill.distill_step`."""
    images: list[dict[str, Any]]
    """Of the global batch, each with its "id" and its "name"."""


class Skips:
    """Watches for skipped steps of one stage.

    Every process has one, sees the same metrics and comes to the same conclusion.
    """

    def __init__(self, plan: Plan, stage: StagePlan, source: Source):
        """Has seen nothing yet.

        Args:
            plan: of the run.
            stage: of it.
            source: what the stage is trained on.
        """
        self._plan, self._stage, self._source = plan, stage, source
        self._in_a_row: list[_Skipped] = []

    @property
    def too_many(self) -> bool:
        """Whether so many followed one another that the run must end."""
        return len(self._in_a_row) >= MOST_IN_A_ROW

    def look(self, done: int, recent: Sequence[Mapping[str, float]]) -> None:
        """Prints which of the last steps were skipped, why, and which images they saw.

        Args:
            done: finished steps.
            recent: the metrics of the last ones, in order.
        """
        for step, metrics in enumerate(recent, done - len(recent) + 1):
            if self.too_many:
                return
            if not metrics["skipped"]:
                self._in_a_row = []
                continue
            skipped = _Skipped(step, metrics, self._images(step))
            self._in_a_row.append(skipped)
            names = ", ".join(image["name"] for image in skipped.images)
            print(f"[{self._stage.name}] step {step} was skipped: {_reason(metrics)}. It saw {names}.", flush=True)

    def _images(self, step: int) -> list[dict[str, Any]]:
        # Batches are counted from 0.
        positions = images_of_step(self._plan, self._stage, self._source, step - 1)
        return [{"id": self._source.image_id(x), "name": self._source.name(x)} for x in positions]

    def end(self, folder: Path, norms: Callable[[str, int, Batch], Mapping[str, float]]) -> NumericError:
        """Writes down all that is known of the steps that end the run; returns what ends it.

        Args:
            folder: of the stage.
            norms: from a term, a step, counted from 0, and its batch, this process's share of it, to the norms of the
                term's gradient there by layer. They are asked for each term of the last of the steps, and written when
                all else is: each takes a compilation.
        """
        name, first, last = self._stage.name, self._in_a_row[0], self._in_a_row[-1]
        what = f"steps {first.step} to {last.step} were skipped ({_reason(last.metrics)})"
        advice = (
            f"lower config.{name}.optimizer.learning_rate, or the weight of the first bad term in "
            f"config.{name}.loss_weights"
        )
        report = {
            "what": f"Stage {name!r}: {what}.",
            "what_to_do": f"If some image is in all of these steps, look at it and its annotations; if not, {advice}, "
            "in another --workdir: in this one a run goes on as it began.",
            "steps": [
                {
                    "step": x.step,
                    "metrics": {key: _plain(value) for key, value in x.metrics.items()},
                    "images": x.images,
                }
                for x in self._in_a_row
            ],
            "config": {name: self._stage.section},
        }
        on_main(lambda: write_json(folder / REPORT_FILE, report))
        report["gradient_norms"] = self._gradient_norms(last, norms)
        on_main(lambda: write_json(folder / REPORT_FILE, report))
        return NumericError(
            f"Stage {name!r} left the finite numbers: {what}; {advice}. {folder / REPORT_FILE} has their terms, "
            "gradients and images; checkpoints are intact."
        )

    def _gradient_norms(
        self, skipped: _Skipped, norms: Callable[[str, int, Batch], Mapping[str, float]]
    ) -> dict[str, Any]:
        """Of each term of a step, by layer; in words where there is no room to compute them."""
        weights = self._stage.options.loss_weights
        terms = [name.removeprefix("loss/") for name in skipped.metrics if name.startswith("loss/")]
        batch = next(open_batches(self._plan, self._stage, self._source, skipped.step - 1))
        found: dict[str, Any] = {}
        for term in terms:
            if weights.get(term, 1.0):
                try:
                    of_layers = norms(term, skipped.step - 1, batch)
                except jax.errors.JaxRuntimeError as error:
                    found[term] = quoted(error)
                else:
                    found[term] = {layer: _plain(value) for layer, value in of_layers.items()}
        return found


def _reason(metrics: Mapping[str, float]) -> str:
    """What of a skipped step was not finite: the first of its terms, its gradient, and its new weights that was not.

    >>> _reason({"grad_norm": math.nan, "loss": math.nan, "loss/cls": math.inf, "raw/box": 1.0, "raw/cls": math.inf})
    'raw/cls is inf'
    >>> _reason({"grad_norm": 1.0, "loss": 2.0, "loss/cls": 2.0, "raw/cls": 2.0})
    'its loss is finite, the weights after it are not'
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    for kind in ("raw/", "loss", "grad_norm"):
        if first := [f"{name} is {value}" for name, value in bad.items() if name.startswith(kind)]:
            return ", ".join(first)
    return "its loss is finite, the weights after it are not"


def _plain(value: float) -> float | str:
    """A number as JSON has it, which knows no others than finite ones: those are "nan", "inf", "-inf"."""
    return float(value) if math.isfinite(value) else str(value)
