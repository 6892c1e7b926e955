"""The columns of a loaded data set, and how a source's own columns become them."""

import re
from pathlib import Path

import datasets

from processing.audio_io import MAX_SECONDS
from processing.plain_text import whole_characters

from .captions import captions_of, class_name
from .dataset_paths import URL_PREFIXES, Reach

FEATURES = datasets.Features(
    {
        # What datasets.Audio(decode=False) yields. The type itself needs torchcodec to write a row.
        "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "text": datasets.Value("string"),
        "id": datasets.Value("string"),
        "speaker": datasets.Value("string"),
        "seconds": datasets.Value("float64"),
    }
)
CAPTION_FEATURES = datasets.Features(
    {
        **FEATURES,
        "captions": datasets.List(datasets.Value("string")),  # all of a clip; `text` is the first. None for transcripts
        "label": datasets.Value("string"),  # the class in words
        "task": datasets.Value("string"),  # one of prompts.TASKS
        "instruction": datasets.Value("string"),  # the source's own, None for the task's
    }
)
AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_path", "audio_filepath", "file", "wav")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text", "caption", "label")
ID_COLUMNS = ("id", "utt_id", "utterance_id")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
SECONDS_COLUMNS = ("seconds", "duration")
LABEL_COLUMNS = ("label", "category", "class")
CAPTION_COLUMNS = ("text", "captions", "label", "task", "instruction")
GIVEN_CAPTIONS = re.compile(r"captions|caption_\d+")


def pick(columns, wanted: str | None, usual: tuple[str, ...], what: str | None, source: str) -> str | None:
    """The column's name: the wanted one, or the first usual one. `what` None = it may be missing."""
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{source}: has no column {wanted!r}. Columns: {', '.join(columns)}.")
        return wanted
    found = next((name for name in usual if name in columns), None)
    if found is None and what:
        raise ValueError(
            f"{source}: no column looks like {what} (tried {', '.join(usual)}). Columns: {', '.join(columns)}. "
            f"Pass {what}_column."
        )
    return found


def absolute(path: str | None, folder: Path, reach: Reach, row: str = "a row") -> str | None:
    """A manifest's path, relative to the manifest, as one that can be opened. ValueError for one out of `reach`."""
    if path is None or path == "":
        return None
    if not isinstance(path, str):
        raise ValueError(f"{reach.source}: {row} names its audio by {path!r:.80}, which is no path. Pass audio_column.")
    path = reach.check(path if path.startswith(URL_PREFIXES) else str(folder / path), row)
    if whole_characters(path) != path:
        raise ValueError(f"{reach.source}: {row} names {path!r}, which is not UTF-8. Rename that file.")
    return path


def plausible_seconds(value) -> float | None:
    """A clip's length as a source gives it; None where that is no length, so that the audio itself is asked."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if 0 < seconds <= MAX_SECONDS else None


def caption_columns(row: dict, text_column: str | None, label_column: str | None, entry: dict) -> dict:
    """CAPTION_COLUMNS of a source's row."""
    text = row.get(text_column) if text_column else None
    text = None if text is None else whole_characters(str(text))
    label = row.get(label_column) if label_column else None
    label = class_name(str(label)) if label not in (None, "") else None
    captions = None
    if entry["task"] == "caption":
        given = row.get("captions") or [row[name] for name in row if GIVEN_CAPTIONS.fullmatch(name)]
        captions = captions_of([given] if isinstance(given, str) else given, text, label)
        text = captions[0] if captions else None
    elif entry["task"] == "no_speech":
        text = ""
    made = {"text": text, "captions": captions, "label": label}
    return {**made, "task": entry["task"], "instruction": entry["instruction"]}
