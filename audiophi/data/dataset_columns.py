"""Which of a source's columns mean what, and a row of them as a `Row`."""

import functools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from audiophi.tasks.base import Row, plain
from processing.audio_io import MAX_SECONDS, local_path
from processing.plain_text import whole_characters

from .chats import chat_of, places_of
from .dataset_paths import URL_PREFIXES, Reach
from .example import Clip, RowError

logger = logging.getLogger(__name__)

# Meaning -> names that columns of it usually have, the likeliest first.
USUAL = {
    "audio": ("audio", "audios", "file_name", "path", "audio_path", "audio_filepath", "audio_file", "file", "wav"),
    "text": ("text", "transcription", "sentence", "normalized_text", "caption"),
    "transcript": ("transcript", "transcription", "sentence"),
    "references": ("captions", "references"),
    "label": ("label", "category", "class"),
    "instruction": ("instruction", "question", "prompt"),
    "answers": ("answer", "answers", "response", "output"),
    "messages": ("messages", "conversations"),
    "system": ("system",),
    "choices": ("choices", "options"),
    "metric": ("metric",),
    "kind": ("kind", "question_type"),
    "id": ("id", "utt_id", "utterance_id"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "gender": ("gender", "sex"),
    "age": ("age",),
    "language": ("language", "lang"),
    "seconds": ("seconds", "duration"),
}
NUMBERED = "caption_"  # caption_1, caption_2, ... of a release are its references
# Columns that say nothing that a row should be trained on.
BOOKKEEPING = {"split", "fold", "licence", "license", "source", "text_source"}


class Columns:
    """The columns of one source by what they mean.

    Args:
        names: all its columns. entry: its specification, whose *_column keys come before the usual names.
    Raises ValueError for a column that is named but not there, and where neither audio nor a question is found.
    """

    def __init__(self, names: Sequence[str], entry: dict):
        self.entry, self.names, self.by, self.chosen = entry, list(names), {}, set()
        for meaning, usual in USUAL.items():
            wanted = entry.get({"answers": "answer"}.get(meaning, meaning) + "_column")
            if wanted is not None and wanted not in self.names:
                raise ValueError(f"{entry['path']}: has no column {wanted!r}. Columns: {', '.join(self.names)}.")
            if wanted is not None:
                self.chosen.add(meaning)
            found = wanted or next((name for name in usual if name in self.names), None)
            if found is not None:
                self.by[meaning] = found
        if "text" not in self.by and "transcript" in self.by:
            self.by["text"] = self.by["transcript"]
        self.numbered = [name for name in self.names if name and name.startswith(NUMBERED)]
        self.simulated = entry["heard"] == "simulated"
        asks = "messages" in self.by or "instruction" in self.by or entry["instruction"] is not None
        if "audio" not in self.by and not asks and not self.simulated:
            raise ValueError(
                f"{entry['path']}: no column looks like audio (tried {', '.join(USUAL['audio'])}). Columns: "
                f"{', '.join(self.names)}. Pass audio_column."
            )

    @property
    def fields(self) -> set[str]:
        """The `Row` fields that these columns fill."""
        return set(self.by) | ({"references"} if self.numbered else set())

    def need_text(self, natural) -> None:
        """ValueError where no column says what is said. `natural`: the task that the columns are of."""
        if not {"text", "answers", "messages"} & self.by.keys():
            hint = "" if natural.about_words else f", or add --task {natural.name} (in a recipe, task: {natural.name})"
            raise ValueError(
                f"{self.entry['path']}: no column looks like text (tried {', '.join(USUAL['text'])}). "
                f"Columns: {', '.join(map(repr, self.names))}. Pass text_column{hint}."
            )

    def warn_of_unused(self) -> None:
        """Says which columns nobody looks at, once per source, however many tasks it has."""
        used = {*self.by.values(), *self.numbered, *self.entry["filter"], *self.entry["exclude"], *BOOKKEEPING}
        unused = [name for name in self.names if name not in used]
        if unused:
            warn_once(
                f"{self.entry['path']}: columns that are not used: {', '.join(map(repr, unused))}. If one holds text, "
                "questions or answers, name it with text_column, instruction_column or answer_column."
            )

    def row(
        self, values: dict, number: int, folder: Path | None, reach: Reach, labels: dict, about_words: bool = False
    ) -> Row:
        """A row of the source. `labels`: column -> (number -> name) of class columns. `about_words`: whether its answer
        is what is said. Raises RowError naming it."""
        get = {meaning: values.get(self._column(meaning, values)) for meaning in self.by}
        for meaning, column in self.by.items():
            if column in labels and get[meaning] is not None:
                get[meaning] = labels[column](get[meaning])
        audios = as_list(get.get("audio"))
        name = text_of(get.get("id"), "id", number)
        first = audios[0] if audios else None
        path = first.get("path") if isinstance(first, dict) else first if isinstance(first, str) else None
        name = name or (whole_characters(path) if path else f"row-{number}")
        source = self.entry["path"]
        try:
            messages = ()
            if get.get("messages") is not None:
                messages, audios = chat_of(get["messages"], audios)
            if self.simulated:
                messages, audios = self._simulated(get, messages, audios, about_words, number)
            seconds = plausible_seconds(get.get("seconds"))
            clips = tuple(
                Clip(
                    None if self.simulated else place_of(audio, folder, reach, number),
                    seconds=seconds if len(audios) == 1 else None,
                    simulated=self.simulated,
                )
                for audio in audios
            )
            answers = tuple(filter(None, (text_of(v, "answer", number) for v in as_list(get.get("answers")))))
            if messages and messages[-1]["role"] == "assistant":
                answers = (words_of(messages[-1]["content"]),)
                messages = messages[:-1]
            references = [*as_list(get.get("references")), *(values[column] for column in self.numbered)]
            label = text_of(get.get("label"), "label", number)
            rest = ("text", "system", "metric", "kind", "transcript", "speaker", "gender", "age", "language")
            return Row(
                number=number,
                id=name,
                source=source,
                clips=clips,
                messages=tuple(messages),
                answers=answers,
                references=tuple(filter(None, (text_of(v, "reference", number) for v in references))),
                label=plain(label) if label else None,
                instruction=text_of(get.get("instruction"), "instruction", number) or self.entry["instruction"],
                choices=tuple(text_of(v, "choice", number) or "" for v in as_list(get.get("choices"))),
                speech=self.entry["speech"],
                **{key: text_of(get.get(key), key, number) for key in rest if key in get},
            )
        except ValueError as error:
            raise RowError(f"{source}: row {number + 1} ({name}): {error}", name) from error

    def _column(self, meaning: str, values: dict) -> str:
        """The column of a row: rows of JSON lines need not all have the same."""
        column = self.by[meaning]
        if column in values or meaning in self.chosen:
            return column
        others = USUAL[meaning] + (USUAL["transcript"] if meaning == "text" else ())
        return next((name for name in others if name in values), column)

    def _simulated(self, get: dict, messages, audios: list, about_words: bool, number: int) -> tuple:
        """(messages, audios) of a row whose clips are simulated. One that names no audio has as many clips as its chat
        has places for; one without places, a clip in its first turn where its words are known, else none."""
        if audios:
            return messages, audios
        known = as_list(get.get("transcript"))
        if about_words:
            known = [*known, *as_list(get.get("text")), *as_list(get.get("answers"))]
            known += [words_of(message["content"]) for message in messages[-1:] if message["role"] == "assistant"]
        known = [text for value in known if (text := text_of(value, "transcript", number)) is not None]
        if places := places_of(messages):
            return messages, [None] * places
        if not known and (messages or get.get("instruction") is not None or self.entry["instruction"] is not None):
            return messages, []
        return (chat_of(get["messages"], [None])[0] if messages else messages), [None]


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def as_list(value) -> list:
    """One or several values, or None, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def text_of(value, what: str, number: int) -> str | None:
    """A value that somebody wrote as text, or a number; None where there is none (also NaN, pandas' empty cell).

    Raises RowError for lists, dicts and the like, which are no text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (str, int, float)):
        return whole_characters(str(value))
    raise RowError(f"its {what} is no text but {type(value).__name__}: {value!r:.80}")


def words_of(content) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(i["text"] for i in content if i["type"] == "text")


def place_of(audio, folder: Path | None, reach: Reach, number: int) -> dict | None:
    """A row's audio as {"bytes", "path"}, with a path that may be opened. ValueError for one out of `reach`."""
    if isinstance(audio, (bytes, bytearray)):
        return {"bytes": bytes(audio), "path": None}
    if isinstance(audio, dict):
        if audio.get("bytes") is not None or "array" in audio:
            return audio
        audio = audio.get("path")
    if audio is None or audio == "" or (isinstance(audio, float) and math.isnan(audio)):
        return None
    if not isinstance(audio, str):
        raise ValueError(f"{reach.source}: row {number + 1} names its audio by {audio!r:.80}, which is no path. "
                         "Pass audio_column.")  # fmt: skip
    row = f"row {number + 1}"
    if audio.startswith(URL_PREFIXES) or folder is None:
        return {"bytes": None, "path": reach.check(audio, row)}
    # Not with pathlib, which would take a third of the time to read a row.
    path = reach.check(os.path.join(folder, local_path(audio)), row)
    if whole_characters(path) != path:
        raise ValueError(f"{reach.source}: {row} names {path!r}, which is not UTF-8. Rename that file.")
    return {"bytes": None, "path": path}


def plausible_seconds(value) -> float | None:
    """A clip's length as a source gives it; None where that is no length, so that the audio itself is asked."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if 0 < seconds <= MAX_SECONDS else None
