"""A task of somebody else's, outside of the package: image classification, from generated stripes to top-1.

It is everything that another task has to bring: a source, truth and judge, a network and a config.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax.config import base_config, method_config
from kdjax.losses import masked_mean, valid_positions
from kdjax.models.network import Network
from kdjax.visualize import Drawing, image_of, save_contact_sheet

CLASSES = ("rows", "columns", "diagonals", "checks")
COUNTS = {"train": 96, "validation": 40}
HERE = "tests.classification"


class Image(NamedTuple):
    image: np.ndarray
    image_id: int
    label: int


class Stripes:
    """Patterns of different width, phase, contrast and size, in noise."""

    class_names, category_ids = CLASSES, ()

    def __init__(self, split: str):
        self.split, self.origin, self.fingerprint = split, f"stripes {split}", f"stripes 1 {split}"

    def __len__(self) -> int:
        return COUNTS[self.split]

    def size(self, index: int) -> tuple[int, int]:
        return 48 + index % 17, 64 - index % 13

    def image_id(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def __getitem__(self, index: int) -> Image:
        rng = np.random.default_rng([len(self.split), index])
        height, width = self.size(index)
        y, x = np.mgrid[:height, :width] / rng.uniform(3, 6) + rng.uniform(0, 6, (2, 1, 1))
        label = index % len(CLASSES)
        pattern = [np.sin(y), np.sin(x), np.sin(x + y), np.sin(x) * np.sin(y)][label]
        pixels = 128 + rng.uniform(30, 90) * pattern + rng.normal(0, 25, (height, width))
        return Image(np.repeat(pixels.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), index, label)

    def report_lines(self) -> list[str]:
        return [f"{self.origin}: {len(self)} images of {len(CLASSES)} classes."]

    def report_dict(self) -> dict[str, Any]:
        return {"origin": self.origin, "images": len(self), "flaws": []}


def stripes(name, split, data_dir, checks, download):
    return Stripes(split)


class Labels(NamedTuple):
    label: Any
    """(N,) int32."""


class Top1:
    """The judge: two counts."""

    def __init__(self, source: Stripes):
        self._source, self._said = source, {}

    def add(self, outputs, batch) -> None:
        said = zip(np.asarray(batch.index).tolist(), outputs.argmax(axis=-1).tolist(), strict=True)
        self._said |= {position: label for position, label in said if position >= 0}

    def state(self):
        right = sum(self._source[position].label == label for position, label in self._said.items())
        return {"counts": np.array([right, len(self._said)], np.int64)}

    def merge(self, states):
        right, count = sum(state["counts"] for state in states).tolist()
        return {"top1": 100 * right / count}

    def kept(self, count: int):
        return {position: CLASSES[label] for position, label in self._said.items() if position < count}


class Classification:
    """The task."""

    name, primary, higher_is_better = "classification", "top1", True
    columns: ClassVar[Mapping[str, str]] = {"top-1": "top1", "top-5": "top5"}
    spoken: ClassVar[tuple[str, ...]] = ("top1",)
    floors: ClassVar[Mapping[str, float]] = {f"{HERE}:stripes": 40.0}

    @classmethod
    def of(cls, data):
        return cls()

    def complete_model(self, model) -> None:
        pass

    def check_model(self, model, where) -> None:
        pass

    def check_source(self, source) -> None:
        pass

    def targets(self, images: int, shape: tuple[int, int]) -> Labels:
        return Labels(np.zeros(images, np.int32))

    def fill(self, targets, row, example, geometry) -> None:
        # A mirrored image is of the same class.
        targets.label[row] = example.label

    def judge(self, source) -> Top1:
        return Top1(source)

    def draw(self, path, source, columns) -> None:
        models = ", ".join(f"{name} ({column.metrics['top1']:.1f})" for name, column in columns.items())
        rows = enumerate(zip(*(column.kept for column in columns.values()), strict=True))
        said = [(k, f"{source.name(k)}, {CLASSES[source[k].label]}; {models}: {', '.join(row)}") for k, row in rows]
        save_contact_sheet(path, [Drawing(source[k].image, text=text) for k, text in said])

    def remarks(self, source, sizing) -> list[str]:
        return []

    def suggest(self, source) -> None:
        return None

    def statistics(self, source) -> None:
        return None

    def describe(self, source) -> list[str]:
        labels = np.bincount([source[k].label for k in range(len(source))])
        return [f"{name}: {count} images" for name, count in zip(CLASSES, labels.tolist(), strict=True)]

    def drawn(self, batch, row, class_names: Sequence[str]) -> Drawing:
        return Drawing(image_of(batch, row), text=class_names[int(batch.targets.label[row])])


class Classifier(Network):
    """A backbone, the mean of its last map inside the image, and one linear layer."""

    task: ClassVar[str] = "classification"
    terms: ClassVar[tuple[str, ...]] = ("cls",)

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)

    @property
    def strides(self) -> dict[str, int]:
        return {"c5": 32}

    def features(self, images, train=False):
        return {"c5": super().features(images, train)["c5"]}

    def heads(self, features, image_size=None, sampling=None):
        where = None
        if image_size is not None:
            where = valid_positions(image_size, features["c5"].shape[1:3], 32)[..., None]
        return self.head(masked_mean(features["c5"].astype(jnp.float32), where, axis=(1, 2)))

    def heads_at(self, features, predictions, image_size=None):
        return self.heads(features, image_size)

    @nn.nowrap
    def loss(self, predictions, targets, image_size):
        log_probabilities = jax.nn.log_softmax(predictions.astype(jnp.float32))
        return {"cls": -jnp.mean(jnp.take_along_axis(log_probabilities, targets.label[:, None], axis=1))}

    @nn.nowrap
    def decode(self, predictions, image_size):
        return jax.nn.softmax(predictions)


def get_config() -> ConfigDict:
    """A teacher, and a student that learns by MGD with channels hidden."""
    config = base_config()
    config.task, config.eval_batch_size = f"{HERE}:Classification", 16
    config.data.update(name=f"{HERE}:stripes", image_size=(64, 64))
    for stage, width, steps in ((config.teacher, 0.25, 50), (config.student, 0.125, 40)):
        stage.model = ConfigDict(dict(name=f"{HERE}:Classifier", backbone=dict(depth=10, width=width)))
        stage.loss_weights = ConfigDict()
        stage.update(steps=steps, batch_size=16, base_batch=16, checkpoint_every=10, log_every=10)
        stage.optimizer.update(learning_rate=0.01, warmup_steps=5)
    config.student.methods.mgd = method_config("mgd", mask="channel", mask_ratio=0.15)
    config.student.loss_weights.mgd = 1e-4
    return config
