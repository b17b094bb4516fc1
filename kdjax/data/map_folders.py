"""Folders of images and of label maps, whose pixels are the numbers of classes: people's own, VOC's and Cityscapes'."""

import os
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

import numpy as np

from kdjax.data import flaws
from kdjax.data.annotated import sliced
from kdjax.data.check import check_images
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.folders import headers_of, no_split, pictures, read_text, readable, split_words
from kdjax.data.images import ImageError, UndecodableError
from kdjax.data.mapped import IndexedMaps, mapped_source
from kdjax.data.vocabularies import CITYSCAPES, VOC_CLASSES, Vocabulary, cityscapes, vocabulary
from kdjax.errors import DataError, UserError
from kdjax.paths import Path
from kdjax.types import IGNORED

_MAPS_OF_CITIES = ("_gtFine_labelIds", "_gtFine_labelTrainIds")


def open_index_maps(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedMaps:
    """Opens one split of ``images/<split>/<name>.*`` with the label maps ``labels/<split>/<name>.png``.

    ``classes.txt`` has the name of a class in each line; a pixel of a label map is the number of its class, from 0, or
    255 where it is ignored. Grey PNGs hold numbers as their values, PNGs with a palette as those of their colours.

    Args:
        folder: holds ``images``, ``labels`` and ``classes.txt``.
        split: ``train``, ``validation`` or ``test``, found by the usual names (``val``, ``valid``), or the name of the
            folders. With a part at the end, see :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, and what is wrong.
    """
    folder = readable(folder, "index_maps")
    name, _ = sliced(split)
    place = _folder_of(folder, "images", name)
    words = vocabulary(_class_names(folder, checks))
    return _opened(
        folder,
        split,
        checks,
        words,
        _by_stem(folder, f"images/{place}"),
        _by_stem(folder, f"labels/{place}"),
        f"labels/{place}",
    )


def open_voc_maps(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedMaps:
    """Opens one split of a folder as Pascal VOC has it for semantic segmentation.

    ``ImageSets/Segmentation/<split>.txt`` lists the names of ``JPEGImages/<name>.jpg`` with the label maps
    ``SegmentationClass/<name>.png``, whose palette's numbers are the classes: VOC's 21, or those of ``classes.txt``.

    Args:
        folder: such as ``VOCdevkit/VOC2012``.
        split: the name of a list, ``train``, ``validation`` (``val``), ``trainval``. With a part at the end, see
            :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, and what is wrong.
    """
    folder = readable(folder, "voc_maps")
    name, _ = sliced(split)
    lists = folder / "ImageSets" / "Segmentation"
    listed = next((path for word in split_words(name) if (path := lists / f"{word}.txt").is_file()), None)
    if listed is None:
        there = sorted(path.stem for path in lists.glob("*.txt"))
        lacks = f"no list ImageSets/Segmentation/{name}.txt"
        raise no_split(folder, name, lacks, f"name one of the lists that it has ({', '.join(there) or 'none'})")
    stems = [line.split()[0] for line in read_text(listed, checks).splitlines() if line.strip()]
    images, maps = _by_stem(folder, "JPEGImages"), _by_stem(folder, "SegmentationClass")
    if missing := [stem for stem in stems if stem not in images]:
        raise DataError(f"{folder} has no image JPEGImages/{missing[0]}.jpg, which {listed} names.")
    names = _class_names(folder, checks) if (folder / "classes.txt").is_file() else VOC_CLASSES
    chosen = {stem: images[stem] for stem in stems}
    own = {stem: maps[stem] for stem in stems if stem in maps}
    return _opened(folder, split, checks, vocabulary(names), chosen, own, "SegmentationClass")


def open_cityscapes(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedMaps:
    """Opens one split of Cityscapes: ``leftImg8bit/<split>/<city>/*.png`` with label maps in ``gtFine/<split>/<city>``.

    The label ids of ``*_gtFine_labelIds.png`` become the 19 classes; all others are ignored. Where there are none,
    ``*_gtFine_labelTrainIds.png`` has the classes themselves.

    Args:
        folder: holds ``leftImg8bit`` and ``gtFine``.
        split: ``train`` or ``validation`` (``val``), or the name of the folders. With a part at the end, see
            :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, and what is wrong.
    """
    folder = readable(folder, "cityscapes")
    name, _ = sliced(split)
    place = _folder_of(folder, "leftImg8bit", name)
    images = _without(_by_stem(folder, f"leftImg8bit/{place}"), "_leftImg8bit")
    every = _by_stem(folder, f"gtFine/{place}")
    by_ids, by_classes = (_without(every, ending) for ending in _MAPS_OF_CITIES)
    words = cityscapes() if by_ids or not by_classes else vocabulary(tuple(CITYSCAPES))
    return _opened(folder, split, checks, words, images, by_ids or by_classes, f"gtFine/{place}", _MAPS_OF_CITIES[0])


def _folder_of(folder: Path, root: str, split: str) -> str:
    """The name of the folder of a split in that of all images."""
    if not (folder / root).is_dir():
        raise UserError(f"{folder} has no folder {root}: images are {root}/{split}/<name>.")
    for word in split_words(split):
        if (folder / root / word).is_dir():
            return word
    there = sorted(path.name for path in (folder / root).iterdir() if path.is_dir())
    advice = f"name one of the folders that it has ({', '.join(there[:8]) or 'none'})"
    raise no_split(folder, split, f"no folder {root}/{split}", advice)


def _class_names(folder: Path, checks: Checks) -> tuple[str, ...]:
    """The lines of classes.txt."""
    file = folder / "classes.txt"
    if not file.is_file():
        raise UserError(
            f"{folder} has no classes.txt: the name of a class in each line, that of the value 0 of label maps first."
        )
    names = [line.strip() for line in read_text(file, checks).splitlines() if line.strip()]
    if repeated := [name for k, name in enumerate(names) if name in names[:k]]:
        raise DataError(f"{file} names {repeated[0]!r} twice; every class has a line of its own.")
    if not 2 <= len(names) <= IGNORED:
        raise DataError(f"{file} names {len(names)} classes; there must be 2 to {IGNORED}.")
    return tuple(names)


def _by_stem(folder: Path, place: str) -> dict[str, str]:
    """The pictures below a place, relative to the folder, by their names within the place without an ending."""
    found: dict[str, str] = {}
    for name in pictures(folder, folder / place) if (folder / place).is_dir() else []:
        stem = str(PurePosixPath(name).relative_to(place).with_suffix(""))
        if stem in found:
            raise DataError(f"{folder} has {found[stem]} and {name}, which only their endings tell apart: rename one.")
        found[stem] = name
    return found


def _without(files: Mapping[str, str], ending: str) -> dict[str, str]:
    """The files whose names end so, by what stands before it."""
    return {stem.removesuffix(ending): name for stem, name in files.items() if stem.endswith(ending)}


def _opened(
    folder: Path,
    split: str,
    checks: Checks,
    words: Vocabulary,
    images: Mapping[str, str],
    maps: Mapping[str, str],
    place: str,
    ending: str = "",
) -> IndexedMaps:
    """The images of a split with their label maps, both by what they have in common, relative to the folder.

    Label maps are looked for in ``place``, and their names end with ``ending``.
    """
    report = DataReport(f"{folder} {split}", checks)
    stems = sorted(images)
    stems = [stems[row] for row in sliced(split)[1]([images[stem] for stem in stems])]
    if not stems:
        raise DataError(f"{report.origin} has no image.")
    if not maps:
        raise DataError(
            f"{folder} has no label map in {place}: that of {images[stems[0]]} is {place}/{stems[0]}{ending}.png."
        )
    stray = sorted(maps.keys() - images.keys())
    report.settle(flaws.STRAY_MAP, range(len(stray)), lambda k: maps[stray[k]], [maps[stem] for stem in stray])
    bare = [row for row, stem in enumerate(stems) if stem not in maps]

    def missing(k: int) -> str:
        stem = stems[bare[k]]
        near = next((name for other, name in maps.items() if other.startswith(stem)), "")
        return f"{images[stem]} has no {place}/{stem}{ending}.png{f', but there is {near}' * bool(near)}"

    report.settle(flaws.NO_MAP, [row + 1 for row in bare], missing, [images[stems[row]] for row in bare])
    rows = np.array([row for row, stem in enumerate(stems) if stem in maps], np.int64)
    names, map_names = [images[stems[row]] for row in rows], [maps[stems[row]] for row in rows]
    # Of label maps too: what is a link or no file at all is not read.
    map_names, map_headers = headers_of(folder, folder, rows + 1, map_names, report)
    names, found = headers_of(folder, folder, rows + 1, names, report)
    kept, own = check_images(rows + 1, names, np.zeros((len(names), 2), np.int64), found, report)
    map_names, map_headers = ([x[row] for row in own.tolist()] for x in (map_names, map_headers))

    def path_in(names: list[str]) -> Callable[[int], Path]:
        return lambda row: folder / names[row]

    image_path, map_path = path_in(list(kept.names)), path_in(map_names)

    def read_map(row: int) -> bytes:
        error = map_headers[row]
        # Values that are no colours may be numbers all the same.
        if isinstance(error, ImageError) and not isinstance(error, UndecodableError):
            raise error
        return map_path(row).read_bytes()

    return mapped_source(
        kept,
        map_names,
        words,
        read=lambda row: image_path(row).read_bytes(),
        read_map=read_map,
        report=report,
        path=image_path,
        map_path=map_path,
    )
