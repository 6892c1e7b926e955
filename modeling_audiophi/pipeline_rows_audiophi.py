"""What the pipeline can be given: one input or several, and how several are read, prepared and finished in order."""

import os
from collections.abc import Iterable
from numbers import Real

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.pipelines.pt_utils import KeyDataset


class Results:
    """Results of several inputs in their order, made batch by batch while one iterates."""

    def __init__(self, batches, forward, finish, rows):
        self.batches, self.forward, self.finish, self.rows = batches, forward, finish, rows

    def __len__(self):
        return len(self.rows)

    def unfinished(self):
        """Rows as `_forward` leaves them."""
        for batch in self.batches:
            yield from self.forward(batch)

    def __iter__(self):
        return map(self.finish, self.unfinished())


class Indexed(Dataset):
    """Prepares row `index` of something with a length when it is asked for."""

    def __init__(self, rows, prepare):
        self.rows, self.prepare = rows, prepare

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.prepare(lambda: self.rows[index])


class Streamed(IterableDataset):
    """Prepares the rows of anything else as they come."""

    def __init__(self, rows, prepare):
        self.rows, self.prepare = rows, prepare

    def __iter__(self):
        return (self.prepare(lambda row=row: row) for row in self.rows)


def loader(rows, prepare, batch_size, num_workers):
    """Prepared rows in lists of `batch_size`. `prepare` gets a function that reads the row."""
    indexed = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    workers = (num_workers or 0) if indexed else min(1, num_workers or 0)  # each would read the whole stream
    rows = (Indexed if indexed else Streamed)(rows, prepare)
    return DataLoader(rows, batch_size, num_workers=workers, collate_fn=list)


def prompt(encoded, question):
    """The chat that asks `question` about clips."""
    content = [{"type": "audio", "encoded": clip} for clip in encoded]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def is_chat(value):
    """Whether a value is a list of turns."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]


def is_one_input(value):
    """Whether a value is one clip, row or chat, rather than several."""
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, dict, np.ndarray, torch.Tensor)):
        return True
    if hasattr(value, "get_all_samples"):  # a decoder of `datasets`
        return True
    if not isinstance(value, (list, tuple)):
        return not isinstance(value, Iterable) and not hasattr(value, "__getitem__")
    if not value or is_chat(value):
        return bool(value)
    if isinstance(value[0], Real):  # samples
        return True
    return len(value) == 2 and isinstance(value[1], Real)  # (array, sampling rate)


def undecoded(rows):
    """A data set of `datasets` that hands out its audio as files: a broken one then costs its own row, and our decoder
    names it."""
    if isinstance(rows, KeyDataset):
        return KeyDataset(undecoded(rows.dataset), rows.key)
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Audio" and getattr(feature, "decode", False):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows
