"""Annotations and images in which something was changed, and how they are met."""

import contextlib
import copy
import io
import itertools
import json
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdjax.data.batches import train_batches
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.tasks import Detection

_LIMIT = 30
"""Seconds after which reading hangs."""
_HEIGHT, _WIDTH = 30, 40
_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "grey.jpg": ("L", {}),
    "progressive.jpg": ("RGB", {"progressive": True, "subsampling": 2}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.png": ("RGB", {}),
    "palette.png": ("P", {"transparency": 3}),
    "wide.png": ("I;16", {}),
}
"""By name: the mode, and how it is saved."""
_HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "1", "../../x", "/etc/hosts", "a\0b", "x" * 5000, "\ud800", "grey.jpg"),
    *([], [[]], {}, [1, 2, 3], [0, 0, 1, 1], [[0, 0, 5, 0, 5, 5]], [None] * 4, [-5, -5, 3, 3], [1e9] * 4),
    *(
        {"size": [30, 40], "counts": [1200]},
        {"size": [30, 40], "counts": "z" * 99},
        {"size": [10**9] * 2, "counts": []},
    ),
]
"""What the value of any key, or the entry of any list, may become."""


def _content() -> dict[str, Any]:
    """Annotations of everything that they may have: boxes, polygons, runs, crowds, images without objects."""
    images = [{"id": 3 * k, "file_name": name, "width": _WIDTH, "height": _HEIGHT} for k, name in enumerate(_IMAGES)]
    outline = [[2.0, 3.0, 12.0, 3.0, 12.0, 23.0]]
    runs = {"size": [_HEIGHT, _WIDTH], "counts": [95, 10, 20, 10, 1065]}
    objects = [
        {"image_id": 0, "category_id": 1, "bbox": [2, 3, 10, 20], "area": 100.0, "iscrowd": 0, "segmentation": outline},
        {"image_id": 3, "category_id": 7, "bbox": [3, 5, 2, 10], "area": 20, "iscrowd": 1, "segmentation": runs},
        {"image_id": 6, "category_id": 7, "bbox": [20.5, 3, 8.25, 6], "area": 40.5, "iscrowd": 0, "ignore": 0},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0},
        {"image_id": 12, "category_id": 1, "bbox": [0, 0, 40, 30]},
    ]
    classes = [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]
    return {
        "info": {"year": 2026},
        "images": images,
        "annotations": [{"id": k, **x} for k, x in enumerate(objects, 11)],
        "categories": classes,
    }


def _sound(folder: Path) -> None:
    """Writes the annotations and the images that are changed afterwards."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "annotations_train.json").write_text(json.dumps(_content()))
    noise = np.random.default_rng(0).integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8)
    for name, (mode, options) in _IMAGES.items():
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257 if mode == "I;16" else noise)
        with io.BytesIO() as file:
            image.convert(mode).save(file, "JPEG" if name.endswith("jpg") else "PNG", **options)
            (folder / "train" / name).write_bytes(file.getvalue())


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes of which a few are others, a piece is gone, there twice or elsewhere, or the end is cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    piece = slice(start := rng.randrange(len(data)), start + rng.randrange(1, 60))
    match rng.randrange(8):
        case 0:
            del changed[piece]
        case 1:
            changed[start:start] = data[piece]
        case 2:
            place = rng.randrange(len(data))
            changed[place:place] = data[piece]
        case 3:
            del changed[start:]
    return bytes(changed)


def changed_values(content: Any, rng: random.Random) -> Any:
    """Parsed JSON of which one or two values are others, or are gone, or whose entries are there twice."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(content))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case 2:
                other, there = rng.choice(places)
                holder[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else None
            case _:
                holder[key] = copy.deepcopy(rng.choice(_HOSTILE))
    return content


def _places(content: Any) -> Any:
    """Every list or object in a tree with each of its keys."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from _places(content[key])


class _Hang(BaseException):
    """Reading takes too long; nobody takes it for an error of a library."""


def met(count: int, workdir: Path, rng: random.Random) -> dict[str, Any]:
    """Changes the annotations ``count`` times, and so the JPEG and the PNG files, and reads all of the data each time.

    Returns:
        by "annotations", "jpg" and "png", how often they were "read", what is wrong was "said", or "wrong" things
        happened, a traceback or a hang; the most "seconds" that one took, and the most memory of this process, "MiB".
    """
    folder = workdir / "mutations"
    _sound(folder)
    read(folder)
    found: dict[str, Any] = {}
    slowest = 0.0
    signal.signal(signal.SIGALRM, _hang)
    for kind in ("annotations", "jpg", "png"):
        outcomes: Counter[str] = Counter()
        files = sorted(folder.glob("*.json" if kind == "annotations" else f"train/*.{kind}"))
        for number in range(count):
            file = files[number % len(files)]
            sound = file.read_bytes()
            if kind == "annotations" and number % 2:
                file.write_text(json.dumps(changed_values(json.loads(sound), rng)))
            else:
                file.write_bytes(changed_bytes(sound, rng))
            began = time.monotonic()
            signal.alarm(_LIMIT)
            outcomes[_outcome(lambda: read(folder))] += 1
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
            file.write_bytes(sound)
        found[kind] = dict(outcomes)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "seconds": slowest, "MiB": memory}


def _hang(*_: object) -> None:
    raise _Hang


def read(folder: Path) -> None:
    """Opens the data of a folder, and makes training batches of all images, with masks."""
    source = open_source(f"coco_json:{folder}", "train")
    task = Detection(mask_size=14)
    task.check_source(source)
    batches = train_batches(source, batch_size=2, image_size=(32, 32), task=task, seed=0, num_threads=1)
    for _ in itertools.islice(batches, len(_IMAGES) // 2):
        pass


def _outcome(work: Callable[[], None]) -> str:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Which images others take the place of.
            work()
    except UserError:
        return "said"
    except (Exception, _Hang):
        traceback.print_exc()
        return "wrong"
    return "read"
