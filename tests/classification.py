"""A task of somebody else's, outside of the package: it names four patterns, judged by how often it is right.

It is everything that another task has to bring: a source, truth and judge, and a config; its network is a classifier.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from kdjax.config import base_config, method_config
from kdjax.config.presets import classifier
from kdjax.data.examples import ClassifiedImage
from kdjax.types import Labels
from kdjax.visualize import Drawing, image_of, save_contact_sheet

CLASSES = ("rows", "columns", "diagonals", "checks")
COUNTS = {"train": 96, "validation": 40}
HERE = "tests.classification"


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

    def label(self, index: int) -> int:
        return index % len(CLASSES)

    def __getitem__(self, index: int) -> ClassifiedImage:
        rng = np.random.default_rng([len(self.split), index])
        height, width = self.size(index)
        y, x = np.mgrid[:height, :width] / rng.uniform(3, 6) + rng.uniform(0, 6, (2, 1, 1))
        pattern = [np.sin(y), np.sin(x), np.sin(x + y), np.sin(x) * np.sin(y)][self.label(index)]
        pixels = 128 + rng.uniform(30, 90) * pattern + rng.normal(0, 25, (height, width))
        image = np.repeat(pixels.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return ClassifiedImage(image, index, self.label(index))

    def report_lines(self) -> list[str]:
        return [f"{self.origin}: {len(self)} images of {len(CLASSES)} classes."]

    def report_dict(self) -> dict[str, Any]:
        return {"origin": self.origin, "images": len(self), "flaws": []}


def stripes(name, split, data_dir, checks, download):
    return Stripes(split)


class Right:
    """The judge: two counts."""

    def __init__(self, source: Stripes):
        self._source, self._said = source, {}

    def add(self, outputs, batch) -> None:
        said = zip(np.asarray(batch.index).tolist(), outputs.argmax(axis=-1).tolist(), strict=True)
        self._said |= {position: label for position, label in said if position >= 0}

    def state(self):
        right = sum(self._source.label(position) == label for position, label in self._said.items())
        return {"counts": np.array([right, len(self._said)], np.int64)}

    def merge(self, states):
        right, count = sum(state["counts"] for state in states).tolist()
        return {"right": 100 * right / count}

    def kept(self, count: int):
        return {position: CLASSES[label] for position, label in self._said.items() if position < count}


class Patterns:
    """The task, whose models are classifiers."""

    name, primary, higher_is_better = "classification", "right", True
    columns: ClassVar[Mapping[str, str]] = {"share right": "right", "share near": "near"}
    spoken: ClassVar[tuple[str, ...]] = ("right",)
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
        targets.classes[row] = example.label

    def judge(self, source) -> Right:
        return Right(source)

    def draw(self, path, source, columns) -> None:
        models = ", ".join(f"{name} ({column.metrics['right']:.1f})" for name, column in columns.items())
        rows = enumerate(zip(*(column.kept for column in columns.values()), strict=True))
        said = [(k, f"{source.name(k)}, {CLASSES[source.label(k)]}; {models}: {', '.join(row)}") for k, row in rows]
        save_contact_sheet(path, [Drawing(source[k].image, text=text) for k, text in said])

    def remarks(self, source, sizing) -> list[str]:
        return []

    def suggest(self, source) -> None:
        return None

    def statistics(self, source) -> None:
        return None

    def describe(self, source) -> list[str]:
        labels = np.bincount([source.label(k) for k in range(len(source))])
        return [f"{name}: {count} images" for name, count in zip(CLASSES, labels.tolist(), strict=True)]

    def drawn(self, batch, row, class_names: Sequence[str]) -> Drawing:
        return Drawing(image_of(batch, row), text=class_names[int(batch.targets.classes[row])])


def get_config(task: str = f"{HERE}:Patterns") -> ConfigDict:
    """A teacher, and a student that learns by MGD with channels hidden."""
    config = base_config()
    config.task, config.eval_batch_size = task, 16
    config.data.update(name=f"{HERE}:stripes", image_size=(64, 64))
    for stage, width, steps in ((config.teacher, 0.25, 50), (config.student, 0.125, 40)):
        stage.model = classifier(10, width)
        stage.loss_weights = ConfigDict()
        stage.update(steps=steps, batch_size=16, base_batch=16, checkpoint_every=10, log_every=10)
        stage.optimizer.update(learning_rate=0.01, warmup_steps=5)
    config.student.methods.mgd = method_config("mgd", mask="channel", mask_ratio=0.15, levels=("c5",))
    config.student.loss_weights.mgd = 1e-4
    return config
