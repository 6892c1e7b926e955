"""Parquet files and Hub data sets as tables: renamed and cast, their audio bytes never rewritten."""

import itertools
from pathlib import Path

import datasets

from .dataset_columns import (
    AUDIO_COLUMNS,
    CAPTION_COLUMNS,
    CAPTION_FEATURES,
    FEATURES,
    GIVEN_CAPTIONS,
    ID_COLUMNS,
    LABEL_COLUMNS,
    SECONDS_COLUMNS,
    SPEAKER_COLUMNS,
    TEXT_COLUMNS,
    absolute,
    caption_columns,
    pick,
)
from .dataset_paths import Reach


def from_table(table, entry: dict, streaming: bool, reach: Reach, folder: Path | None = None):
    """Parquet or Hub table → FEATURES, by renaming and casting only: rows with audio bytes are not rewritten.

    Files that rows name without their bytes must be within `reach`, and are relative to `folder` (None: as they are).
    """
    source = entry["path"]
    columns = table.column_names
    if columns is None:
        raise ValueError(f"{source}: its columns are not known before reading, so it cannot be streamed.")
    for column in (*entry["filter"], *entry["exclude"]):
        pick(columns, column, (), column, source)
    chosen = {
        "audio": pick(columns, entry["audio_column"], AUDIO_COLUMNS, "audio", source),
        "text": pick(columns, entry["text_column"], TEXT_COLUMNS, None, source),
        "id": pick(columns, None, ID_COLUMNS, None, source),
        "speaker": pick(columns, None, SPEAKER_COLUMNS, None, source),
        "seconds": pick(columns, None, SECONDS_COLUMNS, None, source),
    }
    table = _undecoded(table, chosen["audio"])  # first of all: any other step would decode the audio
    for column, values in entry["filter"].items():
        table = table.filter(lambda value, values=values: str(value) in values, input_columns=[column])
    for column, values in entry["exclude"].items():
        table = table.filter(lambda value, values=values: str(value) not in values, input_columns=[column])
    if entry["limit"]:
        table = table.take(entry["limit"])
    if "captions" in entry["features"]:
        table = _add_captions(table, entry, chosen["text"], streaming)
        chosen |= {name: name for name in CAPTION_COLUMNS}
    labels = table.features[chosen["text"]] if chosen["text"] else None
    table = table.select_columns([name for name in chosen.values() if name])
    table = table.rename_columns({old: new for new, old in chosen.items() if old and old != new})
    if isinstance(labels, datasets.ClassLabel):
        table = table.map(lambda value: {"text": labels.int2str(value).replace("_", " ")}, input_columns=["text"])
    table = _reachable(table, streaming, reach, folder)
    features = entry["features"]
    missing = [name for name in features if chosen[name] is None]
    if streaming:
        table = table.map(_fill, with_indices=True, fn_kwargs={"missing": missing})
    else:
        for name in missing:
            values = [f"row-{index}" for index in range(len(table))] if name == "id" else [None] * len(table)
            table = table.add_column(name, values, feature=features[name])
        table = table.select_columns(list(features))
    return table.cast(features)


def _add_captions(table, entry: dict, text_column: str | None, streaming: bool):
    """A table with CAPTION_COLUMNS made from its own columns."""
    label_column = pick(table.column_names, entry["label_column"], LABEL_COLUMNS, None, entry["path"])
    used = {name for name in table.column_names if GIVEN_CAPTIONS.fullmatch(name)} | {text_column, label_column}
    used = {name: table.features[name] for name in used if name}

    def made(row: dict) -> dict:
        words = {
            name: kind.int2str(row[name]) if isinstance(kind, datasets.ClassLabel) else row[name]
            for name, kind in used.items()
        }
        return caption_columns(words, text_column, label_column, entry)

    kinds = {name: CAPTION_FEATURES[name] for name in CAPTION_COLUMNS}
    if streaming:
        return table.map(made, features=datasets.Features({**table.features, **kinds}))
    rows = [made(row) for row in table.select_columns(list(used)).to_list()]  # without touching the audio
    table = table.remove_columns([name for name in CAPTION_COLUMNS if name in table.column_names])
    for name, kind in kinds.items():
        table = table.add_column(name, [row[name] for row in rows], feature=kind)
    return table


def _reachable(table, streaming: bool, reach: Reach, folder: Path | None):
    """A table in which all audio that is not in the rows themselves has a path that may be opened."""

    def opened(audio: dict) -> dict:
        if audio is None or audio["bytes"] is not None or audio["path"] is None:
            return {"audio": audio}
        path = reach.check(audio["path"]) if folder is None else absolute(audio["path"], folder, reach)
        return {"audio": {**audio, "path": path}}

    if streaming:
        return table.map(opened, input_columns=["audio"])
    chunks = table.data.column("audio").chunks  # of the whole table, filtered or not, without reading the bytes
    paths = [chunk.field("path").filter(chunk.field("bytes").is_null()).drop_null().to_pylist() for chunk in chunks]
    if folder is not None and any(paths):
        return table.map(opened, input_columns=["audio"])
    for path in itertools.chain(*paths):
        reach.check(path)
    return table


def _undecoded(table, column: str):
    """Turn an Audio column, or a column of paths, into {"bytes", "path"}."""
    undecoded = FEATURES["audio"]
    if table.features[column] == datasets.Value("string"):
        features = datasets.Features({**table.features, column: undecoded})
        return table.map(
            lambda path: {column: {"bytes": None, "path": path}}, input_columns=[column], features=features
        )
    return table.cast_column(column, undecoded)


def _fill(row: dict, index: int, missing: list[str]) -> dict:
    return {**row, **{name: f"row-{index}" if name == "id" else None for name in missing}}
