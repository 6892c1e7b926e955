"""What a task is: how it is asked, what its answer looks like, what CTC may learn from it, how it is decoded, how it is
scored, what the model card says. One file per task, one line in `TASKS`."""

import argparse
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from audiophi.data.example import Clip, Example, RowError, content_of

from .traits import description


@dataclass(frozen=True)
class Row:
    """The columns of a source's row, by their meaning; what a source does not have is None or empty."""

    number: int
    id: str
    source: str
    clips: tuple[Clip, ...] = ()
    text: str | None = None
    references: tuple[str, ...] = ()  # of a source that has several texts for a clip
    label: str | None = None  # the class in words
    instruction: str | None = None
    answers: tuple[str, ...] = ()
    messages: tuple[dict, ...] = ()
    system: str | None = None
    choices: tuple[str, ...] = ()
    metric: str | None = None
    kind: str | None = None
    transcript: str | None = None
    speaker: str | None = None
    gender: str | None = None
    age: str | None = None
    language: str | None = None
    speech: bool | None = None  # False: nobody speaks in the clips of this source
    others: Iterable["Row"] = ()  # rows of the same source, for a task that wants some to compare with; read one by one


@dataclass(frozen=True)
class Report:
    """How a model card and a table show a task's metrics.

    type, name: of the Hub's structured results. rows: (label, key of metrics.json); the first key tells whether
    anything was scored. needed: further keys that the card tells. optional: rows that may be missing. gap: key -> the
    two keys whose difference is the listening gap; the key is the value of `listening_gap_of`, None for any. size: key
    of the number of scored rows. tag: of the model on the Hub. summary, output: what such a model does, in words.
    """

    type: str
    name: str
    rows: tuple[tuple[str, str], ...]
    needed: tuple[str, ...]
    gap: dict[str | None, tuple[str, str]]
    size: str
    tag: str
    summary: str
    output: str
    optional: tuple[str, ...] = ()
    example: str = "speech.wav"


class Task:
    """Base class, and what most tasks share.

    Attributes:
        name: by which recipes, commands, the pipeline and saved checkpoints call it.
        wordings: how it is asked in training, and recognised; the first one is how one asks by default.
        test_wordings: kept for tests, never trained; recognised, too.
        in_pieces: whether a long recording may be cut at pauses and its answers joined.
        decoding: settings of `generate` for it, which a recipe's come on top of.
        order: where it stands among a model's tasks; the lowest is what a model does unasked.
        command: help of `audiophi NAME FILE...`; None: no such command.
        report: see `Report`; None for a task that is trained but not measured.
        about_words: whether the answer is what is said, so that it tells what a clip without audio would say.
        others: with how many other rows of its source, drawn by its number, a row comes to `example`.
        asked_as: name of the task in whose words it is asked, for one that is a case of another.
    """

    name = ""
    wordings: tuple[str, ...] = ()
    test_wordings: tuple[str, ...] = ()
    in_pieces = False
    decoding: dict = {}
    order = 50
    command: str | None = None
    report: Report | None = None
    about_words = False
    asked_as: str | None = None
    others = 0

    # ---- data --------------------------------------------------------------------------------------------------------

    def claims(self, columns: Collection[str], instruction: str | None) -> bool:
        """Whether the rows of a source are this task's where nobody says so: `columns` are the `Row` fields that it
        has, `instruction` is the source's own."""
        return False

    def example(self, row: Row) -> Example:
        """A row as an example. Raises RowError for one that lacks what the task needs."""
        raise NotImplementedError

    def target(self, text: str, text_case: str = "lower") -> str:
        """An answer as the LLM is to write it, here as it was given."""
        return text

    def sounds(self, text: str) -> str | None:
        """The words of an answer that say what is heard, in no order, for a readout that `learns_sounds`."""
        return None

    def messages(self, example: Example, wordings: Sequence[str], draw: Callable | None = None) -> list[dict]:
        """The turns before the answer. `wordings`: what may be asked where the row does not ask itself; `draw`
        ("instruction", wordings) -> one of them; None: the first."""
        if example.messages:
            return list(example.messages)
        wording = draw("instruction", wordings) if draw else wordings[0]
        return [{"role": "user", "content": content_of(len(example.clips), wording)}]

    # Whether who reads what is said knows the answer without copying it: then the LLM that hears may learn from the LLM
    # that reads (the loss distill). Of what is heard but not said a reader can only guess, and where the words
    # themselves are asked for it tells nothing that the labels do not.
    taught_by_reading = False

    def read(self, example: Example) -> tuple[str, ...] | None:
        """What the LLM that teaches by reading gets in the place of each clip. None where nothing is heard or it is not
        known of every clip what is said, and where nobody says anything, since a reader could only guess then."""
        said = tuple(clip.transcript for clip in example.clips)
        known = self.taught_by_reading and None not in said and any(text.strip() for text in said)
        return said if known else None

    # ---- evaluation --------------------------------------------------------------------------------------------------

    # Further ways to ask every row, beside hearing its own clips: keys of `audiophi.evaluation.conditions.CONDITIONS`.
    conditions: tuple[str, ...] = ()
    reads_alignment = False  # whether the alignment's own reading is scored, too
    # Columns of `eval.py`'s table: (label, key).
    table: tuple[tuple[str, str], ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of `eval.py` that are this task's own."""

    def check(self, args: argparse.Namespace) -> None:
        """Before anything is decoded: ValueError for options that do not fit, or a missing package."""

    def fields(self, example: Example, hypothesis: str | None) -> dict:
        """What a prediction has beside what was heard: whatever `summarize` needs."""
        return {}

    def so_far(self, predictions: list[dict]) -> str:
        """A few words about the scores up to now, for the line of progress."""
        return f"heard: {predictions[-1]['hypothesis']}" if predictions else ""

    def summarize(self, predictions: list[dict], **options) -> dict:
        """Scores of predictions (those with an error are left out by the caller)."""
        raise NotImplementedError

    def development(self, predictions: list[dict]) -> dict:
        """Scores during training: without what needs a package that may be missing."""
        return self.summarize(predictions)

    def scored_as(self, metrics: dict) -> "Task":
        """The task whose `table`, `report` and `shown` are those of these scores."""
        return self

    shown: tuple[str, ...] = ()  # of the development scores, those that are printed and kept in the history
    main_score: str = ""  # of these the one that tells which model is better


def own_question(row: Row) -> tuple[dict, ...]:
    """The turns of a row that asks in its own words; none for one that does not."""
    if row.messages:
        return row.messages
    if not row.instruction:
        return ()
    question = row.instruction
    unnamed = [choice for choice in row.choices if plain(choice) not in plain(question)]
    if unnamed:  # nobody can choose among what he is not told
        question += "\nOptions: " + "; ".join(row.choices) + "."
    turns = ({"role": "user", "content": content_of(len(row.clips), question)},)
    return (({"role": "system", "content": row.system},) if row.system else ()) + turns


def base_example(task: Task, row: Row, **values) -> Example:
    """What every task takes over from a row; of a single clip also what it is like as a whole."""
    clips = values.get("clips", row.clips)
    if len(clips) == 1:
        values["clips"] = (replace(clips[0], described=description(row)),)
    shared = {
        name: getattr(row, name) for name in ("number", "id", "source", "speaker", "label", "kind", "metric", "choices")
    }
    return Example(task=task.name, **{**shared, "clips": row.clips, "transcript": row.transcript, **values})


def saying(clips: tuple[Clip, ...], transcript: str | None) -> tuple[Clip, ...]:
    """`clips` with what is said in them, where there is one clip to say it; otherwise nothing is known."""
    if len(clips) != 1:
        return clips
    return (replace(clips[0], transcript=transcript),)


def silent(clips: tuple[Clip, ...]) -> tuple[Clip, ...]:
    """`clips` in which nobody speaks."""
    return tuple(replace(clip, transcript="") for clip in clips)


PLAIN_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


def plain(text: str) -> str:
    """Letters, digits and their marks of a text, in lower case, between single spaces."""
    if text.isascii():  # most rows
        return " ".join(text.translate(PLAIN_ASCII).split())
    text = unicodedata.normalize("NFC", text).casefold()
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def need_clips(row: Row) -> None:
    if not row.clips:
        raise RowError(f"{row.id}: has no audio")
