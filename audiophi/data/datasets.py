"""Every kind of data -> `Example`s, one by one.

    "openslr/librispeech_asr:clean:train.100"    Hub id[:config[:split]]
    "LibriSpeech", split="dev-clean"             the official archive's directory tree (*.trans.txt)
    "my_folder"                                  audiofolder: metadata.{jsonl,csv,parquet}, or label folders of files
    "manifest.jsonl", audio_column="wav"         JSONL, CSV, TSV or Parquet, paths relative to the file
    "noise:300"                                  as many clips in which nobody speaks (dataset_noise.py)
    "clotho:FOLDER", "audiocaps:FOLDER", ...     releases with a layout of their own (dataset_registry.py); without the
                                                 prefix they are recognised by their files

Which columns mean what: dataset_columns.py; chats of every form: chats.py. Audio stays undecoded, so that a bad file is
met when its row is read, and can be counted and skipped instead of ending the run.
"""

import contextlib
import copy
import hashlib
import json
import marshal
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np

from audiophi.evaluation.text_normalization import language_code
from audiophi.tasks import task_named, task_of_source
from audiophi.tasks.base import Row, Task

from .dataset_columns import USUAL, Columns
from .dataset_files import (
    MANIFEST_SUFFIXES,
    folder_rows,
    librispeech_rows,
    manifest_rows,
    metadata_file,
    nested_metadata,
    rows_of_folders,
)
from .dataset_parquet import files_of_split, opened, parquet_files
from .dataset_paths import Reach, reach_of_folder, reach_of_hub
from .dataset_registry import KINDS, MADE, split_kind
from .example import Example, RowError, drawing, posed

SPEC_KEYS = (
    *("path", "split", "weight", "filter", "exclude", "limit", "task", "instruction", "speech"),
    *("audio_column", "text_column", "label_column", "instruction_column", "answer_column", "transcript_column"),
    *("audio_folder", "allow_urls", "heard", "turns", "language"),
)
WAYS_OF_HEARING = ("real", "simulated")
PEEK = 64  # rows of a stream that are looked at together: for its columns, and to compare a row with
UNDECODED = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


class Examples(Sequence):
    """The rows of one source. `[i]` raises RowError for a row that cannot be used."""

    def __init__(self, rows, numbers, columns: Columns, task: Task, folder: Path | None, reach: Reach, labels: dict):
        self.rows, self.numbers, self.columns = rows, numbers, columns
        self._task, self._folder, self._reach, self._labels = task, folder, reach, labels
        self._recent, self._posed = deque(maxlen=PEEK), False

    @property
    def path(self) -> str:
        return self.columns.entry["path"]

    @property
    def task(self) -> str:
        return self._task.name

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.of(self.rows[int(self.numbers[index])], index)

    def saw(self, values: Mapping, number: int) -> None:
        """Remembers a row of a stream, for the questions of those behind it."""
        self._recent.append((values, number))

    def of(self, values: Mapping, number: int) -> Example:
        """A row's values as an example; of a stream, those of the row that it `saw` last."""
        row = self._row(values, number)
        if self._task.others:
            row = replace(row, others=Others(self._others, row))
        try:
            example = self._task.example(row)
            if any(clip.simulated and clip.transcript is None for clip in example.clips):
                raise RowError(f"{row.id}: heard: simulated, but it is not known what is said in each of its clips")
            language = self.columns.entry["language"] or row.language
            turns = self.columns.entry["turns"] or 1
            if (turns, language) != (example.turns, example.language):
                example = replace(example, turns=turns, language=language)
            return posed(example) if self._posed else example
        except RowError as error:
            raise RowError(f"{self.path}: row {number + 1}, {error}", row.id) from None

    def _row(self, values: Mapping, number: int) -> Row:
        about_words = self._task.about_words
        return self.columns.row(values, number, self._folder, self._reach, self._labels, about_words)

    def _others(self, row: Row) -> Iterator[Row]:
        """Rows drawn by the number of this one; of a stream, of those that came last."""
        if self.rows is None:
            count, own = len(self._recent), len(self._recent) - 1
        else:
            count, own = len(self.numbers), row.number
        for draw in range(self._task.others if count > 1 else 0):
            number = (own + 1 + drawing(row.number)(f"other {draw}", range(count - 1))) % count
            there = self._recent[number] if self.rows is None else (self.rows[int(self.numbers[number])], number)
            with contextlib.suppress(RowError):
                yield self._row(*there)

    def made_of(self) -> str | None:
        """Hash of what the examples follow from beside the code: equal for equal rows of equal specifications. None
        where rows hold what cannot be compared."""
        told = {
            "specification": {**self.columns.entry, "task": self.task, "posed": self._posed},
            "columns": self.columns.names,
            "places": [self._folder, os.path.expanduser("~"), self._reach.folders, self._reach.allow_urls],
        }
        told = json.dumps(told, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        try:
            # A table of `datasets` has a hash; later versions of marshal than 2 need not write equal rows alike.
            rows = marshal.dumps(self.rows, 2) if isinstance(self.rows, list) else self.rows._fingerprint.encode()
        except ValueError:
            return None
        digest = hashlib.sha256(told.encode() + rows)
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()

    def for_evaluation(self) -> "Examples":
        """The same, each row with one question where its task makes several: the same one always, in wordings that are
        never trained."""
        same = copy.copy(self)
        same._posed = True
        return same

    def take(self, count: int) -> "Examples":
        """The first `count` rows."""
        first = copy.copy(self)
        first.numbers = self.numbers[:count]
        return first


class Others:
    """Rows that are read when a task comes to them, which seldom needs all: to read a row takes as long as the rest of
    an example. Each iteration begins anew."""

    def __init__(self, draw: Callable[[Row], Iterator[Row]], row: Row):
        self.draw, self.row = draw, row

    def __iter__(self) -> Iterator[Row]:
        return self.draw(self.row)


def load_examples(spec, **defaults) -> Examples:
    """The rows of one data set.

    Args:
        spec: string as above, or dict with "path" and optionally (all of them also as `defaults`)
            split: of a Hub data set; a folder's name in a tree (dev-clean); a value of a manifest's `split` column.
            task: key of TASKS; None = by the source's kind, or by its columns.
            *_column: names in the source; None tries the usual ones.
            filter, exclude: {column: value or list of values} on the source's own columns;
            limit: number of first rows kept;
            instruction: what the user asks with these clips;
            speech: False where nobody speaks in the clips, so that CTC may learn silence from them;
            allow_urls: fetch what its rows name by URL (which files they may name: dataset_paths.py);
            audio_folder: of Clotho, AudioCaps, ...: where the audio is, if not below the folder;
            heard: "simulated": clips are known by their words only, no audio is opened, and a row needs none;
            turns: questions that training asks one after the other, of a task that makes several of a row.
    Raises:
        FileNotFoundError, or ValueError naming the data set and what is wrong: no such column, split or key, no rows.
    """
    entry = entry_of(spec, defaults)
    rows, names, folder, reach, labels = open_rows(entry, streaming=False)
    if names is None:
        rows = list(rows)
        names = list(dict.fromkeys(name for row in rows for name in row)) if rows else []
    numbers = np.array(_wanted_numbers(rows, names, entry), dtype=np.int64)
    if not len(rows) and entry["split"] is None:
        raise ValueError(f"{entry['path']}: holds no rows.")
    if not len(numbers):
        raise ValueError(f"{entry['path']}: no rows are left after split={entry['split']!r}, filter and exclude.")
    columns = Columns(names, entry)
    columns.warn_of_unused()
    return Examples(rows, numbers, columns, task_of(entry, columns), folder, reach, labels)


def entry_of(spec, defaults: dict) -> dict:
    """A specification as a dict with every key, and of what kind its path is."""
    given = {"path": spec} if isinstance(spec, (str, Path)) else dict(spec)
    given = {**{key: value for key, value in defaults.items() if value is not None}, **given}
    unknown = sorted(set(given) - set(SPEC_KEYS))
    if unknown or "path" not in given:
        problem = f"unknown keys {', '.join(unknown)}" if unknown else "no path"
        raise ValueError(f"data specification {spec!r}: {problem}. Known keys: {', '.join(SPEC_KEYS)}.")
    given = {**dict.fromkeys(SPEC_KEYS), **given}
    given["kind"], given["path"] = split_kind(str(given["path"]))
    if given["heard"] not in (None, *WAYS_OF_HEARING):
        raise ValueError(f"{given['path']}: heard {given['heard']!r} is not one of {', '.join(WAYS_OF_HEARING)}.")
    if given["language"] is not None and language_code(given["language"]) is None:
        raise ValueError(f"{given['path']}: language {given['language']!r}: give a code, as de, zh-CN or none.")
    if given["turns"] is not None and given["turns"] < 1:
        raise ValueError(f"{given['path']}: turns must be 1 or more, got {given['turns']}.")
    if given["task"] is not None:
        try:
            task_named(given["task"])
        except ValueError as error:
            raise ValueError(f"{given['path']}: {error}") from None
    if given["audio_folder"] and not given["kind"]:
        raise ValueError(f"{given['path']}: audio_folder is for {', '.join(KINDS)}; manifests name their files.")
    for key in ("filter", "exclude"):
        wanted = given.get(key) or {}
        given[key] = {
            column: {str(v) for v in (values if isinstance(values, (list, tuple, set)) else [values])}
            for column, values in wanted.items()
        }
    return given


def task_of(entry: dict, columns: Columns) -> Task:
    named = entry["task"] is not None
    task = task_named(entry["task"]) if named else task_of_source(columns.fields, entry["instruction"])
    by_label = "label" in columns.by and task.others  # questions about sounds need no words
    if task.about_words and entry["speech"] is not False and not by_label:
        columns.need_text(natural_task(columns))
    return task


def natural_task(columns: Columns) -> Task:
    """The task that a source's columns are of, whatever is asked of it."""
    return task_of_source(columns.fields | ({"references"} if columns.entry["kind"] else set()), None)


def open_rows(entry: dict, streaming: bool):
    """(rows, names of the columns or None, folder that paths are relative to, reach, class columns)."""
    path = Path(entry["path"]).expanduser()
    if entry["kind"] in MADE:
        count = Path(entry["path"].partition(":")[2])
        return KINDS[entry["kind"]].rows(count, entry["split"]), None, None, reach_of_folder(entry, Path()), {}
    if not path.exists():
        if path.suffix in MANIFEST_SUFFIXES or path.is_absolute() or entry["path"].startswith((".", "~")):
            raise FileNotFoundError(f"{entry['path']}: no such file or folder.")
        reach = reach_of_hub(entry, entry["path"].partition(":")[0])
        rows, names, labels = _table(_load_hub(entry, streaming), entry)
        return rows, names, None, reach, labels
    if parquet := parquet_files(entry):
        table = _load_parquet(parquet)
        chosen = files_of_split(parquet, table.column_names, entry)
        rows, names, labels = _table(table if chosen == parquet else _load_parquet(chosen), entry)
        return rows, names, parquet[0].parent, reach_of_folder(entry, parquet[0].parent), labels
    rows, folder, reach = _rows(path, entry)
    return rows, None, folder, reach, {}


def _load_parquet(files: list[Path]):
    full = [str(file) for file in files if opened(file).metadata.num_rows]
    if not full:
        raise ValueError(f"{files[0]}: holds no rows.")
    try:
        return datasets.load_dataset("parquet", data_files=full, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{', '.join(full)}: cannot be read ({error.__cause__ or error}).") from error


def _table(table, entry: dict):
    """(rows, names, class columns) of a Parquet or Hub table, its audio undecoded."""
    if table.column_names is None:
        raise ValueError(f"{entry['path']}: its columns are not known before reading, so it cannot be streamed.")
    labels = {}
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Audio):
            table = table.cast_column(name, UNDECODED)  # first of all: any other step would decode the audio
        elif isinstance(getattr(feature, "feature", None), datasets.Audio):
            table = table.cast_column(name, datasets.List(UNDECODED))
        elif isinstance(feature, datasets.ClassLabel):
            labels[name] = feature.int2str
    return table, table.column_names, labels


def _wanted_numbers(rows, names: list[str], entry: dict) -> list[int]:
    """Numbers of the rows that filter and exclude leave, at most `limit`."""
    asked = [*entry["filter"], *entry["exclude"]]
    for column in asked:
        if column not in names:
            raise ValueError(f"{entry['path']}: filter on {column!r}, but it has only {', '.join(map(str, names))}.")
    if not asked:
        return list(range(len(rows)))[: entry["limit"]]
    narrow = rows if isinstance(rows, list) else rows.select_columns(asked)
    return [number for number, row in enumerate(narrow) if is_wanted(row, entry)][: entry["limit"]]


def is_wanted(row: dict, entry: dict) -> bool:
    for column in (*entry["filter"], *entry["exclude"]):
        if column not in row:
            raise ValueError(f"{entry['path']}: filter on {column!r}, but a row has only {', '.join(row)}.")
    keep = all(str(row[column]) in values for column, values in entry["filter"].items())
    return keep and not any(str(row[column]) in values for column, values in entry["exclude"].items())


def _load_hub(entry: dict, streaming: bool):
    name, _, rest = entry["path"].partition(":")
    config, _, split = rest.partition(":")
    split = split or entry["split"]
    try:
        table = datasets.load_dataset(name, config or None, split=split or None, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{entry['path']}: no such file or folder here, and no data set of this name on the Hub."
        ) from error
    if isinstance(table, dict):
        raise ValueError(
            f"{entry['path']}: choose a split, as {name}:{config or 'default'}:SPLIT, of {', '.join(table)}."
        )
    return table


def _rows(root: Path, entry: dict) -> tuple[Iterator[dict], Path, Reach]:
    """Rows of a release, a manifest, a LibriSpeech tree or a folder of audio files; its folder and reach."""
    manifest = None if entry["kind"] else root if root.is_file() else metadata_file(root)
    home = root.parent if root.is_file() else root
    if entry["kind"]:
        place = Path(entry["audio_folder"]).expanduser() if entry["audio_folder"] else None
        if place is not None and not place.is_dir():
            raise FileNotFoundError(f"{entry['path']}: audio_folder {entry['audio_folder']} is no folder.")
        rows = KINDS[entry["kind"]].rows(root.absolute(), entry["split"], place and place.absolute())
        return rows, root, reach_of_folder(entry, home, place, released=True)
    if manifest is not None:
        return _of_split(manifest_rows(manifest), entry), _audio_folder(manifest), reach_of_folder(entry, home)
    if nested := nested_metadata(root):
        audio = (entry["audio_column"],) if entry["audio_column"] else USUAL["audio"]
        return rows_of_folders(nested, root, entry["split"], audio), root, reach_of_folder(entry, root)
    if any(root.rglob("*.trans.txt")):
        return librispeech_rows(root, entry["split"]), root, reach_of_folder(entry, root, released=True)
    return folder_rows(root, entry["split"]), root, reach_of_folder(entry, root)


def _audio_folder(manifest: Path) -> Path:
    """What a manifest's paths are relative to: its folder, or clips/ in it, where Common Voice's TSVs have them."""
    clips = manifest.parent / "clips"
    if manifest.suffix == ".tsv" and clips.is_dir():
        first = next(manifest_rows(manifest), {}).get("path")
        if first and not (manifest.parent / first).exists():
            return clips
    return manifest.parent


def _of_split(rows: Iterator[dict], entry: dict) -> Iterator[dict]:
    for number, row in enumerate(rows, 1):
        if entry["split"] is not None:
            if "split" not in row:
                raise ValueError(
                    f"{entry['path']}: split={entry['split']!r} asked, but row {number} has no column `split`."
                )
            if str(row["split"]) != entry["split"]:
                continue
        yield row
