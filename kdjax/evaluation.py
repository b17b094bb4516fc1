"""What a model says of a whole source, computed on every device, and what a task's judge makes of it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from kdjax import operations
from kdjax.data.batches import eval_batches
from kdjax.data.sizing import Size, Sizing
from kdjax.devices import device_count, parallel, replicate, split
from kdjax.processes import gather, on_main
from kdjax.types import Batch, Judge, Metrics, Model, Source, Task

Predict = Callable[[Any, Any, Any], Any]
"""What :func:`make_predict` returns: (variables, images (D, n, H, W, 3), image_size (D, n, 2)) to (D, n, ...)."""
Evaluation = Callable[..., tuple[Metrics, Judge]]
"""From a predict function and variables to the metrics on one source, and the judge that found them."""


def make_predict(model: Model) -> Predict:
    """Inference mapped over all devices, from uint8 images to what the task is about.

    Build it once per model and keep it: every call of this function makes something that compiles anew.
    """
    return parallel(functools.partial(operations.predict, model), in_axes=(None, 0, 0), replicated=False)


def evaluate(
    predict: Predict,
    variables: Any,
    source: Source,
    task: Task,
    *,
    batch_size: int,
    image_size: Size | Sizing,
    num_threads: int = 4,
    between: Callable[[], object] = lambda: None,
) -> tuple[Metrics, Judge]:
    """The metrics of a model over a whole source, the last partial batch included.

    Of several processes each computes its part of every batch; the main one judges what all have found.

    Args:
        predict: made by :func:`make_predict`.
        variables: the model's; placed on the devices once, unless they are there already.
        source: images and their truth.
        task: judges.
        batch_size: images that all devices of all processes see at once.
        image_size: height and width of the padded images, into which every image is scaled to fit; or a sizing.
        num_threads: that prepare images on each process.
        between: is called after each batch; what it raises ends the evaluation.

    Returns:
        the metrics, and the judge, which knows what the model said of this process's images.

    Raises:
        ValueError: the devices cannot share the batch evenly.
    """
    devices = device_count()
    if batch_size % devices:
        raise ValueError(f"evaluation batch size {batch_size} must be a multiple of the {devices} devices")
    judge = task.judge(source)
    batches = eval_batches(
        source,
        batch_size=batch_size,
        image_size=image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=num_threads,
    )
    for batch, output in outputs(predict, replicate(variables), batches):
        judge.add(output, batch)
        between()
    states = gather(judge.state())
    return on_main(lambda: judge.merge(states)), judge


def outputs(predict: Predict, variables: Any, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Any]]:
    """Batches and what a model says of them, as NumPy arrays (N, ...).

    One batch stays in flight: the devices work on the next while the host reads the last.
    """
    pending: tuple[Batch, Any] | None = None
    for batch in batches:
        output = predict(variables, *split((batch.images, batch.size)))
        if pending:
            yield pending[0], _on_host(pending[1])
        pending = batch, output
    if pending:
        yield pending[0], _on_host(pending[1])


def _on_host(output: Any) -> Any:
    """(D, n, ...) on devices to (D * n, ...)."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), output)
