"""Every kind of speech data → one table with columns audio, text, id, speaker, seconds.

    "openslr/librispeech_asr:clean:train.100"    Hub id[:config[:split]]
    "LibriSpeech", split="dev-clean"             the official archive's directory tree (*.trans.txt)
    "my_folder"                                  audiofolder: metadata.{jsonl,csv,parquet}, or label folders of files
    "manifest.jsonl", audio_column="wav"         JSONL, CSV, TSV or Parquet, paths relative to the file
    [{"path": "a", "weight": 2}, {"path": "b"}]  mixture

Audio stays undecoded ({"bytes", "path"}, as datasets.Audio(decode=False) gives), so that a bad file is met when
`read_clip` reads its row, and can be counted and skipped instead of ending the run.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np

from .audio_io import AudioError, load_audio

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
AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_path", "audio_filepath", "file", "wav")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text", "caption", "label")
ID_COLUMNS = ("id", "utt_id", "utterance_id")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
SECONDS_COLUMNS = ("seconds", "duration")
AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm", ".aac"}
MANIFEST_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
SPEC_KEYS = ("path", "split", "weight", "filter", "exclude", "limit", "audio_column", "text_column")


def load_audio_dataset(
    spec,
    audio_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    seed: int = 0,
):
    """Load one data set or a mixture.

    Args:
        spec: string as above, dict with "path" and optionally
              split, audio_column, text_column: as below;
              filter, exclude: {column: value or list of values} on the source's own columns;
              limit: number of first rows kept;
              weight: in mixtures, its share of the rows is weight / sum of weights (default 1). Rows are drawn again or
                left out as needed; the whole stays as long as its parts. No weights: all rows once.
            Or a list of such strings and dicts.
        audio_column, text_column: names in the source; None tries the usual ones (AUDIO_COLUMNS, TEXT_COLUMNS).
        split: of a Hub data set; a folder's name in a tree (dev-clean); a value of a manifest's `split` column.
        streaming: return an IterableDataset that reads as it goes.
        seed: of the weights' random choice.
    Returns:
        datasets.Dataset or IterableDataset with the columns of FEATURES; text, speaker, seconds are None where unknown.
    Raises:
        FileNotFoundError, or ValueError naming the data set and what is wrong: no such column, split or key, no rows.
    """
    if isinstance(spec, (list, tuple)):
        return _mixture(spec, audio_column, text_column, split, streaming, seed)
    entry = _entry(spec, audio_column, text_column, split)
    loaded = _load(entry, streaming)
    if not streaming and len(loaded) == 0:
        raise ValueError(f"{entry['path']}: no rows are left after split={entry['split']!r}, filter and exclude.")
    return loaded


def read_clip(row: dict, sampling_rate: int = 16000, require_text: bool = False) -> np.ndarray:
    """Decode a row's audio → float32 waveform (samples,) at `sampling_rate`.

    Raises AudioError, naming the row, for audio that cannot be used, and with `require_text` for a row without text.
    """
    audio = row.get("audio")
    name = row.get("id") or (audio or {}).get("path") or "row"
    if require_text and not (row.get("text") or "").strip():
        raise AudioError(f"{name}: has no text.")
    if audio is None or (audio.get("path") is None and audio.get("bytes") is None):
        raise AudioError(f"{name}: has no audio.")
    source = audio["bytes"] if audio.get("bytes") is not None else audio["path"]
    return load_audio(source, target_rate=sampling_rate, name=name if audio.get("bytes") is not None else None)


def _entry(spec, audio_column, text_column, split) -> dict:
    """A specification as a dict with every key."""
    given = {"path": spec} if isinstance(spec, (str, Path)) else dict(spec)
    unknown = sorted(set(given) - set(SPEC_KEYS))
    if unknown or "path" not in given:
        problem = f"unknown keys {', '.join(unknown)}" if unknown else "no path"
        raise ValueError(f"data specification {spec!r}: {problem}. Known keys: {', '.join(SPEC_KEYS)}.")
    defaults = {"audio_column": audio_column, "text_column": text_column, "split": split, "weight": None, "limit": None}
    given = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    given["path"] = str(given["path"])
    for key in ("filter", "exclude"):
        wanted = given.get(key) or {}
        given[key] = {
            column: {str(v) for v in (values if isinstance(values, (list, tuple, set)) else [values])}
            for column, values in wanted.items()
        }
    return given


def _mixture(specs, audio_column, text_column, split, streaming, seed):
    entries = [_entry(spec, audio_column, text_column, split) for spec in specs]
    if not entries:
        raise ValueError("an empty list of data sets.")
    weights = [1.0 if entry["weight"] is None else float(entry["weight"]) for entry in entries]
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"data weights must be above 0, got {weights}.")
    parts = [load_audio_dataset({**entry, "weight": None}, streaming=streaming) for entry in entries]
    if all(entry["weight"] is None for entry in entries) or len(parts) == 1:
        return datasets.concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    if streaming:  # sizes are unknown: draw until every part has been seen
        return datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    total = sum(map(len, parts))
    drawn = [_draw(part, round(total * share), seed) for part, share in zip(parts, shares, strict=True)]
    return datasets.concatenate_datasets(drawn)


def _draw(part: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """`count` rows in order: every row as often as that allows, and a random choice of them once more."""
    whole, rest = divmod(count, len(part))
    extra = np.random.default_rng(seed).permutation(len(part))[:rest]
    return part.select(list(range(len(part))) * whole + sorted(extra.tolist()))


def _load(entry: dict, streaming: bool):
    path = Path(entry["path"]).expanduser()
    if not path.exists():
        if path.suffix in MANIFEST_SUFFIXES or path.is_absolute() or entry["path"].startswith((".", "~")):
            raise FileNotFoundError(f"{entry['path']}: no such file or folder.")
        return _from_table(_load_hub(entry, streaming), entry, streaming)
    parquet = _parquet_files(path)
    if parquet:
        table = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in parquet], split="train", streaming=streaming
        )
        if "split" in table.column_names and entry["split"]:
            entry = {**entry, "filter": {**entry["filter"], "split": {entry["split"]}}}
        elif entry["split"]:
            named = [file for file in parquet if file.name.startswith(entry["split"])]
            if not named:
                raise ValueError(
                    f"{entry['path']}: has no column `split` and no Parquet file of split {entry['split']!r}."
                )
            table = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in named], split="train", streaming=streaming
            )
        return _from_table(table, entry, streaming, folder=parquet[0].parent)
    if streaming:
        return datasets.IterableDataset.from_generator(
            _rows, gen_kwargs={"path": str(path), "entry": entry}, features=FEATURES
        )
    rows = list(_rows(str(path), entry))
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


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
    if _metadata_file(path) is not None:
        metadata = _metadata_file(path)
        return [metadata] if metadata.suffix == ".parquet" else []
    return sorted(path.rglob("*.parquet"))


def _metadata_file(folder: Path) -> Path | None:
    return next(
        (file for suffix in (".jsonl", ".csv", ".parquet") if (file := folder / f"metadata{suffix}").exists()), None
    )


def _pick(columns, wanted: str | None, usual: tuple[str, ...], what: str | None, source: str) -> str | None:
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


def _from_table(table, entry: dict, streaming: bool, folder: Path | None = None):
    """Parquet or Hub table → FEATURES, by renaming and casting only: rows with audio bytes are not rewritten."""
    source = entry["path"]
    columns = table.column_names
    if columns is None:
        raise ValueError(f"{source}: its columns are not known before reading, so it cannot be streamed.")
    for column in (*entry["filter"], *entry["exclude"]):
        _pick(columns, column, (), column, source)
    chosen = {
        "audio": _pick(columns, entry["audio_column"], AUDIO_COLUMNS, "audio", source),
        "text": _pick(columns, entry["text_column"], TEXT_COLUMNS, None, source),
        "id": _pick(columns, None, ID_COLUMNS, None, source),
        "speaker": _pick(columns, None, SPEAKER_COLUMNS, None, source),
        "seconds": _pick(columns, None, SECONDS_COLUMNS, None, source),
    }
    table = _undecoded(table, chosen["audio"])  # first of all: any other step would decode the audio
    for column, values in entry["filter"].items():
        table = table.filter(lambda value, values=values: str(value) in values, input_columns=[column])
    for column, values in entry["exclude"].items():
        table = table.filter(lambda value, values=values: str(value) not in values, input_columns=[column])
    if entry["limit"]:
        table = table.take(entry["limit"])
    labels = table.features[chosen["text"]] if chosen["text"] else None
    table = table.select_columns([name for name in chosen.values() if name])
    table = table.rename_columns({old: new for new, old in chosen.items() if old and old != new})
    if isinstance(labels, datasets.ClassLabel):
        table = table.map(lambda value: {"text": labels.int2str(value).replace("_", " ")}, input_columns=["text"])
    if folder is not None:
        first = next(iter(table), {"audio": None})["audio"]
        if first is not None and first["bytes"] is None:
            table = table.map(
                lambda audio: {"audio": {**audio, "path": _absolute(audio["path"], folder)}}, input_columns=["audio"]
            )
    missing = [name for name in FEATURES if chosen[name] is None]
    if streaming:
        table = table.map(_fill, with_indices=True, fn_kwargs={"missing": missing})
    else:
        for name in missing:
            values = [f"row-{index}" for index in range(len(table))] if name == "id" else [None] * len(table)
            table = table.add_column(name, values, feature=FEATURES[name])
        table = table.select_columns(list(FEATURES))
    return table.cast(FEATURES)


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


def _absolute(path: str | None, folder: Path) -> str | None:
    """A manifest's path, relative to the manifest, as one that can be opened."""
    if path is None or path == "" or path.startswith(("http://", "https://")):
        return path or None
    return str(folder / path)


def _rows(path: str, entry: dict) -> Iterator[dict]:
    """Normalised rows of a manifest, a LibriSpeech tree or a folder of audio files."""
    root = Path(path).expanduser()
    manifest = root if root.is_file() else _metadata_file(root)
    if manifest is not None:
        source, folder = _manifest_rows(manifest), manifest.parent
    elif any(root.rglob("*.trans.txt")):
        source, folder = _librispeech_rows(root, entry["split"]), root
    else:
        source, folder = _folder_rows(root, entry["split"]), root
    audio_column = None
    count = 0
    for index, row in enumerate(source):
        if manifest is not None and entry["split"] is not None:
            if "split" not in row:
                raise ValueError(
                    f"{entry['path']}: split={entry['split']!r} asked, but row {index + 1} has no column `split`."
                )
            if str(row["split"]) != entry["split"]:
                continue
        if not _wanted(row, entry):
            continue
        if audio_column is None:
            audio_column = _pick(list(row), entry["audio_column"], AUDIO_COLUMNS, "audio", entry["path"])
            text_column = _pick(list(row), entry["text_column"], TEXT_COLUMNS, None, entry["path"])
        yield _normalised(row, index, folder, audio_column, text_column)
        count += 1
        if entry["limit"] and count >= entry["limit"]:
            return


def _wanted(row: dict, entry: dict) -> bool:
    for column in (*entry["filter"], *entry["exclude"]):
        if column not in row:
            raise ValueError(f"{entry['path']}: filter on {column!r}, but a row has only {', '.join(row)}.")
    keep = all(str(row[column]) in values for column, values in entry["filter"].items())
    return keep and not any(str(row[column]) in values for column, values in entry["exclude"].items())


def _normalised(row: dict, index: int, folder: Path, audio_column: str, text_column: str | None) -> dict:
    def first(names):
        return next((row[name] for name in names if row.get(name) not in (None, "")), None)

    audio = row.get(audio_column)
    audio = audio.get("path") if isinstance(audio, dict) else audio
    text = row.get(text_column) if text_column else None
    name, speaker, seconds = first(ID_COLUMNS), first(SPEAKER_COLUMNS), first(SECONDS_COLUMNS)
    return {
        "audio": {"path": _absolute(audio, folder), "bytes": None},
        "text": None if text is None else str(text),
        "id": str(name) if name is not None else str(audio or f"row-{index}"),
        "speaker": None if speaker is None else str(speaker),
        "seconds": None if seconds is None else float(seconds),
    }


def _manifest_rows(manifest: Path) -> Iterator[dict]:
    if manifest.suffix in (".csv", ".tsv"):
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file, delimiter="\t" if manifest.suffix == ".tsv" else ",")
        return
    if manifest.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{manifest}: not a manifest ({', '.join(sorted(MANIFEST_SUFFIXES))}).")
    with open(manifest, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{manifest}: line {number} is not JSON ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{manifest}: line {number} is not a JSON object.")
                yield row


def _librispeech_rows(root: Path, split: str | None) -> Iterator[dict]:
    """The official tree: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside SPEAKER-CHAPTER-NUMBER.flac."""
    transcripts = sorted(root.rglob("*.trans.txt"))
    if split is not None:
        transcripts = [file for file in transcripts if split in file.parts]
        if not transcripts:
            raise ValueError(f"{root}: no folder {split!r} with transcripts.")
    for transcript in transcripts:
        files = {file.stem: file for file in transcript.parent.iterdir() if file.suffix in AUDIO_SUFFIXES}
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            if name:
                file = files.get(name, transcript.parent / f"{name}.flac")
                yield {"audio": str(file.relative_to(root)), "text": text, "id": name, "speaker": name.split("-")[0]}


def _folder_rows(root: Path, split: str | None) -> Iterator[dict]:
    """Audio files without metadata; the folder that holds a file is its label, as in `datasets`' audiofolder."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if split is not None:
        files = [file for file in files if split in file.relative_to(root).parts]
    if not files:
        raise ValueError(
            f"{root}: holds no audio files, manifest or transcripts{f' of split {split!r}' if split else ''}."
        )
    for file in files:
        path = file.relative_to(root)
        yield {"audio": str(path), "label": path.parent.name.replace("_", " ") or None, "id": str(path)}
