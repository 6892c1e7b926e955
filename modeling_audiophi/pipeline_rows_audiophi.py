"""What the pipeline can be given: one input or several, how several are read and finished in order, how each becomes
prompts."""

import multiprocessing
import os
from collections.abc import Iterable
from numbers import Real

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.pipelines.pt_utils import KeyDataset

from .chunks_audiophi import split_at_pauses
from .generation_audiophi import AUDIO_INPUTS

ROW_ERRORS = (ValueError, OSError)  # what a single input can be to blame for, in words
# What reading something malformed ends in where nobody foresaw it: no reason to lose the other rows.
MALFORMED = (TypeError, KeyError, IndexError, AttributeError, RuntimeError)


class RowReader:
    """One input → its prompts. Without a model, so that other processes can do it.

    Args:
        processor: AudioPhiProcessor.
        task, instruction, chunk_length_s, sampling_rate: what the pipeline is told for all rows, see there.
    """

    def __init__(self, processor, task=None, instruction=None, chunk_length_s=None, sampling_rate=None):
        self.processor, self.task, self.instruction = processor, task, instruction
        self.chunk_length_s, self.sampling_rate = chunk_length_s, sampling_rate

    def read(self, row):
        """One input → {"prompts": chats with encoded audio, "seconds": their (start, end) or None, "task": its name or
        None, "continued": whether the last turn is the assistant's}.

        Raises ValueError (`AudioError` for a clip) naming what cannot be used.
        """
        try:
            return self._chat(row) if is_chat(row) else self._question(row)
        except MALFORMED as error:
            raise ValueError(f"this input cannot be read ({type(error).__name__}: {error}): {row!r:.200}") from error

    def __call__(self, read):
        """`read` for one of several inputs, which the function `read` gets: what is wrong with it is its result."""
        try:
            return self.read(read())
        except (*ROW_ERRORS, *MALFORMED) as error:
            return {"error": error}

    def _question(self, row):
        """A clip, or a row: {"audio", "instruction", "task", "sampling_rate"}, with one of the first two."""
        task, instruction, rate, clips = self.task, self.instruction, self.sampling_rate, [row]
        if isinstance(row, dict) and ("audio" in row or "instruction" in row):
            task, instruction = row.get("task") or task, row.get("instruction") or instruction
            rate, clips = row.get("sampling_rate", rate), row.get("audio")
            if not isinstance(clips, list) or is_one_input(clips):
                clips = [] if clips is None else [clips]
            if not clips and not row.get("instruction"):
                raise ValueError(f"this row has neither audio nor an instruction of its own: {row!r:.200}")
        task, question = self.request(task, instruction)
        if task is None:
            # What the words ask for does not depend on what is heard.
            items = [{"type": "audio"}] * len(clips)
            task = self.processor.task_of([{"role": "user", "content": [*items, {"type": "text", "text": question}]}])
        if len(clips) != 1 or not self.processor.tasks.get(task, {}).get("in_pieces"):
            encoded = [self.processor.encode_audio(clip, rate) for clip in clips]
            return {"prompts": [prompt(encoded, question)], "seconds": None, "task": task, "continued": False}
        waveform, rate = self.processor.load_audio(clips[0], rate), self.processor.sampling_rate
        longest = window_seconds(self.processor) if self.chunk_length_s is None else self.chunk_length_s
        pieces = split_at_pauses(waveform, rate, longest) if longest else [(0, len(waveform))]
        return {
            "prompts": [prompt([self.processor.encode_audio(waveform[a:b], rate)], question) for a, b in pieces],
            "seconds": [(round(a / rate, 3), round(b / rate, 3)) for a, b in pieces],
            "task": task,
            "continued": False,
        }

    def request(self, task, instruction):
        """What is asked for → (task or None where only the words say, words). ValueError for an unknown task, and for
        nothing at all with a model that has no tasks."""
        tasks = self.processor.tasks
        if task is not None and task not in tasks:
            raise ValueError(f"unknown task {task!r}; this model knows: {', '.join(tasks) or 'none'}")
        if instruction is None and task is None:
            if not tasks:
                raise ValueError("give an instruction: this model has no task that it does unasked")
            task = next(iter(tasks))
        if instruction is None:
            return task, tasks[task]["instructions"][0]
        if not (isinstance(instruction, str) and instruction.strip()):
            raise ValueError(f"instruction must be a task or a text, not {instruction!r}")
        if instruction in tasks:
            return task or instruction, tasks[instruction]["instructions"][0]
        return task, instruction

    def _chat(self, messages):
        asked = self.processor.task_of(messages)  # reads it, and says what is wrong with it
        if self.task is not None:
            asked = self.request(self.task, None)[0]
        chat = [
            {**message, "content": [self._item(item) for item in message["content"]]}
            if isinstance(message.get("content"), (list, tuple))
            else message
            for message in messages
        ]
        return {"prompts": [chat], "seconds": None, "task": asked, "continued": chat[-1]["role"] == "assistant"}

    def _item(self, item):
        encoded = item.get("encoded", item.get("audio"))
        if item["type"] != "audio" or (isinstance(encoded, dict) and any(name in encoded for name in AUDIO_INPUTS)):
            return item
        clip = {name: value for name, value in item.items() if name != "type"}
        return {"type": "audio", "encoded": self.processor.encode_audio(clip, self.sampling_rate)}


def prompt(encoded, question):
    """The chat that asks `question` about clips."""
    content = [{"type": "audio", "encoded": clip} for clip in encoded]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def window_seconds(processor):
    """What the encoder takes at once; None: any length."""
    frames, features = processor.window_frames, processor.window_features
    return frames and frames * features.samples_per_frame / processor.sampling_rate


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
    workers = num_workers or 0
    if not indexed:  # each would read the whole stream, and a stream under way can be sent to no new process
        workers = min(1, workers) if multiprocessing.get_start_method() == "fork" else 0
    rows = (Indexed if indexed else Streamed)(rows, prepare)
    return DataLoader(rows, batch_size, num_workers=workers, collate_fn=list)


def is_chat(value):
    """Whether a value is a list of turns."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]


def is_one_input(value):
    """Whether a value is one clip, row or chat, rather than several."""
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, dict, np.ndarray, torch.Tensor)):
        return True
    if hasattr(value, "get_all_samples") or hasattr(value, "read"):  # a decoder of `datasets`; an open file
        return True
    if not isinstance(value, (list, tuple)):
        return not isinstance(value, Iterable) and not hasattr(value, "__getitem__")
    if not value or is_chat(value):
        return bool(value)
    if isinstance(value[0], Real):  # samples, or (sampling rate, array)
        return True
    return len(value) == 2 and isinstance(value[1], Real)  # (array, sampling rate)


def undecoded(rows):
    """A data set of `datasets`, or a column of one, that hands out its audio as files: a broken one then costs its own
    row, and our decoder names it."""
    if isinstance(rows, KeyDataset):
        return KeyDataset(undecoded(rows.dataset), rows.key)
    if hasattr(rows, "source") and hasattr(rows, "column_name"):  # a Column
        return type(rows)(undecoded(rows.source), rows.column_name)
    features = getattr(rows, "features", None)
    for name, feature in features.items() if isinstance(features, dict) else ():
        if type(feature).__name__ == "Audio" and getattr(feature, "decode", False):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows
