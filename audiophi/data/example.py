"""One row of any data set, as everything after the reader sees it: what is asked, about which clips, what is right."""

import functools
import hashlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from processing.audio_io import AudioError, load_audio

AUDIO = {"type": "audio"}  # an item in a message's content: the example's next clip


class RowError(ValueError):
    """A row that cannot be used; the message names it and says what is wrong. `id`: the row's, where it is known."""

    def __init__(self, message: str, id: str | None = None):
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class Clip:
    """Audio, undecoded so that a broken file costs its own row, and what is known of it.

    audio: {"bytes", "path"} as `datasets.Audio(decode=False)` gives. transcript: what is said, for CTC to learn from;
    "" where nobody speaks, None where it is not known. described: words that say what it is like as a whole, who
    speaks, what is heard, in no order; None where that is not known. seconds: its length where the source says so.
    simulated: it is known by its transcript only, from which training makes what the alignment would hear
    (audiophi/training/simulated.py).
    """

    audio: dict | None
    transcript: str | None = None
    described: str | None = None
    seconds: float | None = None
    simulated: bool = False

    def read(self, name: str, sampling_rate: int = 16_000) -> np.ndarray:
        """Waveform (samples,) float32 at `sampling_rate`. Raises AudioError naming the row for audio that cannot be
        used."""
        audio = self.audio or {}
        given = audio.get("bytes") if audio.get("bytes") is not None else audio.get("path")
        if given is None and "array" in audio:
            given = audio
        if given is None:
            raise AudioError(f"{name}: has no audio.")
        return load_audio(given, target_rate=sampling_rate, name=name if isinstance(given, bytes) else None)


@dataclass(frozen=True)
class Question:
    """One of the questions that a row can be asked.

    kind: what is asked for, by which scores are reported. templates, test_templates: how it is asked in training, none
    for a kind that is never trained, and in tests only, with {slots}. answers: any of them is right, the first one is
    learned. metric, choices: as in `Example`. slots: what it is about.
    """

    kind: str
    templates: tuple[str, ...]
    test_templates: tuple[str, ...]
    answers: tuple[str, ...]
    metric: str = "exact"
    choices: tuple[str, ...] = ()
    slots: dict[str, str] = field(default_factory=dict)

    @property
    def wordings(self) -> tuple[str, ...]:
        return tuple(text.format(**self.slots) for text in self.templates)

    @property
    def test_wordings(self) -> tuple[str, ...]:
        return tuple(text.format(**self.slots) for text in self.test_templates)


@dataclass(frozen=True)
class Example:
    """A row.

    task: key of `audiophi.tasks.TASKS`. number: of the row in its source, by which it is known (ids may repeat).
    messages: the turns up to the one that is to be answered, contents as lists of `AUDIO` and {"type": "text", "text"};
        empty where the task asks in its own words.
    references: right answers, any of them is; the first one is what `reference` says.
    kind, metric, choices: how an answer is scored, see `audiophi/evaluation/answer_metrics.py`.
    language: that is spoken, as a code or in words, by which transcripts are scored; None: English.
    transcript: what is said in all the clips, to be read by an LLM that does not hear.
    questions: what may be asked, where a task makes several questions of a row: `posed` chooses. Until then there are
        no messages, and the references are all answers, of which the longest tells how much text there can be.
    turns: how many of the questions training asks one after the other in one chat, of each kind before any comes again.
    """

    task: str
    number: int
    id: str
    source: str
    clips: tuple[Clip, ...] = ()
    messages: tuple[dict, ...] = ()
    references: tuple[str, ...] = ()
    speaker: str | None = None
    label: str | None = None
    kind: str | None = None
    metric: str | None = None
    choices: tuple[str, ...] = ()
    transcript: str | None = None
    questions: tuple[Question, ...] = ()
    turns: int = 1
    language: str | None = None
    extra: dict = field(default_factory=dict, compare=False)

    @property
    def reference(self) -> str | None:
        return self.references[0] if self.references else None


def drawing(*names) -> Callable[[str, Sequence], object]:
    """(what, choices) -> one of them, the same one for the same names, say seed, epoch and number of a row."""

    def draw(what: str, choices: Sequence):
        # Not a checksum: those of neighbouring numbers have bits in common.
        digest = hashlib.blake2b(" ".join(map(str, (what, *names))).encode(), digest_size=8).digest()
        return choices[int.from_bytes(digest, "big") % len(choices)]

    return draw


def posed(example: Example, draw: Callable[[str, Sequence], object] | None = None) -> Example:
    """The example with a chat of its questions, drawn: first a kind, then a question of it, then a wording; then
    others, each kind before any comes again, as many as it has `turns` and questions. `draw` None: one question as in
    an evaluation, by the row's number and in a wording that is never trained. Examples without questions are left as
    they are."""
    if not example.questions:
        return example
    tested, draw = draw is None, draw or drawing(example.number)
    left, messages, question = by_kind(example), [], None
    kinds = list(left)
    for turn in range(1 if tested else turns_of(example)):
        name, clips = (str(turn), 0) if turn else ("", len(example.clips))
        if question is not None:
            messages.append({"role": "assistant", "content": question.answers[0]})
        kinds = kinds or [kind for kind in left if left[kind]]
        kind = draw(f"kind{name}", kinds)
        question = draw(f"question{name}", left[kind])
        wording = draw(f"instruction{name}", question.test_wordings if tested else question.wordings)
        messages.append({"role": "user", "content": content_of(clips, wording)})
        kinds = [other for other in kinds if other != kind]
        left[kind] = [other for other in left[kind] if other is not question]
    return replace(
        example,
        messages=tuple(messages),
        references=question.answers if tested else question.answers[:1],
        kind=kind,
        metric=question.metric,
        choices=question.choices,
        questions=(),
    )


def by_kind(example: Example) -> dict[str, list[Question]]:
    """The questions that training asks by their kind, in the order in which the kinds come."""
    found: dict[str, list[Question]] = {}
    for question in example.questions:
        if question.templates:
            found.setdefault(question.kind, []).append(question)
    return found


def turns_of(example: Example) -> int:
    """How many questions training asks in one chat."""
    return min(example.turns, sum(map(len, by_kind(example).values())))


def longest(example: Example) -> Example:
    """The example with the longest of its questions, as often as it has `turns`, and all their answers: what a
    prompt needs at most."""
    if not example.questions:
        return example

    def length(question: Question) -> int:  # all are not worded for this: it would take longer than all else
        slots = {name: len(text) for name, text in question.slots.items()}
        return max(fixed + sum(slots[name] for name in names) for fixed, names in shapes_of(question.templates))

    asked = [question for question in example.questions if question.templates]
    wording = max(max(asked, key=length).wordings, key=len) if asked else ""
    answer = max(example.references, key=len, default="")
    messages = [{"role": "user", "content": content_of(len(example.clips), wording)}]
    for _ in range(turns_of(example) - 1):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": content_of(0, wording)}]
    return replace(example, messages=tuple(messages), questions=())


@functools.cache
def shapes_of(templates: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """Of each template the characters that are its own, and the names of its slots."""
    parts = [list(string.Formatter().parse(template)) for template in templates]
    return [(sum(len(own) for own, *_ in part), [name for _, name, *_ in part if name]) for part in parts]


def content_of(clips: int, text: str) -> list[dict]:
    """A user's content: so many clips, then words."""
    return [*([AUDIO] * clips), {"type": "text", "text": text}]


def with_clips(messages, clips: list) -> list[dict]:
    """`messages` with their `AUDIO` items replaced by what `clips` hold, in order: encoded audio, or anything that the
    processor reads, each a dict of a content item. ValueError where the numbers differ."""
    rest = iter(clips)
    told = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**AUDIO, **next(rest)} if item["type"] == "audio" else item for item in content]
        told.append({**message, "content": content})
    left = len(list(rest))
    if left:
        raise ValueError(f"{left} clips are not asked about")
    return told


def in_words(messages, transcripts: Sequence[str | None]) -> list[dict]:
    """`messages` to be read instead of heard: in the place of each audio item stands what is said in it, the next of
    `transcripts`, "" where nobody speaks; nothing at all where that is None, or there are no more."""
    rest, told = iter(transcripts), []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            items = [_read(next(rest, None)) if item["type"] == "audio" else item for item in content]
            content = [item for item in items if item is not None]
        told.append({**message, "content": content})
    return told


def _read(said: str | None) -> dict | None:
    return None if said is None else {"type": "text", "text": f'Transcript: "{" ".join(said.split())}"\n'}
