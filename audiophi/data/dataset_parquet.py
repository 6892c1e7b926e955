"""Parquet files: which of a source's there are, and the rows of one of several readers, who opens no others' files."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from .dataset_files import metadata_file


def parquet_files(entry: dict) -> list[Path]:
    """The Parquet files of a specification: itself, or a folder's where no other metadata stands beside them."""
    path = Path(entry["path"]).expanduser()
    if entry["kind"] or not path.exists():
        return []
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    if metadata_file(path) is not None:
        metadata = metadata_file(path)
        return [metadata] if metadata.suffix == ".parquet" else []
    return sorted(path.rglob("*.parquet"))


def files_of_split(files: list[Path], names: list[str], entry: dict) -> list[Path]:
    """The files that hold the split that is asked for: it is a column of theirs, by which `entry` then filters, or
    their names begin with it. ValueError where neither is so."""
    if not entry["split"]:
        return files
    if "split" in names:
        entry["filter"] = {**entry["filter"], "split": {entry["split"]}}
        return files
    named = named_as(files, entry)
    if not named:
        raise ValueError(f"{entry['path']}: has no column `split` and no Parquet file of split {entry['split']!r}.")
    return named


def named_as(files: list[Path], entry: dict) -> list[Path]:
    return [file for file in files if file.name.startswith(entry["split"] or "")]


def opened(file: Path) -> pyarrow.parquet.ParquetFile:
    """The file; ValueError naming it where it is none, or damaged."""
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: cannot be read as Parquet ({error}). Is it empty, or not all there?")


class ParquetShare:
    """The share of Parquet files that is one reader's: of F files, the F / count that begin at its place, so that it
    shares at most the first and the last of them, by their rows. Files of others are not opened.

    Args:
        part: (index, count) of the reader.
    Attributes:
        names, labels: columns, and of those with classes number -> name.
    Raises ValueError naming a file that cannot be read, here or when its rows are.
    """

    def __init__(self, files: list[Path], entry: dict, part: tuple[int, int]):
        self.entry = entry
        schema = opened(shares_of(named_as(files, entry) or files, part)[0][0]).schema_arrow
        self.names = schema.names
        features = datasets.Features.from_arrow_schema(schema)
        self.labels = {name: kind.int2str for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        self.shares = shares_of(files_of_split(files, self.names, entry), part)

    def __iter__(self) -> Iterator["StoredRow"]:
        for path, first, last, parts in self.shares:
            file = StoredFile(path)
            wanted = file.wanted(self.entry)
            for number in wanted[first * len(wanted) // parts : last * len(wanted) // parts]:
                yield StoredRow(file, int(number))


def shares_of(files: list[Path], part: tuple[int, int]) -> list[tuple[Path, int, int, int]]:
    """(file, first, last, parts) of a reader: of each file's equal `parts` those from `first` up to `last`."""
    (index, count), shares = part, []
    begin, end = index * len(files), (index + 1) * len(files)  # in parts of files
    for number in range(begin // count, -(-end // count)):
        place = number * count
        shares.append((files[number], max(begin - place, 0), min(end - place, count), count))
    return shares


class StoredFile:
    """A Parquet file of which one group of rows is held at a time."""

    def __init__(self, path: Path):
        self.path, self.file, self._held = path, opened(path), (-1, None)
        metadata = self.file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._begins = np.cumsum([0, *sizes])

    def wanted(self, entry: dict) -> np.ndarray:
        """Numbers of the rows that filter and exclude leave; no other column is read for it."""
        kept = np.ones(self._begins[-1], dtype=bool)
        for key, keep in (("filter", True), ("exclude", False)):
            for column, values in entry[key].items():
                if column not in self.file.schema_arrow.names:
                    names = ", ".join(self.file.schema_arrow.names)
                    raise ValueError(f"{entry['path']}: filter on {column!r}, but {self.path.name} has only {names}.")
                told = self._read(self.file.read, [column])[column].to_pylist()
                kept &= np.array([(str(value) in values) == keep for value in told], dtype=bool)
        return np.flatnonzero(kept)

    def row(self, number: int) -> dict:
        group = int(np.searchsorted(self._begins, number, side="right")) - 1
        if self._held[0] != group:
            self._held = (-1, None)  # not two at a time
            self._held = (group, self._read(self.file.read_row_group, group))
        return self._held[1].slice(number - self._begins[group], 1).to_pylist()[0]

    def _read(self, read, what):
        try:
            return read(what)
        except (pyarrow.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from error


class StoredRow(Mapping):
    """A row of a Parquet file, read when somebody looks into it."""

    def __init__(self, file: StoredFile, number: int):
        self.file, self.number = file, number

    @cached_property
    def values_of_row(self) -> dict:
        return self.file.row(self.number)

    def __getitem__(self, name: str):
        return self.values_of_row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of_row)

    def __len__(self) -> int:
        return len(self.values_of_row)
