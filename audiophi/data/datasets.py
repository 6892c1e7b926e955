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
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

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
from .dataset_paths import Reach, reach_of_folder, reach_of_hub
from .dataset_registry import KINDS, MADE, split_kind
from .example import Example, RowError, drawing, posed

SPEC_KEYS = (
    *("path", "split", "weight", "filter", "exclude", "limit", "task", "instruction", "speech"),
    *("audio_column", "text_column", "label_column", "instruction_column", "answer_column", "transcript_column"),
    *("audio_folder", "allow_urls", "heard", "turns", "language"),
)
WAYS_OF_HEARING = ("real", "simulated")
PEEK = 64  # rows of a stream that are read before the first is handed out
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

    def of(self, values: dict, number: int) -> Example:
        """A row's values as an example."""
        row = self._row(values, number)
        if self._task.others:
            row = replace(row, others=Others(self._others, row) if self.rows is not None else tuple(self._others(row)))
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

    def _row(self, values: dict, number: int) -> Row:
        about_words = self._task.about_words
        return self.columns.row(values, number, self._folder, self._reach, self._labels, about_words)

    def _others(self, row: Row) -> Iterator[Row]:
        """Rows drawn by the number of this one; of a stream, of those that came last."""
        if self.rows is None:
            self._recent.append(row)
            count, own = len(self._recent), len(self._recent) - 1
        else:
            count, own = len(self.numbers), row.number
        for draw in range(self._task.others if count > 1 else 0):
            number = (own + 1 + drawing(row.number)(f"other {draw}", range(count - 1))) % count
            if self.rows is None:
                yield self._recent[number]
                continue
            with contextlib.suppress(RowError):
                yield self._row(self.rows[int(self.numbers[number])], number)

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
    entry = _entry(spec, defaults)
    rows, names, folder, reach, labels = _open(entry, streaming=False)
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
    return Examples(rows, numbers, columns, _task(entry, columns), folder, reach, labels)


def stream_examples(specs: list[dict], seed: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[Example | RowError]:
    """Rows of several sources as they come, a RowError for each that cannot be used.

    part: (index, count): of every source the rows of one of `count` readers, which together read each row once.

    Where any source has a `weight` they are interleaved, drawn by weight until every one has been read once (a shorter
    one begins anew); else one comes after the other.
    """
    entries = [_entry(spec, {}) for spec in specs]
    if not entries:
        raise ValueError("an empty list of data sets.")
    weights = [1.0 if entry["weight"] is None else float(entry["weight"]) for entry in entries]
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"data weights must be above 0, got {weights}.")
    if len(entries) == 1 or all(entry["weight"] is None for entry in entries):
        for entry in entries:
            yield from _stream(entry, part)
        return
    shares, rng = np.array(weights) / sum(weights), np.random.default_rng(seed)
    streams, read = [_stream(entry, part) for entry in entries], [False] * len(entries)
    while not all(read):
        number = int(rng.choice(len(entries), p=shares))
        example = next(streams[number], None)
        if example is None:
            read[number] = True
            streams[number] = _stream(entries[number], part)
            example = None if all(read) else next(streams[number], None)
        if example is not None:
            yield example


def _stream(entry: dict, part: tuple[int, int]) -> Iterator[Example | RowError]:
    rows, names, folder, reach, labels = _open(entry, streaming=True)
    index, count = part
    if isinstance(rows, datasets.IterableDataset):
        # Readers share the files as far as these can be divided evenly, and the rows of a file among them.
        groups = math.gcd(rows.num_shards, count) if entry["limit"] is None else 1
        rows = rows.shard(groups, index % groups) if groups > 1 else rows
        index, count = index // groups, count // groups
        # Not by `iter(rows)`: inside of a loader's worker that divides the files a second time.
        rows = ({name: values[0] for name, values in batch.items()} for batch in rows.iter(1))
    rows = (row for row in rows if _wanted(row, entry))
    first = list(itertools.islice(rows, PEEK))  # rows of a manifest need not all have the same keys
    if not first:
        return
    columns = Columns(names or list(dict.fromkeys(name for row in first for name in row)), entry)
    columns.warn_of_unused()
    examples = Examples(None, (), columns, _task(entry, columns), folder, reach, labels)
    numbered = enumerate(itertools.chain(first, rows))
    for number, values in itertools.islice(numbered, index, entry["limit"], count):
        try:
            yield examples.of(values, number)
        except RowError as error:
            yield error


def _entry(spec, defaults: dict) -> dict:
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


def _task(entry: dict, columns: Columns) -> Task:
    named = entry["task"] is not None
    task = task_named(entry["task"]) if named else task_of_source(columns.fields, entry["instruction"])
    by_label = "label" in columns.by and task.others  # questions about sounds need no words
    if task.about_words and entry["speech"] is not False and not by_label:
        columns.need_text(natural_task(columns))
    return task


def natural_task(columns: Columns) -> Task:
    """The task that a source's columns are of, whatever is asked of it."""
    return task_of_source(columns.fields | ({"references"} if columns.entry["kind"] else set()), None)


def _open(entry: dict, streaming: bool):
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
    parquet = [] if entry["kind"] else _parquet_files(path)
    if parquet:
        table = _load_parquet(parquet, streaming)
        if "split" in table.column_names and entry["split"]:
            entry["filter"] = {**entry["filter"], "split": {entry["split"]}}
        elif entry["split"]:
            named = [file for file in parquet if file.name.startswith(entry["split"])]
            if not named:
                raise ValueError(
                    f"{entry['path']}: has no column `split` and no Parquet file of split {entry['split']!r}."
                )
            table = _load_parquet(named, streaming)
        rows, names, labels = _table(table, entry)
        return rows, names, parquet[0].parent, reach_of_folder(entry, parquet[0].parent), labels
    rows, folder, reach = _rows(path, entry)
    return rows, None, folder, reach, {}


def _load_parquet(files: list[Path], streaming: bool):
    full = []
    for file in files:
        try:
            if pyarrow.parquet.read_metadata(file).num_rows:
                full.append(str(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as Parquet ({error}). Is it empty, or not all there?") from error
    if not full:
        raise ValueError(f"{files[0]}: holds no rows.")
    try:
        return datasets.load_dataset("parquet", data_files=full, split="train", streaming=streaming)
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
    return [number for number, row in enumerate(narrow) if _wanted(row, entry)][: entry["limit"]]


def _wanted(row: dict, entry: dict) -> bool:
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


def _parquet_files(path: Path) -> list[Path]:
    """The Parquet files of a specification: itself, or a folder's where no other metadata stands beside them."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    if metadata_file(path) is not None:
        metadata = metadata_file(path)
        return [metadata] if metadata.suffix == ".parquet" else []
    return sorted(path.rglob("*.parquet"))


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
