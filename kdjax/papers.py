"""What papers report of the pairs that their methods have variants for: ``python -m kdjax.papers``.

A pair that is not in ``REPORTS`` is an extrapolation of ours: nobody has reported it.
"""

from typing import NamedTuple

from kdjax.config import load_config
from kdjax.pairs import PAIRS


class Report(NamedTuple):
    """AP on COCO's validation set, or what ``of`` says, in percent, as the authors state it."""

    teacher: float | None
    """Of the teacher's boxes, by the model zoo that its file is from; None where nobody states it."""
    alone: float | None
    """Of the student without the method; None where they do not state it."""
    distilled: float
    """Of the student with it."""
    of: str = "boxes"
    """What the student's figures are of: "boxes", "masks", "top-1" of images, or "mIoU" of their pixels."""
    remark: str = ""
    """What must be known to compare with it."""


REPORTS: dict[tuple[str, str], tuple[Report, ...]] = {
    ("mgd", "retinanet_x101_r50"): (Report(41.6, 37.4, 41.0),),
    ("mgd", "reppoints_x101_r50"): (
        Report(44.2, 38.6, 42.3, remark="the config's name says 64x4d, its teacher's file is of a 32x4d"),
    ),
    ("mgd", "cascade_mask_rcnn_x101_faster_rcnn_r50"): (Report(47.3, 38.4, 42.1),),
    ("mgd", "cascade_mask_rcnn_x101_mask_rcnn_r50"): (Report(47.3, 35.4, 38.1, "masks"),),
    ("mgd", "solo_r101_r50"): (
        Report(None, 33.1, 36.2, "masks", remark="the teacher is a file of the authors', of schedule 3x"),
    ),
    ("maskd", "retinanet_r101_r50"): (Report(38.9, 37.4, 39.9),),
    ("maskd", "retinanet_x101_r50"): (
        Report(41.6, 37.4, 41.0, remark="the README calls the teacher 41.0, the config has this file"),
    ),
    ("maskd", "faster_rcnn_r101_r50"): (
        Report(39.8, 38.4, 41.0, remark="the tokens' config loads the R101 into an R50; here they are the teacher's"),
    ),
    ("maskd", "cascade_mask_rcnn_x101_faster_rcnn_r50"): (
        Report(45.6, 38.4, 42.7, remark="alone with a box for each class, distilled with one for all"),
    ),
    ("maskd", "fcos_r101_r50"): (
        Report(40.8, 38.5, 42.9, remark="alone without the changes to the head that the distilled student has"),
    ),
    ("maskd", "reppoints_x101_r50"): (
        Report(44.2, 38.6, 42.5, remark="the README calls the teacher an R101, the config has this file"),
    ),
    ("icd", "retinanet_r101_r50"): (Report(40.4, 37.4, 40.7),),
    ("icd", "faster_rcnn_r101_r50"): (Report(42.0, 37.9, 40.9),),
    ("icd", "mask_rcnn_r101_r50"): (Report(42.9, 38.6, 41.2), Report(42.9, 35.2, 37.4, "masks")),
    ("icd", "fcos_r101_r50"): (
        Report(43.1, 39.4, 42.9, remark="theirs had a teacher of schedule 3x, which is not published"),
    ),
    ("ld", "gfl_r101_r18"): (Report(44.7, 35.8, 36.5, remark="MMDetection's figures, of the main region alone"),),
    ("ld", "gfl_r101_r50"): (Report(44.7, 40.1, 41.0, remark="MMDetection's figures, of the main region alone"),),
}
"""Read in the authors' repositories; a test holds them to the lines that state them."""

ON_IMAGENET: dict[tuple[str, str], Report] = {
    ("mgd", "resnet34_resnet18"): Report(73.62, 69.90, 71.69, of="top-1"),
    ("mgd", "resnet50_mobilenetv1"): Report(76.55, 69.21, 72.49, of="top-1"),
}
"""Top-1 accuracy on ImageNet's validation set, in percent, as MGD's README states it."""

ON_CITYSCAPES: dict[tuple[str, str], Report] = {
    ("mgd", "pspnet_r101_r18"): Report(78.34, 69.85, 73.63, of="mIoU"),
    ("mgd", "pspnet_r101_deeplabv3_r18"): Report(78.34, 73.20, 76.31, of="mIoU", remark="76.02 in the abstract"),
    ("maskd", "deeplabv3_r101_r18"): Report(78.07, None, 77.00, of="mIoU"),
    ("maskd", "deeplabv3_r101_mobilenetv2"): Report(78.07, None, 75.26, of="mIoU"),
    ("maskd", "deeplabv3_r101_pspnet_r18"): Report(78.07, None, 75.34, of="mIoU"),
}
"""Mean IoU on Cityscapes' validation set, in percent, as the READMEs state it."""

METHODS = ("mgd", "maskd", "icd", "dmkd", "dfmsd", "mimic")
"""Configs that have every pair."""


def methods_of(pair: str) -> tuple[str, ...]:
    """Configs that have a pair.

    >>> methods_of("gfl_r101_r18")[-1]
    'ld'
    """
    return (*METHODS, "ld") if {PAIRS[pair].teacher.model["name"], PAIRS[pair].student["name"]} == {"gfl"} else METHODS


def table() -> list[str]:
    """Every method and pair, with what is reported of it, in lines of a Markdown page."""
    lines = [
        "# What the papers report",
        "",
        "Made by `python -m kdjax.papers > docs/papers.md` from `kdjax/papers.py`. AP on COCO's validation set, as the",
        "authors state it, nothing of it measured here. Every other pair of a method is ours: its settings are an",
        "extrapolation, and no figure is known. The code of DMKD and DFMSD is not public: their settings are ours.",
        "",
        "Not as theirs yet, in every pair: methods average over valid positions, where theirs average over the",
        "padding too; a fresh pyramid starts as torchvision's. ICD's RetinaNet divides by the positives of the batch,",
        "not by their moving average. Students compute in bfloat16 here, in float32 there, which",
        "`--config.student.dtype=float32` is here.",
        "",
        "| variant | teacher | the student alone | distilled | |",
        "|---|---|---|---|---|",
    ]
    for (method, pair), reports in REPORTS.items():
        for report in reports:
            what = ", ".join(filter(None, ("AP of masks" if report.of == "masks" else "", report.remark)))
            teacher = report.teacher or "not stated"
            lines.append(f"| `{method}:{pair}` | {teacher} | {report.alone} | {report.distilled} | {what} |")
    lines += ["", "| pair | reported by | ours with | files of teachers |", "|---|---|---|---|"]
    for pair in PAIRS:
        reported = [method for method in methods_of(pair) if (method, pair) in REPORTS]
        others = [method for method in methods_of(pair) if method not in reported]
        files: dict[str, list[str]] = {}
        for method in methods_of(pair):
            files.setdefault(load_config(f"{method}:{pair}").teacher.weights, []).append(method)
        usual = max(files, key=lambda file: len(files[file]))
        named = [f"`{file}`" + f" ({', '.join(files[file])})" * (file != usual) for file in files]
        lines.append(f"| `{pair}` | {', '.join(reported) or 'nobody'} | {', '.join(others)} | {', '.join(named)} |")
    for what, figures_of in (
        ("Top-1 accuracy on ImageNet's validation set", ON_IMAGENET),
        ("Mean IoU on Cityscapes' validation set", ON_CITYSCAPES),
    ):
        lines += ["", f"{what}, likewise:", "", "| variant | teacher | the student alone | distilled | |"]
        lines += ["|---|---|---|---|---|"]
        for (method, pair), report in figures_of.items():
            figures = f"{report.teacher} | {report.alone or 'not stated'} | {report.distilled}"
            lines.append(f"| `{method}:{pair}` | {figures} | {report.remark} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
