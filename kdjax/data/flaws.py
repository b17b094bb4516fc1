"""What may be wrong with annotated images, what becomes of it, and the report that counts it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kdjax.data.sizing import READING, Reading, Sizing
from kdjax.errors import DataError
from kdjax.paths import Path, in_bucket


class Checks(NamedTuple):
    """How flaws are met."""

    strict: bool = False
    """Refuse the data where something would be left out or repaired."""
    lenient: bool = False
    """Leave out images whose file is unusable and annotations of unknown images or classes, which are refused."""
    skip_empty: bool = False
    """Leave out images without objects; they are kept otherwise, as scenes with nothing to find."""
    max_objects: int | None = None
    """Room for objects in a batch, for counting those beyond it; None where there are no batches."""
    max_detections: int | None = None
    """Detections of an image that are judged, for counting images with more objects; None where nobody judges."""
    sizing: Sizing | None = None
    """How large detectors see the images, for counting objects that are too small then; None where that is open."""
    reading: Reading = READING
    """How image files are read."""
    follow_links: bool = False
    """Take images that are links to files outside of their folder, which are refused."""
    most_json_bytes: int = 10**9
    """A larger annotation file is refused: parsed, it would take several times as much memory."""
    together: bool = False
    """All processes open the data now, and each reads a part of the files for all of them."""

    def of(self, place: Path) -> "Checks":
        """These for data in a place: only what is in a bucket is known to be the same for all processes."""
        return self._replace(together=self.together and in_bucket(place))


DEFAULT = Checks()


class Flaw(NamedTuple):
    """One thing that can be wrong."""

    what: str
    """Of several: "boxes without area"."""
    of: Literal["image", "annotation", "category"]
    outcome: Literal["refused", "refused unless lenient", "left out", "repaired", "truncated", "kept"]
    """What becomes of it; "kept" is what stays as it is and is only said."""
    hint: str = ""
    """What would be right, where that is not plain."""


_LENIENT = "config.data.lenient=True leaves them out"
UNSAFE_NAME = Flaw("file names that could leave the folder of the images", "image", "refused")
LINKED = Flaw(
    "images that are links to files outside of their folder",
    "image",
    "refused",
    "config.data.follow_links=True takes them",
)
OTHER_FILE = Flaw(
    "annotation files that name another image than that of their own name, which is taken", "image", "kept"
)
OTHER_NAME = Flaw("file names that are spelled otherwise than the file that is there", "image", "repaired")
NO_SIZE = Flaw("images whose height or width is 0 or -1, where nothing or a size should be", "image", "repaired")
SAME_FILE = Flaw("images with the same file as another, whose objects join that one's", "image", "repaired")
COPIED_FILE = Flaw("images with the same file and the same objects as another", "image", "kept", "they count twice")
COPIED_IMAGE = Flaw("images with the same file and the same truth as another", "image", "kept", "they count twice")
CONTRADICTED = Flaw(
    "images with the same file as another, and another truth", "image", "kept", "at most one of the two is right"
)
SHARED_FILE = Flaw("images that the training split holds too", "image", "kept", "what is measured on them is too good")
TURNED = Flaw(
    "images with an orientation mark (EXIF), which is not applied",
    "image",
    "kept",
    "if annotations refer to images as viewers show them, set config.data.upright=True",
)
UNLABELLED = Flaw(
    "images without an annotation file, taken for scenes with nothing to find",
    "image",
    "kept",
    "config.data.skip_empty=True leaves them out",
)
STRAY = Flaw("images in no folder of a class", "image", "left out")
NO_MAP = Flaw("images without a label map", "image", "refused unless lenient", _LENIENT)
STRAY_MAP = Flaw("label maps without an image", "image", "left out")
UNUSABLE_MAP = Flaw("label maps that cannot be used", "image", "refused unless lenient", _LENIENT)
GREY_MAP = Flaw("label maps with three equal channels, of which one is taken", "image", "repaired")
MAP_SIZE = Flaw("label maps of another size than their image", "image", "refused unless lenient", _LENIENT)
ONLY_IGNORED = Flaw(
    "images all of whose pixels are ignored",
    "image",
    "kept",
    "config.data.skip_empty=True leaves them out",
)
UNUSABLE_FILE = Flaw("images that cannot be used", "image", "refused unless lenient", _LENIENT)
CUT_OFF = Flaw("images that cannot be decoded", "image", "left out")
OTHER_SIZE = Flaw("images of another size than annotated", "image", "refused unless lenient", _LENIENT)
ANIMATED = Flaw("animated images, of which the first picture is taken", "image", "repaired")
CROWDED = Flaw("images with more objects than config.data.max_objects", "image", "truncated")
UNREACHABLE = Flaw(
    "images with more objects than config.data.max_detections, so that nobody finds all",
    "image",
    "kept",
    "raise it",
)
UNKNOWN_IMAGE = Flaw("annotations of images that are not listed", "annotation", "refused unless lenient", _LENIENT)
UNKNOWN_CATEGORY = Flaw(
    "annotations of categories that are not listed", "annotation", "refused unless lenient", _LENIENT
)
IGNORED = Flaw(
    "objects marked to be ignored, which are taken for crowds: neither learnt nor judged", "annotation", "repaired"
)
UNREAD_FLAG = Flaw("marks to ignore an object that are neither 0 nor 1, and are not read", "annotation", "kept")
MOSTLY_CROWDS = Flaw(
    "crowds, more than half of all objects",
    "annotation",
    "kept",
    "crowds are neither learnt nor judged; of ordinary objects iscrowd is 0",
)
SAME_OBJECT = Flaw("objects with the image, the class and the box of another", "annotation", "left out")
ROTATED = Flaw("boxes with a rotation, which become the upright boxes around them", "annotation", "repaired")
UNREAD_ROTATION = Flaw(
    "boxes with an angle that is not read",
    "annotation",
    "kept",
    "degrees, clockwise or not, as the rotation of an annotation or of its attributes, are",
)
OTHER_OUTLINE = Flaw("objects whose box is not that of their outline", "annotation", "kept", "the box is what counts")
OTHER_AREA = Flaw(
    "objects whose area is larger than their box, or less than a hundredth of it",
    "annotation",
    "kept",
    "COCO's size classes are made of areas",
)
FROM_ZERO = Flaw(
    "boxes whose corners are taken for edges from 0, not for VOC's pixels from 1, as some are 0 or between pixels",
    "annotation",
    "kept",
)
UNKNOWN_BOX = Flaw("boxes of one negative number, which stands for an unknown box", "annotation", "left out")
THIN = Flaw("boxes less than a pixel high or wide", "annotation", "kept")
TINY = Flaw(
    "objects less than 2 pixels high or wide once images are scaled",
    "annotation",
    "kept",
    "a larger config.data.image_size keeps more of them",
)
MALFORMED_BOX = Flaw("boxes that are not four finite numbers", "annotation", "refused")
NEGATIVE_SIZE = Flaw("boxes with a negative width or height, taken from the other corner", "annotation", "repaired")
OUTSIDE = Flaw("boxes wholly outside their image", "annotation", "left out")
CLIPPED = Flaw("boxes that left their image, cut at its edge", "annotation", "repaired")
NO_AREA = Flaw("boxes without area", "annotation", "left out")
NO_OUTLINE = Flaw("objects without a usable segmentation, whose box is taken for it", "annotation", "repaired")
BAD_AREA = Flaw("objects without a usable area, whose box's is taken", "annotation", "repaired")
EMPTY_CLASS = Flaw("classes that no image shows", "category", "kept", "nothing is learnt or measured of them")
SAME_NAME = Flaw("categories with the name of another, taken for the same class", "category", "repaired")


class DataReport:
    """What was wrong with one split, flaw by flaw."""

    def __init__(self, origin: str, checks: Checks = DEFAULT):
        """Starts without flaws; ``origin`` is the file or the data set that sentences name."""
        self.origin = origin
        self.checks = checks
        self.flaws: dict[Flaw, list[int]] = {}
        """Ids of the images, annotations or categories that have each flaw."""
        self.files: dict[Flaw, list[str]] = {}
        """Their images' files, or the categories' names; fewer where that is not known."""
        self.silent = False
        """Whether somebody else, of whose report this is a copy, says what is found from now on."""

    def settle(
        self,
        flaw: Flaw,
        ids: Sequence[int] | np.ndarray,
        describe: Callable[[int], str],
        files: Sequence[str] = (),
    ) -> None:
        """Counts the cases of a flaw, or refuses the data for them.

        Args:
            flaw: what is wrong.
            ids: of what has it; nothing happens where there are none.
            describe: names a case by its position in ``ids``, for a sentence.
            files: of the images, one for each of ``ids``, or names of the categories; empty where they are not known.

        Raises:
            DataError: the flaw is one to refuse; the first cases are named.
        """
        if not len(ids):
            return
        tolerated = self.checks.lenient or flaw.outcome != "refused unless lenient"
        tolerated &= flaw.outcome != "refused"
        if self.checks.strict or not tolerated:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            cases = ", ".join(describe(k) for k in range(min(len(ids), 5)))
            raise DataError(f"{self.origin} has {flaw.what}: {cases}{more}{'; ' * bool(flaw.hint)}{flaw.hint}.")
        self.flaws.setdefault(flaw, []).extend(int(identity) for identity in ids)
        self.files.setdefault(flaw, []).extend(files)

    def outcome(self, flaw: Flaw) -> str:
        """What became of a flaw that was counted: "left out", "repaired", "truncated" or "kept"."""
        return "left out" if flaw.outcome == "refused unless lenient" else flaw.outcome

    def lines(self) -> list[str]:
        """A line for each flaw, with the first cases by their files."""
        found = []
        for flaw, ids in self.flaws.items():
            files = self.files[flaw]
            known = len(files) == len(ids)
            if flaw.of == "annotation":
                cases = [f"{ids[k]} of {files[k]}" if known else f"{ids[k]}" for k in range(min(3, len(ids)))]
            else:
                cases = files[:3] if known else list(map(str, ids[:3]))
            hint = f"; {flaw.hint}" * bool(flaw.hint and flaw.outcome == "kept")
            shown = ", ".join(cases) + ", ..." * (len(ids) > 3)
            found.append(f"  {self.outcome(flaw)}: {len(ids)} {flaw.what} ({flaw.of} {shown}){hint}")
        return found


def joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several processes found out about the same data: the first one's report, with the cases of all.

    >>> first, second = ({"what": "cut off", "count": 1, "ids": [k], "files": [f"{k}.png"]} for k in (3, 5))
    >>> joined([{"images": 9, "flaws": [first]}, {"images": 9, "flaws": [first]}, {"images": 9, "flaws": [second]}])
    {'images': 9, 'flaws': [{'what': 'cut off', 'count': 2, 'ids': [3, 5], 'files': ['3.png', '5.png']}]}

    Args:
        reports: what :meth:`kdjax.types.Source.report_dict` says, by process.
    """
    if len(reports) == 1:
        return dict(reports[0])
    found: dict[str, dict[str, Any]] = {}
    for flaw in (flaw for report in reports for flaw in report["flaws"]):
        known = found.setdefault(flaw["what"], flaw | {"ids": [], "files": []})
        seen = set(known["ids"])
        new = [k for k, identity in enumerate(flaw["ids"]) if identity not in seen]
        known["ids"] += [flaw["ids"][k] for k in new]
        known["files"] += [flaw["files"][k] for k in new if k < len(flaw["files"])]
        known["count"] = len(known["ids"])
    return {**reports[0], "flaws": list(found.values())}
