"""The one train loop: a stage of a plan becomes a trained detector in a folder.

A stage's folder holds ``config.json``, ``description.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/``
and, once finished, ``model/`` (the trained detector alone), ``method/`` (what the method learnt, if anything),
``predictions.json`` and ``charts.json`` (of what is drawn) and ``result.json``; or ``nan_report.json``, where steps
that were not finite ended it.

The file is long because all that may happen between two steps, a signal, a failure or an evaluation, meets in the loop.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any

import jax
import numpy as np

from kdjax.checkpoint import Best, Checkpoints, abstract
from kdjax.devices import Prefetch, replicate, split
from kdjax.distill import by_method
from kdjax.errors import harmless
from kdjax.evaluation import Evaluation, Predict, evaluate, make_predict
from kdjax.methods import method_class
from kdjax.paths import Path
from kdjax.plan import Plan, StagePlan
from kdjax.processes import everywhere, gather, is_main, on_main
from kdjax.report import MetricWriter, Throughput, duration, parameter_table, progress_line, spoken
from kdjax.run.balance import heavy
from kdjax.run.build import Built, Facts, build, first_state, stage_key
from kdjax.run.data import Splits, open_batches
from kdjax.run.floor import metrics_of_teacher
from kdjax.run.record import CHARTS_FILE, Finished, claim, export, write_charts
from kdjax.run.result import finished_result, write_result
from kdjax.run.skipped import Skips
from kdjax.run.start import Origins, load_origins
from kdjax.saved import describe_model
from kdjax.state import TrainState, Variables
from kdjax.stopping import Stop, Stopped
from kdjax.types import MOST_PICTURES, Batch, Judge, Metrics
from kdjax.watchdog import Watchdog

_OVERFITTING = 0.05
"""Share of the best value of the primary metric by which the last one must be worse for overfitting to be named."""

# Forced CPU devices abort when too many steps are in flight.
_MOST_STEPS_IN_FLIGHT = 20


def train_stage(
    plan: Plan,
    stage: StagePlan,
    splits: Splits,
    identity: Mapping[str, Any],
    folder: Path,
    earlier: Mapping[str, Finished],
    stop: Stop,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Trains one stage of a plan, or continues it, or finds it finished.

    Args:
        plan: the whole run.
        stage: of it.
        splits: its data.
        identity: what determines the stage's result.
        folder: the stage's own.
        earlier: the stages before it, by name.
        stop: says when to end before the end.
        watchdog: told of all that is done.

    Returns:
        what ``result.json`` holds: "metrics" (percent), those of the "teacher" or None, "steps", "images_per_second",
        "parameters".

    Raises:
        UserError: something that the config names does not fit, or the teacher is worse than ``teacher_floor``.
        NumericError: too many steps in a row were not finite.
        StorageError: checkpoints cannot be saved.
        Stopped: a signal ended it; the checkpoint of the step that it had come to is saved.
    """
    if stop.due():
        raise stop.stopped("stopped between two stages; the same command goes on there")
    if done_before := on_main(lambda: finished_result(stage, folder, plan.task.primary)):
        found = spoken(done_before["metrics"], plan.task.spoken[:1])
        print(f"[{stage.name}] finished earlier: {found}. Nothing to do.", flush=True)
        return done_before
    started, number = time.monotonic(), f"stage {plan.stages.index(stage) + 1} of {len(plan.stages)}"
    print(f"[{stage.name}] {number}: {_extent(stage, len(splits.train))}.", flush=True)
    class_names, sizing = splits.train.class_names, plan.data.sizing
    evaluation = _watched(watchdog, plan, splits)
    origins, built = everywhere(lambda: _prepared(plan, stage, splits, earlier))
    teacher_metrics = metrics_of_teacher(plan, stage, earlier, origins.teacher, evaluation, class_names)
    description = describe_model(
        origins.model,
        class_names,
        sizing,
        splits.train.category_ids,
        task=plan.run.task,
        reading=plan.data.reading,
        dtype=stage.options.dtype,
    )
    on_main(lambda: claim(folder, identity, description))
    loop = _Loop(plan, stage, built, folder, evaluation, stop, watchdog)
    teacher_variables = origins.teacher.variables if built.teacher and origins.teacher else None
    # The loop alone holds the state: on a device there is no room for two.
    state, metrics, judge = loop.run(functools.partial(_begin, plan, stage, built, origins), teacher_variables, splits)
    states = gather(judge.state()) if hasattr(judge, "charts") else []
    kept = {at: said for part in gather(judge.kept(MOST_PICTURES)) for at, said in part.items()}
    result: dict[str, Any] = {
        "metrics": metrics,
        "teacher": teacher_metrics,
        "steps": stage.steps,
        "images_per_second": loop.throughput.images_per_second,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params["student"])),
    }

    def finish() -> None:
        export(stage, built.methods, folder, state, kept)
        with harmless(CHARTS_FILE):
            write_charts(folder, judge.charts(states) if states else [])
        # Last: it marks the stage as finished.
        write_result(folder, result)

    with watchdog.doing("checkpoint"):
        on_main(finish)
    print(f"[{stage.name}] {number} took {duration(time.monotonic() - started)}.", flush=True)
    return result


def _watched(watchdog: Watchdog, plan: Plan, splits: Splits) -> Evaluation:
    """Evaluates on a plan's split, and tells the watchdog of every batch."""

    def watched(
        predict: Predict, variables: Variables, between: Callable[[], object] = lambda: None
    ) -> tuple[Metrics, Judge]:
        def progress() -> None:
            watchdog.fed()
            between()

        with watchdog.doing("evaluation"):
            return evaluate(
                predict,
                variables,
                splits.evaluation,
                plan.task,
                batch_size=plan.run.eval_batch_size,
                image_size=plan.data.sizing,
                num_threads=plan.data.threads,
                between=progress,
            )

    return watched


def _prepared(plan: Plan, stage: StagePlan, splits: Splits, earlier: Mapping[str, Finished]) -> tuple[Origins, Built]:
    """What a stage begins with, read, and its modules, made."""
    origins = load_origins(stage, splits.train.class_names, earlier, plan.data.sizing.resize)
    return origins, build(stage, _facts(plan, stage, splits, origins))


def _extent(stage: StagePlan, images: int) -> str:
    """How long a stage is, in words."""
    if not stage.steps:
        return "no steps, the weights are taken over as they are"
    size = stage.options.batch_size
    return f"{stage.steps} steps of {size} images, {_epochs(stage, stage.steps, images):.1f} epochs of {images}"


def _epochs(stage: StagePlan, steps: int, images: int) -> float:
    """How often ``steps`` of a stage see each of so many images."""
    return steps * stage.options.batch_size / images


def _facts(plan: Plan, stage: StagePlan, splits: Splits, origins: Origins) -> Facts:
    """What the stage's modules depend on, now that data and files are read."""
    needs = {need for method in stage.methods.values() for need in method_class(method.config["name"]).needs}
    return Facts(
        task=plan.task,
        num_classes=len(splits.train.class_names),
        image_size=plan.data.training_shapes[0],
        model=origins.model,
        teacher=origins.teacher and origins.teacher.module,
        given=origins.given,
        statistics=plan.task.statistics(splits.train) if "statistics" in needs else None,
    )


def _begin(plan: Plan, stage: StagePlan, built: Built, origins: Origins) -> TrainState:
    """The state of step 0; says how large the models are and how the stage is scaled."""
    options = stage.options
    state = first_state(stage, built, stage_key(plan.run.seed, stage), origins.start, origins.given)
    table = {stage.name: state.params["student"]}
    table |= {f"method {name}": x for name, x in by_method(state.params["method"], built.methods).items() if x}
    print(parameter_table(table), flush=True)
    if options.batch_size != options.base_batch:
        print(
            f"[{stage.name}] batch {options.batch_size} instead of {options.base_batch}: learning rate "
            f"{stage.optimizer.learning_rate:g} instead of {options.optimizer.learning_rate:g}, {stage.steps} steps "
            f"instead of {options.steps}.",
            flush=True,
        )
    return state


class _Loop:
    """The steps of one stage, and all that happens between them."""

    def __init__(
        self,
        plan: Plan,
        stage: StagePlan,
        built: Built,
        folder: Path,
        evaluation: Evaluation,
        stop: Stop,
        watchdog: Watchdog,
    ):
        self.throughput = Throughput(stage.steps, stage.options.batch_size)
        self._plan, self._stage, self._built, self._folder, self._stop = plan, stage, built, folder, stop
        self._watchdog = watchdog
        self._under_way: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._evaluate = functools.partial(evaluation, make_predict(built.student), between=self._between_batches)
        self._images = 0
        self._explained = False
        self._recent: list[dict[str, jax.Array]] = []
        self._compiled: set[tuple[int, int]] = set()

    def run(
        self, begin: Callable[[], TrainState], teacher_variables: Variables | None, splits: Splits
    ) -> tuple[TrainState, Metrics, Judge]:
        """From the state of step 0, or the newest checkpoint, to the state that is kept and what it is worth."""
        options = self._stage.options
        task, self._images = self._plan.task, len(splits.train)
        self._skips = Skips(self._plan, self._stage, splits.train)
        opened = Checkpoints(
            self._folder / "checkpoints",
            keep=options.keep_checkpoints,
            metric=task.primary,
            higher_is_better=task.higher_is_better,
        )
        with opened as checkpoints:
            state, evaluated = self._train(begin, teacher_variables, splits, checkpoints)
            with self._watchdog.doing("checkpoint"):
                best = checkpoints.best()
            if best is None or best.step == int(state.step):
                return state, *evaluated
            self._compare(best, evaluated[0])
            if options.export == "last":
                return state, *evaluated
            like = abstract(state)
            del state
            with self._watchdog.doing("checkpoint"):
                state = checkpoints.restore_best(like)
            return state, *self._evaluate(state.student())

    def _train(
        self,
        begin: Callable[[], TrainState],
        teacher_variables: Variables | None,
        splits: Splits,
        checkpoints: Checkpoints,
    ) -> tuple[TrainState, tuple[Metrics, Judge]]:
        """The last state and what it is worth."""
        stage = self._stage
        with self._watchdog.doing("compilation"):
            state = self._first(begin, checkpoints)
        first = int(state.step)
        self._explained = first > 0
        with everywhere(lambda: self._writer(first)) as writer:
            evaluated = self._owed(state, writer, checkpoints)
            if first == stage.steps:
                return state, evaluated or self._evaluate(state.student())
            processes = self._plan.data.processes
            # Placed once: what comes from one device is broadcast again at every step.
            key = replicate(stage_key(self._plan.run.seed, stage))
            teacher_variables = teacher_variables and replicate(teacher_variables)
            with (
                self._watchdog.doing("step"),
                closing(open_batches(self._plan, stage, splits.train, first, processes=processes)) as batches,
                Prefetch(batches, parts=stage.options.accumulate) as placed,
                ExitStack() as held,
            ):
                for done in range(first + 1, stage.steps + 1):
                    state = self._step(state, teacher_variables, placed, key)
                    if done == first + 1:
                        self.throughput.measure(done)
                        held.enter_context(self._stop.holding())
                    try:
                        evaluated = self._between(done, state, writer, checkpoints)
                        if self._skips.too_many:
                            raise self._skips.end(
                                self._folder, functools.partial(self._norms, state, teacher_variables, key)
                            )
                        self._between_batches()
                    except Stopped:
                        with self._watchdog.doing("checkpoint"):
                            checkpoints.commit(state)
                        words = (
                            f"stopped; stage {stage.name!r} is saved at step {done}, and the same command goes on there"
                        )
                        raise self._stop.stopped(words) from None
                assert evaluated is not None  # The last step is evaluated.
                with self._watchdog.doing("checkpoint"):
                    if not checkpoints.settle():
                        checkpoints.commit(state, evaluated[0][self._plan.task.primary])
        return state, evaluated

    def _first(self, begin: Callable[[], TrainState], checkpoints: Checkpoints) -> TrainState:
        """The state of the newest checkpoint that is sound, or of step 0."""
        state = everywhere(begin)
        if checkpoints.is_empty():
            checkpoints.check_room(state)
            return state
        like = abstract(state)
        del state  # On a device there is no room for two.
        restored = checkpoints.resume(like)
        if int(restored.step) < self._stage.steps:
            checkpoints.check_room(restored)
        print(f"[{self._stage.name}] continues from the checkpoint of step {int(restored.step)}.", flush=True)
        return restored

    def _owed(
        self, state: TrainState, writer: MetricWriter | None, checkpoints: Checkpoints
    ) -> tuple[Metrics, Judge] | None:
        """The evaluation that was due at the step of a checkpoint, and that a signal kept from its end."""
        step = int(state.step)
        if not (step and self._evaluates(step)) or checkpoints.value(step) is not None:
            return None
        metrics, judge = self._evaluate(state.student())
        print(f"[{self._stage.name}] step {step}: {spoken(metrics, self._plan.task.spoken)}", flush=True)
        if writer:
            writer.write(step, {"eval": metrics})
        if math.isfinite(value := metrics[self._plan.task.primary]):
            with self._watchdog.doing("checkpoint"):
                checkpoints.commit(state, value)
        return metrics, judge

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        return step == self._stage.steps or _due(step, self._stage.eval_every)

    def _between_batches(self) -> None:
        """Ends the run where it was asked to."""
        if self._stop.due():
            raise self._stop.stopped()

    def _writer(self, step: int) -> AbstractContextManager[MetricWriter | None]:
        """Records the steps after ``step``; nothing but on the main process."""
        return MetricWriter(self._folder, step, self._plan.run.sinks) if is_main() else nullcontext()

    def _compare(self, best: Best, last: Metrics) -> None:
        """Says what is kept where the best checkpoint is not the last, and names overfitting where it is seen."""
        stage, task = self._stage, self._plan.task
        value = last[task.primary]
        kept = f"keeps the best checkpoint, of step {best.step}" if stage.options.export == "best" else "keeps the last"
        print(
            f"[{stage.name}] {task.primary} was best, {best.value:.1f}, at step {best.step}, and is {value:.1f} at the "
            f"end: {kept}, as config.{stage.name}.export says.",
            flush=True,
        )
        if abs(best.value - value) > _OVERFITTING * abs(best.value):
            print(
                f"[{stage.name}] It overfits: from step {best.step} on it learns its images by heart. More images, "
                "more augmentation (config.data.jitter, config.data.color), fewer steps or a pretrained backbone "
                f"(config.{stage.name}.weights) help.",
                flush=True,
            )

    def _step(self, state: TrainState, teacher_variables: Any, placed: Prefetch, key: jax.Array) -> TrainState:
        """One step; the first one of each shape compiles, which is said and not measured."""
        if not placed.ready():
            # What the devices still have to do is no waiting for data.
            self._wait()
        with self.throughput.waiting():
            batch = next(placed)
        height, width = batch.images.shape[2:4]
        if (height, width) in self._compiled:
            state, values = self._built.step(state, teacher_variables, batch, key)
        else:
            self._compiled.add((height, width))
            started = time.perf_counter()
            with self.throughput.paused(steps=1), self._watchdog.doing("compilation"):
                state, values = jax.block_until_ready(self._built.step(state, teacher_variables, batch, key))
            seconds = time.perf_counter() - started
            print(
                f"[{self._stage.name}] first step of {height}x{width} took {seconds:.0f} s with compilation.",
                flush=True,
            )
        self._recent.append(values)
        self._under_way.append(values)
        self._watchdog.fed()
        return state

    def _norms(
        self, state: TrainState, teacher_variables: Any, key: jax.Array, term: str, step: int, batch: Batch
    ) -> dict[str, float]:
        """Norms of the gradient of a term by layer, at a step of which ``state`` has the weights."""
        state = state.replace(step=replicate(np.int32(step)))
        placed = split(batch, parts=self._stage.options.accumulate)
        with self._watchdog.doing("compilation"):
            norms = self._built.term_norms(term)(state, teacher_variables, placed, key)
            return {layer: float(np.asarray(x)[0]) for layer, x in norms.items()}

    def _wait(self) -> None:
        """Waits for the steps that the devices still have to do, of each of which the watchdog is told."""
        while self._under_way:
            jax.block_until_ready(self._under_way.popleft())
            self._watchdog.fed()

    def _between(
        self, done: int, state: TrainState, writer: MetricWriter | None, checkpoints: Checkpoints
    ) -> tuple[Metrics, Judge] | None:
        """What is due after a step: its line and row, an evaluation, a checkpoint. Returns the evaluation."""
        stage, evaluated = self._stage, None
        evaluates = self._evaluates(done)
        saves = evaluates or _due(done, stage.checkpoint_every)
        if not (saves or _due(done, stage.options.log_every)):
            if done % _MOST_STEPS_IN_FLIGHT == 0:
                self._wait()
            return None
        self._wait()
        recent, self._recent = jax.device_get(self._recent), []
        self._skips.look(done, recent)
        row = self._progress(done, _means(recent))
        try:
            if evaluates and not self._skips.too_many:
                with self.throughput.paused():
                    evaluated = self._evaluate(state.student())
                row["eval"] = evaluated[0]
                print(f"[{stage.name}] step {done}: {spoken(evaluated[0], self._plan.task.spoken)}", flush=True)
        finally:  # A signal may end the evaluation, which is made up for later.
            if writer:
                writer.write(done, row)
        if saves and not self._skips.too_many:
            with self._watchdog.doing("checkpoint"):
                checkpoints.save(state, evaluated[0][self._plan.task.primary] if evaluated else None)
        return evaluated

    def _progress(self, done: int, means: Mapping[str, float]) -> dict[str, Any]:
        """Prints the line of a step, and returns its row of ``metrics.jsonl``."""
        rate = self.throughput.measure(done)
        learning_rate = float(self._built.learning_rate(done - 1))
        shares = {key.removeprefix("loss/"): x for key, x in means.items() if key.startswith("loss/")}
        stage, stages = self._stage, self._plan.stages
        epoch, epochs = (_epochs(stage, steps, self._images) for steps in (done, stage.steps))
        images = sum(x.steps * x.options.batch_size for x in stages[stages.index(stage) + 1 :])
        # As if an image of theirs took as long as one of this stage.
        later = images / self.throughput.images_per_second if images else 0.0
        line = progress_line(done, stage.steps, shares, learning_rate, *rate, epochs=(epoch, epochs), later=later)
        print(f"[{stage.name}] {line}", flush=True)
        if not (self._explained or math.isnan(means["loss"])):
            self._explained = True
            methods = {term: x for term, x in shares.items() if term not in self._built.student.terms}
            lines = heavy(stage.name, methods, sum(shares.values()))
            if scale := means.get("method_scale"):
                lines.append(
                    f"what the methods add is scaled by {scale:.3g}, which made it {stage.options.method_share:g} "
                    f"times the student's own loss at the first step, as config.{stage.name}.method_share says."
                )
            print("".join(f"[{stage.name}] {x}\n" for x in lines), end="")
        return {
            **means,
            "epoch": epoch,
            "learning_rate": learning_rate,
            "images_per_second": rate.images_per_second,
            "waited": rate.waited,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(recent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of the metrics of steps, NaN where all were skipped; of "skipped", how many were.

    >>> _means([{"loss": 2.0, "skipped": 0.0}, {"loss": math.nan, "skipped": 1.0}, {"loss": 4.0, "skipped": 0.0}])
    {'loss': 3.0, 'skipped': 1.0}
    """
    finite = [metrics for metrics in recent if not metrics["skipped"]]
    means = {name: float(np.mean([x[name] for x in finite])) if finite else math.nan for name in recent[0]}
    return means | {"skipped": float(sum(metrics["skipped"] for metrics in recent))}
