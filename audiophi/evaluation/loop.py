"""Examples -> predictions: asks a model about every row, in batches of clips of similar length.

A *prediction* is a JSON-able dict, one per row of the data:
    row (its number), id, speaker, language, seconds (of audio), clip_seconds (of each clip), reference (the first right
    answer), hypothesis (the LLM's words; None without the LLM), hypothesis_align (the alignment head's; None without a
    head), stopped (the LLM ended by itself; None where unknown), compute_seconds (its share of its batch), and what the
    task's `fields` add;
or, for a row without a score: row, id, error, readable (False: the data has no usable row there; True: the model could
not take it, say because it is longer than the LLM's context).
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from audiophi.data.example import Example, RowError, with_clips
from audiophi.tasks import wordings as task_wordings
from audiophi.tasks.base import Task
from modeling_audiophi.chunks_audiophi import split_at_pauses
from modeling_audiophi.pipeline_rows_audiophi import window_seconds
from processing.audio_io import AudioError

# Pairs of a row and the waveforms of its clips (float32, mono) -> {"hypothesis", "hypothesis_align", "stopped"} each.
Hear = Callable[[list[tuple[Example, list[np.ndarray]]]], list[dict]]


class Listener:
    """An AudioPhi model that is asked about rows, decoded as the task's settings say, without sampling.

    Args:
        engine: `modeling_audiophi.Engine`.
        task: whose rows these are; where the model was not trained on it, each row's words say how to decode.
        instruction: what all rows are asked instead of their own question; None: as the row, or else the task asks.
        with_lm, with_alignment: which of the two readings to make; the alignment's only where there is such a head.
        settings: of `generate`.
    """

    def __init__(self, engine, task: Task, instruction=None, with_lm=True, with_alignment=False, **settings):
        self.engine, self.task, self.instruction = engine, task, instruction
        self.with_lm = with_lm
        self.with_alignment = with_alignment and engine.model.config.align_vocab_size > 0
        self.settings = {"do_sample": False, **settings}
        self.sampling_rate = engine.processor.sampling_rate

    def prompt(self, example: Example, waveforms: list[np.ndarray]) -> list[dict]:
        """The chat about a row, its clips encoded."""
        if self.instruction is not None:
            example = replace(example, messages=())
        wordings = [self.instruction] if self.instruction is not None else task_wordings(self.task.name)
        processor = self.engine.processor
        clips = [{"encoded": processor.encode_audio(waveform, self.sampling_rate)} for waveform in waveforms]
        return with_clips(self.task.messages(example, wordings), clips)

    def task_of(self, chat: list[dict]) -> str | None:
        """How to decode the answer to a chat."""
        name = self.task.asked_as or self.task.name
        return name if name in self.engine.processor.tasks else self.engine.processor.task_of(chat)

    def pieces(self, waveforms: list[np.ndarray]) -> list[list[np.ndarray]]:
        """What of a row's clips is asked about at once: a recording longer than the encoder's window is cut at pauses,
        as by the pipeline."""
        longest = window_seconds(self.engine.processor)
        cut = self.task.in_pieces and self.instruction is None  # the answer to a question is not joined from pieces
        if not (cut and longest and len(waveforms) == 1):
            return [waveforms]
        cuts = split_at_pauses(waveforms[0], self.sampling_rate, longest)
        return [[waveforms[0][start:end]] for start, end in cuts]

    def __call__(self, rows: list[tuple[Example, list[np.ndarray]]]) -> list[dict]:
        """Predictions of rows, their pieces asked in batches of as many. ValueError for rows that the model cannot
        take."""
        pieces = [self.pieces(waveforms) for _, waveforms in rows]
        chats = [self.prompt(row[0], piece) for row, own in zip(rows, pieces, strict=True) for piece in own]
        groups: dict[str | None, list[int]] = {}
        for number, chat in enumerate(chats):
            groups.setdefault(self.task_of(chat), []).append(number)
        results: list[dict] = [{} for _ in chats]
        how = {"with_alignment": self.with_alignment, "with_lm": self.with_lm, **self.settings}
        for task, everything in groups.items():
            for numbers in batched(everything, len(rows)):
                for number, answer in zip(numbers, self.engine([chats[n] for n in numbers], task, **how), strict=True):
                    results[number] = {
                        "hypothesis": answer.texts[0] if answer.texts else None,
                        "hypothesis_align": " ".join(answer.heard).strip() if answer.heard else None,
                        "stopped": answer.stopped,
                    }
        results = iter(results)
        return [joined([next(results) for _ in own]) for own in pieces]


def batched(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def joined(results: list[dict]) -> dict:
    """What was heard in the pieces of one recording."""
    if len(results) == 1:
        return results[0]
    told = {}
    for key in ("hypothesis", "hypothesis_align"):
        texts = [result[key] for result in results if result[key] is not None]
        told[key] = " ".join(filter(None, texts)) if texts else None
    endings = [result["stopped"] for result in results]
    return {**told, "stopped": None if None in endings else all(endings)}


@dataclass
class Progress:
    """How far a run is: rows and seconds of audio that were read and those that are done, and when it began."""

    rows: int
    read_rows: int = 0
    read_seconds: float = 0.0
    done_rows: int = 0
    done_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def eta(self) -> float:
        """Seconds still to go, by the audio that is left: that of rows not read yet is as long as that of those read
        (within what was read the longest come first, so rows alone would tell too much)."""
        left_rows = self.rows - self.read_rows
        each = self.read_seconds / self.read_rows if self.read_rows else 0.0
        left, done = self.read_seconds - self.done_seconds + left_rows * each, self.done_seconds
        if not done:  # rows without audio
            left, done = self.rows - self.done_rows, self.done_rows
        return (time.monotonic() - self.began) / done * max(0.0, left) if done else float("nan")


def predict(
    examples: Sequence[Example] | Mapping[int, Example],
    hear: Hear,
    task: Task,
    batch_size: int = 16,
    sampling_rate: int = 16_000,
    done: Collection[int] = (),
    progress: Progress | None = None,
) -> Iterator[dict]:
    """Predictions for rows by number.

    Rows are read in chunks of 8 batches, so that memory does not grow with the data; within a chunk the longest come
    first. `done` are numbers of rows to leave out. Rows that cannot be used yield their error.
    """
    numbers = examples if isinstance(examples, Mapping) else range(len(examples))
    wanted = (number for number in numbers if number not in set(done))
    progress = progress or Progress(len(numbers) - len(done))
    while chunk := list(itertools.islice(wanted, 8 * batch_size)):
        rows = []
        for number in chunk:
            name = None
            progress.read_rows += 1
            try:
                example = examples[number]
                name = example.id
                waveforms = [clip.read(example.id, sampling_rate) for clip in example.clips]
                task.fields(example, "")
            except (RowError, AudioError) as error:
                progress.done_rows += 1
                yield {"row": number, "id": name or getattr(error, "id", None), "error": str(error), "readable": False}
                continue
            rows.append((number, example, waveforms))
            progress.read_seconds += length(waveforms) / sampling_rate
        rows.sort(key=lambda row: -length(row[2]))
        for start in range(0, len(rows), batch_size):
            for prediction in _predict_batch(rows[start : start + batch_size], hear, task, sampling_rate):
                progress.done_rows += 1
                progress.done_seconds += prediction.get("seconds", 0.0)
                yield prediction


def length(waveforms: list[np.ndarray]) -> int:
    return sum(map(len, waveforms))


def _predict_batch(batch: list[tuple], hear: Hear, task: Task, sampling_rate: int) -> Iterator[dict]:
    before = time.perf_counter()
    try:
        results = hear([(example, waveforms) for _, example, waveforms in batch])
    except ValueError as error:
        if len(batch) == 1:
            number, example, _ = batch[0]
            yield {"row": number, "id": example.id, "error": str(error), "readable": True}
        else:  # find the row that the model refuses
            for row in batch:
                yield from _predict_batch([row], hear, task, sampling_rate)
        return
    spent = time.perf_counter() - before
    samples = sum(max(1, length(waveforms)) for _, _, waveforms in batch)
    for (number, example, waveforms), result in zip(batch, results, strict=True):
        yield {
            "row": number,
            "id": example.id,
            "speaker": example.speaker,
            "language": example.language,
            "seconds": round(length(waveforms) / sampling_rate, 3),
            "clip_seconds": [round(len(waveform) / sampling_rate, 3) for waveform in waveforms],
            "reference": example.reference,
            **result,
            "compute_seconds": spent * max(1, length(waveforms)) / samples,
            **task.fields(example, result["hypothesis"]),
        }
