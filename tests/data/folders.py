"""A tiny folder of data in COCO's format, to be spoilt in one place."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(height, width, mode="RGB", kind="PNG", seed=0, **options):
    """An encoded image of noise, another for each seed."""
    pixels = np.random.default_rng((height * width, seed)).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def content():
    """Three images, 5, 7 and 9, of 40 x 30 pixels; annotations 11 and 12 in image 5, 13 in image 7; two classes."""
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in (5, 7, 9)],
        "annotations": [
            {"id": 11, "image_id": 5, "category_id": 1, "bbox": [2, 3, 10, 20], "area": 150, "iscrowd": 0},
            {"id": 12, "image_id": 5, "category_id": 2, "bbox": [20.5, 3, 8.25, 6], "area": 40.5, "iscrowd": 0},
            {"id": 13, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write(folder, content, file="annotations_train.json", images="train"):
    """Writes annotations, and a picture of the right size for each of their images whose name can be a file's."""
    folder = Path(folder)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for entry in content["images"]:
        place = folder / images / entry["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(entry["height"], entry["width"], seed=zlib.crc32(f"{images}/{place.name}".encode())))
    return folder
