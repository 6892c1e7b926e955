"""Rows of several sources as they come, shared among readers, without those that were read before."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import datasets
import numpy as np

from .dataset_columns import Columns
from .dataset_parquet import ParquetShare, parquet_files
from .dataset_paths import reach_of_folder
from .datasets import PEEK, Examples, entry_of, is_wanted, open_rows, task_of
from .example import Example, RowError

Made = Callable[[], Example | RowError]


def stream_examples(
    specs: list[dict], seed: int = 0, part: tuple[int, int] = (0, 1), skip: int = 0
) -> Iterator[Example | RowError]:
    """Rows of several sources as they come, a RowError for each that cannot be used.

    part: (index, count): of every source the rows of one of `count` readers, which together read each row once.
    skip: of these rows so many are passed over, and of Parquet files not read at all.

    Where any source has a `weight` they are interleaved, drawn by weight until every one has been read once (a shorter
    one begins anew); else one comes after the other.
    """
    entries = [entry_of(spec, {}) for spec in specs]
    if not entries:
        raise ValueError("an empty list of data sets.")
    weights = [1.0 if entry["weight"] is None else float(entry["weight"]) for entry in entries]
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"data weights must be above 0, got {weights}.")
    if len(entries) == 1 or all(entry["weight"] is None for entry in entries):
        rows = itertools.chain.from_iterable(_stream(entry, part) for entry in entries)
    else:
        rows = _interleaved(entries, weights, seed, part)
    for make in itertools.islice(rows, skip, None):
        yield make()


def _interleaved(entries: list[dict], weights: list[float], seed: int, part: tuple[int, int]) -> Iterator[Made]:
    shares, rng = np.array(weights) / sum(weights), np.random.default_rng(seed)
    streams, read = [_stream(entry, part) for entry in entries], [False] * len(entries)
    while not all(read):
        number = int(rng.choice(len(entries), p=shares))
        make = next(streams[number], None)
        if make is None:
            read[number] = True
            streams[number] = _stream(entries[number], part)
            make = None if all(read) else next(streams[number], None)
        if make is not None:
            yield make


def _stream(entry: dict, part: tuple[int, int]) -> Iterator[Made]:
    """Of each row of a reader what makes an example of it, to be called before the next is asked for."""
    index, count = part
    if files := parquet_files(entry):
        # The first rows of a source may all lie in one file: all readers go through them.
        share = ParquetShare(files, entry, part if entry["limit"] is None else (0, 1))
        folder, names, labels = files[0].parent, share.names, share.labels
        rows, reach = iter(share), reach_of_folder(entry, folder)
        rows = rows if entry["limit"] is None else itertools.islice(rows, index, entry["limit"], count)
    else:
        rows, names, folder, reach, labels = open_rows(entry, streaming=True)
        if isinstance(rows, datasets.IterableDataset):
            # Readers share the files as far as these can be divided evenly, and the rows of a file among them.
            groups = math.gcd(rows.num_shards, count) if entry["limit"] is None else 1
            rows = rows.shard(groups, index % groups) if groups > 1 else rows
            first, step = index // groups, count // groups
            # Not by `iter(rows)`: inside of a loader's worker that divides the files a second time.
            rows = ({name: values[0] for name, values in batch.items()} for batch in rows.iter(1))
        else:
            first, step = index, count
        rows = (row for row in rows if is_wanted(row, entry))
        if names is None:  # rows of a manifest need not all have the same keys
            peeked = list(itertools.islice(rows, PEEK))
            if not peeked:
                return
            names, rows = list(dict.fromkeys(name for row in peeked for name in row)), itertools.chain(peeked, rows)
        rows = itertools.islice(rows, first, entry["limit"], step)
    columns = Columns(names, entry)
    columns.warn_of_unused()
    examples = Examples(None, (), columns, task_of(entry, columns), folder, reach, labels)
    for number, values in zip(itertools.count(index, count), rows, strict=False):
        examples.saw(values, number)
        yield partial(_made, examples, values, number)


def _made(examples: Examples, values, number: int) -> Example | RowError:
    try:
        return examples.of(values, number)
    except RowError as error:
        return error
