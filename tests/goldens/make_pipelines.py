"""Writes what torchvision's whole pipelines find: ``python -m tests.goldens.make_pipelines``.

That needs torchvision. From pixels to boxes: its detectors scale, normalise and pad the photographs themselves. These
and the weights are drawn by rules (:mod:`tests.goldens.synthetic`), so that only what was found is kept, with the names
and shapes of the weights, and the pixels of some photographs once they are scaled.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tests.goldens.synthetic import photograph, synthetic_state_dict

HERE = Path(__file__).resolve().parent / "pipelines"
CLASSES, SHORT_SIDE, LONG_SIDE = 5, 128, 192
PHOTOGRAPHS = {
    "as it is": (128, 150, 1),
    "as it is, portrait": (150, 128, 1),
    "twice": (64, 75, 16),
    "half": (256, 300, 4),
    "enlarged": (90, 113, 1),
    "shrunk": (200, 251, 1),
}
"""Height, width, and what pixels are multiples of, by what becomes of them: twice and half as large they are whole."""
SCALED = {"enlarged": (29, 47), "shrunk": (213, 150)}
"""Height and width of photographs of which scaled pixels are kept; their shorter sides become 64 pixels."""


def main() -> None:
    for name, dense in (("RetinaNet", True), ("FCOS", True), ("FasterRCNN", False)):
        extra = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if dense else {}
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **extra
        )
        places = CLASSES + (not dense)
        model = getattr(detection, name)(backbone, places, min_size=SHORT_SIDE, max_size=LONG_SIDE).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        state = synthetic_state_dict(shapes, seed=0)
        model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
        arrays = {}
        for number, drawn in enumerate(PHOTOGRAPHS.values()):
            pixels = torch.from_numpy(photograph(*drawn, seed=number)).permute(2, 0, 1).float() / 255
            with torch.no_grad():
                (found,) = model([pixels])
            arrays |= {f"{number}/{key}": found[key].numpy() for key in ("boxes", "scores", "labels")}
        meta = {
            "model": name,
            "torchvision": torchvision.__version__,
            "num_classes": CLASSES,
            "first_label": int(not dense),
            "short_side": SHORT_SIDE,
            "long_side": LONG_SIDE,
            "weight_seed": 0,
            "photographs": PHOTOGRAPHS,
            "spec": shapes,
        }
        HERE.mkdir(exist_ok=True)
        np.savez_compressed(HERE / f"{name.lower()}.npz", meta=json.dumps(meta), **arrays)
        print(name, {key: x.shape for key, x in arrays.items() if "boxes" in key})
    transform = detection.transform.GeneralizedRCNNTransform(64, 192, [0.0] * 3, [1.0] * 3)
    scaled = {}
    for number, (name, size) in enumerate(SCALED.items()):
        pixels = torch.from_numpy(photograph(*size, step=1, seed=number)).permute(2, 0, 1).float()
        images, _ = transform([pixels])
        height, width = images.image_sizes[0]
        scaled[name] = images.tensors[0, :, :height, :width].permute(1, 2, 0).round().byte().numpy()
    np.savez_compressed(HERE / "scaled.npz", meta=json.dumps(SCALED), **scaled)


if __name__ == "__main__":
    main()
