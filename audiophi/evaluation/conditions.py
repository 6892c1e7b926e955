"""Further ways to ask every row, which tell what hearing its own audio is worth: another row's audio, silence, and the
words as text.

A condition: (examples, predictions of the rows as they are, task, sampling rate, seed) -> `Plan`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from audiophi.data.example import Clip, Example, in_words
from audiophi.tasks import wordings
from audiophi.tasks.base import Task

from .metrics import derangement

SILENCE_STEP = 0.5  # seconds; where all rows are asked the same, silences are decoded once per length on this grid


@dataclass
class Plan(Mapping):
    """Which rows are asked, and how: row -> function that makes the example. `same_as`: rows that need no asking, since
    they would be asked what that row was asked in this condition; `unchanged`: nor since it changes nothing for them.
    """

    make: dict[int, Callable[[], Example]] = field(default_factory=dict)
    same_as: dict[int, int] = field(default_factory=dict)
    unchanged: list[int] = field(default_factory=list)

    def __getitem__(self, row: int) -> Example:
        return self.make[row]()

    def __iter__(self) -> Iterator[int]:
        return iter(self.make)

    def __len__(self) -> int:
        return len(self.make)


def complete(plan: Plan, asked: list[dict], own: list[dict], examples, task: Task) -> list[dict]:
    """The predictions of every row of a condition, from those of the rows that were asked and the rows' `own`."""
    by_row = {p["row"]: p for p in asked}
    result = list(asked)
    for row, other in plan.same_as.items():
        heard = by_row[other]
        mine = {**heard, "row": row}
        if "error" not in heard:
            example = examples[row]
            mine |= {"id": example.id, "speaker": example.speaker, "reference": example.reference}
            mine |= task.fields(example, heard["hypothesis"])
        result.append(mine)
    unchanged = set(plan.unchanged)
    return result + [p for p in own if p["row"] in unchanged]


def identity(clip: Clip) -> str:
    """What tells one clip from another."""
    audio = clip.audio or {}
    if audio.get("bytes") is not None:
        return hashlib.sha256(audio["bytes"]).hexdigest()
    if "array" in audio:
        return hashlib.sha256(np.ascontiguousarray(audio["array"]).tobytes()).hexdigest()
    return str(audio.get("path"))


def shuffled_audio(examples, predictions: list[dict], task: Task, rate: int, seed: int = 0) -> Plan:
    """Each row's question with another row's clips: as many, others, and of another right answer where there are."""
    plan, by_count = Plan(), {}
    clips, references, pool = {}, {}, {}
    for p in predictions:
        example = examples[p["row"]]
        names = tuple(map(identity, example.clips))
        clips[p["row"]], references[p["row"]] = names, example.reference
        for number, name in enumerate(names):
            pool.setdefault(name, (p["row"], number))
        if names:
            by_count.setdefault(len(names), []).append(p["row"])
        else:
            plan.unchanged.append(p["row"])
    if len(pool) < 2:  # there is no other audio
        return Plan()
    rng = np.random.default_rng(seed)
    for rows in by_count.values():
        partner = dict(zip(rows, others(rows, clips, references, rng), strict=True))
        for row in rows:
            if set(clips[row]) & set(clips[partner[row]]):  # no row with as many has other clips: collect some
                free = [place for name, place in sorted(pool.items()) if name not in clips[row]]
                free = free or list(pool.values())
                places = [free[i] for i in rng.integers(len(free), size=len(clips[row]))]
            else:
                places = [(partner[row], number) for number in range(len(clips[row]))]
            plan.make[row] = with_other_clips(examples, row, places)
    return plan


def with_other_clips(examples, row: int, places: list[tuple[int, int]]) -> Callable[[], Example]:
    def make():
        return replace(examples[row], clips=tuple(examples[other].clips[number] for other, number in places))

    return make


def others(rows: list[int], clips: dict, references: dict, rng: np.random.Generator) -> list[int]:
    """For each row another one, each once: with other clips, and with another right answer, as far as that goes."""

    def cost(row, other):
        return 4 * bool(set(clips[row]) & set(clips[other])) + (references[row] == references[other])

    seed = int(rng.integers(2**31))
    order = derangement([references[row] or "" for row in rows], seed)
    order = order or derangement([" ".join(clips[row]) for row in rows], seed) or list(range(len(rows)))
    partner = [rows[index] for index in order]
    for i, row in enumerate(rows):
        if not cost(row, partner[i]):
            continue
        for j in rng.permutation(len(rows))[:1000].tolist():
            before = cost(row, partner[i]) + cost(rows[j], partner[j])
            if cost(row, partner[j]) + cost(rows[j], partner[i]) < before:
                partner[i], partner[j] = partner[j], partner[i]
                if not cost(row, partner[i]):
                    break
    return partner


def silence_length(seconds: float) -> float:
    """The length on the grid of silences that stands for a clip: rounded up, and never nothing."""
    return max(1, math.ceil(seconds / SILENCE_STEP)) * SILENCE_STEP


def silence(examples, predictions: list[dict], task: Task, rate: int, seed: int = 0) -> Plan:
    """Zeros as long as each clip. Where the task asks in its own words, only the length tells rows apart."""
    plan, first = Plan(), {}
    for p in sorted(predictions, key=lambda p: p["row"]):
        row, lengths = p["row"], tuple(p["clip_seconds"])
        if not lengths:
            plan.unchanged.append(row)
            continue
        if not examples[row].messages:
            lengths = tuple(map(silence_length, lengths))
            if first.setdefault(lengths, row) != row:
                plan.same_as[row] = first[lengths]
                continue
        plan.make[row] = silenced(examples, row, lengths, rate)
    return plan


def silenced(examples, row: int, lengths: Sequence[float], rate: int) -> Callable[[], Example]:
    def make():
        arrays = [np.zeros(max(1, round(seconds * rate)), dtype=np.float32) for seconds in lengths]
        quiet = tuple(Clip({"array": array, "sampling_rate": rate}, transcript="") for array in arrays)
        return replace(examples[row], clips=quiet)

    return make


def text(examples, predictions: list[dict], task: Task, rate: int, seed: int = 0) -> Plan:
    """The row's transcript to be read instead of its audio to be heard; only rows that have one are asked."""
    plan = Plan()
    for p in predictions:
        example = examples[p["row"]]
        if example.clips and example.transcript is not None:
            plan.make[p["row"]] = lambda row=p["row"]: as_text(examples[row], examples[row].transcript, task)
    return plan


def as_text(example: Example, transcript: str, task: Task) -> Example:
    """An example without clips: where the first one stood the words that are said in them stand."""
    turns = in_words(task.messages(example, wordings(task.name)), [transcript])
    return replace(example, clips=(), messages=tuple(turns))


CONDITIONS: dict[str, Callable[..., Plan]] = {"shuffled_audio": shuffled_audio, "silence": silence, "text": text}
