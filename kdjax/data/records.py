"""Records of data sets that tensorflow-datasets has prepared: builders, shards, and what each may be otherwise."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from kdjax.errors import DataError, StorageError, UserError

ARRAY_RECORD = "array_record"


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one split, whose images are left encoded."""

    name: str
    split: str
    builder: Any
    again: str
    """How to make damaged files anew."""
    _rows: Sequence[Any]

    @property
    def features(self) -> dict[str, Any]:
        """The builder's features by name."""
        return dict(self.builder.info.features.items())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        """Reads one record.

        Raises:
            DataError: it is damaged.
        """
        try:
            return self._rows[row]
        except Exception as error:  # Readers raise whatever damaged files lead them to.
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.name}, {self.split}: record {row} in {self.builder.data_dir} cannot be read ({what}): "
                f"{self.again}."
            ) from error


def open_records(name: str, builder: Any, split: str, again: str) -> Records:
    """Opens the records of a split, once its files are those that the data set's info lists.

    Args:
        name: for sentences.
        builder: of :func:`builder_of`.
        split: with TFDS's slices and sums.
        again: how to make damaged files anew, for sentences.

    Raises:
        UserError: it has no such split.
        DataError: its files are others, or in another format.
    """
    _check_shards(name, builder, split, again)
    images = [key for key, f in builder.info.features.items() if isinstance(f, tfds.features.Image)]
    try:
        rows = builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in images})
    except NotImplementedError:
        raise DataError(
            f"{name} in {builder.data_dir} is in the {builder.info.file_format.value} format: prepare it with "
            f"--file_format={ARRAY_RECORD}."
        ) from None
    except ValueError as error:
        raise UserError(f"{name} has no split {split!r}: {str(error).splitlines()[0]}") from None
    return Records(name, split, builder, again, rows)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars and routine messages off the terminal."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def command(name: str, root: epath.Path) -> str:
    """What prepares a data set."""
    return f"tfds build {name} --data_dir={root} --file_format={ARRAY_RECORD}"


def builder_of(name: str, root: epath.Path, download: bool) -> Any:
    """A builder that reads the newest version of ``<root>/<name>`` from its files alone."""
    there = list((root / name).iterdir()) if (root / name).is_dir() else []
    versions = {path: tfds.core.Version(path.name) for path in there if tfds.core.Version.is_valid(path.name)}
    complete = [
        path for path in versions if all((path / file).exists() for file in ("dataset_info.json", "features.json"))
    ]
    if complete:
        newest = max(complete, key=lambda path: versions[path])
        try:
            return tfds.builder_from_directory(newest)
        except Exception as error:  # Whatever a damaged description leads TFDS to.
            raise DataError(
                f"tfds:{name}: {newest} cannot be opened ({type(error).__name__}): prepare it again with "
                f"`{command(name, root)} --overwrite`."
            ) from error
    if not download:
        half = ", only begun" if versions or any("incomplete" in path.name for path in there) else ""
        raise UserError(
            f"tfds:{name} is not prepared in {root}{half}: prepare it with `{command(name, root)}`, or set "
            "config.data.download=True."
        )
    print(f"Downloading and preparing {name} in {root}, once.", file=sys.stderr, flush=True)
    try:
        builder = tfds.builder(name, data_dir=root, file_format=ARRAY_RECORD)
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(
            f"tfds:{name} can only be prepared with TensorFlow ({error}): install it with `pip install 'kdjax[tfds]'`."
        ) from error
    except Exception as error:  # Whatever network, disk or builder raise.
        raise StorageError(f"tfds:{name} cannot be prepared in {root}: {type(error).__name__}: {error}") from error
    return tfds.builder_from_directory(builder.data_dir)


def _check_shards(name: str, builder: Any, split: str, again: str) -> None:
    """Refuses a split whose files are not exactly those that the data set's info lists."""
    splits = builder.info.splits
    used = [part.partition("[")[0].strip() for part in split.split("+")]
    for part in used:
        if part not in splits:
            raise UserError(f"{name} has no split {part!r}: choose {', '.join(sorted(splits))}.")
        info = splits[part]
        if not info.num_examples:
            raise DataError(f"{name}: the split {part!r} in {builder.data_dir} is empty.")
        listed = {path.name: path for path in info.filepaths}
        prefix = next(iter(sorted(listed))).rpartition("-")[0].rpartition("-of")[0].rpartition("-")[0]
        there = {
            path.name
            for path in epath.Path(builder.data_dir).iterdir()
            if path.name.startswith(f"{prefix}-") and path.is_file()
        }
        for files, words in ((listed.keys() - there, "lacks"), (there - listed.keys(), "has besides its own files")):
            if files:
                some = ", ".join(sorted(files)[:3])
                raise DataError(f"{name}: {builder.data_dir} {words} {some} ({len(files)} file(s)): {again}.")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            continue
        for path, length in zip(sorted(info.filepaths), info.shard_lengths, strict=True):
            try:
                reader = ArrayRecordReader(os.fspath(path))
                count = reader.num_records()
                reader.close()
            except Exception as error:  # As above.
                raise DataError(f"{name}: {path} is damaged ({str(error).splitlines()[0]}): {again}.") from error
            if count != length:
                raise DataError(f"{name}: {path} has {count} records instead of {length}: {again}.")
