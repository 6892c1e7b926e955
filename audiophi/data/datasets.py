"""Every kind of speech data → one table with columns audio, text, id, speaker, seconds.

    "openslr/librispeech_asr:clean:train.100"    Hub id[:config[:split]]
    "LibriSpeech", split="dev-clean"             the official archive's directory tree (*.trans.txt)
    "my_folder"                                  audiofolder: metadata.{jsonl,csv,parquet}, or label folders of files
    "manifest.jsonl", audio_column="wav"         JSONL, CSV, TSV or Parquet, paths relative to the file
    "clotho:FOLDER", "audiocaps:FOLDER", ...     releases with a layout of their own (dataset_registry.py); without the
                                                 prefix they are recognised by their files
    [{"path": "a", "weight": 2}, {"path": "b"}]  mixture

Data sets of captions, or of labels that become captions (`task: caption`), have four more columns: CAPTION_FEATURES.

Audio stays undecoded ({"bytes", "path"}, as datasets.Audio(decode=False) gives), so that a bad file is met when
`read_clip` reads its row, and can be counted and skipped instead of ending the run.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np

from processing.audio_io import AudioError, load_audio
from processing.plain_text import whole_characters
from processing.prompts import TASKS

from .dataset_columns import (
    AUDIO_COLUMNS,
    CAPTION_FEATURES,
    FEATURES,
    ID_COLUMNS,
    LABEL_COLUMNS,
    SECONDS_COLUMNS,
    SPEAKER_COLUMNS,
    TEXT_COLUMNS,
    absolute,
    caption_columns,
    pick,
    plausible_seconds,
)
from .dataset_files import MANIFEST_SUFFIXES, folder_rows, librispeech_rows, manifest_rows, metadata_file
from .dataset_paths import Reach, reach_of_folder, reach_of_hub
from .dataset_registry import KINDS, split_kind
from .dataset_tables import from_table

SPEC_KEYS = (
    *("path", "split", "weight", "filter", "exclude", "limit", "audio_column", "text_column"),
    *("label_column", "audio_folder", "task", "instruction", "allow_urls"),
)


def load_audio_dataset(
    spec,
    audio_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    label_column: str | None = None,
    task: str | None = None,
):
    """Load one data set or a mixture.

    Args:
        spec: string as above, dict with "path" and optionally
              split, audio_column, text_column, label_column, task: as below;
              filter, exclude: {column: value or list of values} on the source's own columns;
              limit: number of first rows kept;
              instruction: what the user asks with these clips, instead of the task's usual instructions;
              allow_urls: fetch what its rows name by URL (which files they may name: dataset_paths.py);
              audio_folder: of Clotho, AudioCaps, ...: where the audio is, if not below the folder;
              weight: in mixtures, its share of the rows is weight / sum of weights (default 1). Rows are drawn again or
                left out as needed; the whole stays as long as its parts. No weights: all rows once.
            Or a list of such strings and dicts.
        audio_column, text_column: names in the source; None tries the usual ones (AUDIO_COLUMNS, TEXT_COLUMNS).
        split: of a Hub data set; a folder's name in a tree (dev-clean); a value of a manifest's `split` column.
        streaming: return an IterableDataset that reads as it goes.
        seed: of the weights' random choice.
        label_column: the class of a sound, for `task` caption; None tries LABEL_COLUMNS.
        task: "transcribe", "caption" or "no_speech"; None = caption for the sets of dataset_registry.py, else
            transcribe. "no_speech": whatever the source says, its transcripts are empty (silence, noise, music).
            Captions are a list `captions`, columns caption_1 ..., the text, or made from the class by templates
            (captions.py).
    Returns:
        datasets.Dataset or IterableDataset with the columns of FEATURES, or of CAPTION_FEATURES where any source has
        another task than transcribe, or an instruction; text, speaker, seconds, label are None where unknown.
    Raises:
        FileNotFoundError, or ValueError naming the data set and what is wrong: no such column, split or key, no rows.
    """
    defaults = {
        "audio_column": audio_column, "text_column": text_column, "split": split, "label_column": label_column,
        "task": task,
    }  # fmt: skip
    if isinstance(spec, (list, tuple)):
        return _mixture([_entry(part, defaults) for part in spec], streaming, seed)
    return _load_rows(_entry(spec, defaults), streaming)


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


def _entry(spec, defaults: dict) -> dict:
    """A specification as a dict with every key, and of what kind its path is."""
    given = {"path": spec} if isinstance(spec, (str, Path)) else dict(spec)
    unknown = sorted(set(given) - set(SPEC_KEYS))
    if unknown or "path" not in given:
        problem = f"unknown keys {', '.join(unknown)}" if unknown else "no path"
        raise ValueError(f"data specification {spec!r}: {problem}. Known keys: {', '.join(SPEC_KEYS)}.")
    given = {**dict.fromkeys(SPEC_KEYS), **defaults, **{key: v for key, v in given.items() if v is not None}}
    given["kind"], given["path"] = split_kind(str(given["path"]))
    given["task"] = given["task"] or ("caption" if given["kind"] else "transcribe")
    if given["task"] not in TASKS:
        raise ValueError(f"{given['path']}: task {given['task']!r} is not one of {', '.join(TASKS)}.")
    if given["kind"] and given["task"] == "transcribe":
        raise ValueError(f"{given['path']}: is {given['kind']}, which has no transcripts; leave out task, or caption.")
    if given["audio_folder"] and not given["kind"]:
        raise ValueError(f"{given['path']}: audio_folder is for {', '.join(KINDS)}; manifests name their files.")
    given["features"] = CAPTION_FEATURES if given["task"] != "transcribe" or given["instruction"] else FEATURES
    for key in ("filter", "exclude"):
        wanted = given.get(key) or {}
        given[key] = {
            column: {str(v) for v in (values if isinstance(values, (list, tuple, set)) else [values])}
            for column, values in wanted.items()
        }
    return given


def _load_rows(entry: dict, streaming: bool):
    loaded = _load(entry, streaming)
    if not streaming and len(loaded) == 0:
        raise ValueError(f"{entry['path']}: no rows are left after split={entry['split']!r}, filter and exclude.")
    return loaded


def _mixture(entries: list[dict], streaming: bool, seed: int):
    if not entries:
        raise ValueError("an empty list of data sets.")
    weights = [1.0 if entry["weight"] is None else float(entry["weight"]) for entry in entries]
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"data weights must be above 0, got {weights}.")
    features = max((entry["features"] for entry in entries), key=len)  # one table has one set of columns
    parts = [_load_rows({**entry, "features": features}, streaming) for entry in entries]
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
        reach = reach_of_hub(entry, entry["path"].partition(":")[0])
        return from_table(_load_hub(entry, streaming), entry, streaming, reach)
    parquet = [] if entry["kind"] else _parquet_files(path)
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
        folder = parquet[0].parent
        return from_table(table, entry, streaming, reach_of_folder(entry, folder), folder)
    if streaming:
        return datasets.IterableDataset.from_generator(
            _rows, gen_kwargs={"path": str(path), "entry": entry}, features=entry["features"]
        )
    rows = list(_rows(str(path), entry))
    columns = {name: [row[name] for row in rows] for name in entry["features"]}
    return datasets.Dataset.from_dict(columns, features=entry["features"])


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


def _rows(path: str, entry: dict) -> Iterator[dict]:
    """Normalised rows of a release, a manifest, a LibriSpeech tree or a folder of audio files."""
    root = Path(path).expanduser()
    manifest = None if entry["kind"] else root if root.is_file() else metadata_file(root)
    reach = reach_of_folder(entry, root.parent if root.is_file() else root)
    if entry["kind"]:
        place = Path(entry["audio_folder"]).expanduser() if entry["audio_folder"] else None
        if place is not None and not place.is_dir():
            raise FileNotFoundError(f"{entry['path']}: audio_folder {entry['audio_folder']} is no folder.")
        source, folder = KINDS[entry["kind"]].rows(root.absolute(), entry["split"], place and place.absolute()), root
        reach = reach_of_folder(entry, root.parent if root.is_file() else root, place, released=True)
    elif manifest is not None:
        source, folder = manifest_rows(manifest), manifest.parent
    elif any(root.rglob("*.trans.txt")):
        source, folder = librispeech_rows(root, entry["split"]), root
        reach = reach_of_folder(entry, root, released=True)
    else:
        source, folder = folder_rows(root, entry["split"]), root
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
            audio_column = pick(list(row), entry["audio_column"], AUDIO_COLUMNS, "audio", entry["path"])
            text_column = pick(list(row), entry["text_column"], TEXT_COLUMNS, None, entry["path"])
            label_column = pick(list(row), entry["label_column"], LABEL_COLUMNS, None, entry["path"])
        normalised = _normalised(row, index, folder, reach, audio_column, text_column)
        if "captions" in entry["features"]:
            normalised |= caption_columns(row, text_column, label_column, entry)
        yield normalised
        count += 1
        if entry["limit"] and count >= entry["limit"]:
            return


def _wanted(row: dict, entry: dict) -> bool:
    for column in (*entry["filter"], *entry["exclude"]):
        if column not in row:
            raise ValueError(f"{entry['path']}: filter on {column!r}, but a row has only {', '.join(row)}.")
    keep = all(str(row[column]) in values for column, values in entry["filter"].items())
    return keep and not any(str(row[column]) in values for column, values in entry["exclude"].items())


def _normalised(row: dict, index: int, folder: Path, reach: Reach, audio_column: str, text_column: str | None) -> dict:
    def first(names):
        return next((row[name] for name in names if row.get(name) not in (None, "")), None)

    audio = row.get(audio_column)
    audio = audio.get("path") if isinstance(audio, dict) else audio
    text = row.get(text_column) if text_column else None
    name, speaker, seconds = first(ID_COLUMNS), first(SPEAKER_COLUMNS), first(SECONDS_COLUMNS)
    path = absolute(audio, folder, reach, f"row {index + 1}")
    return {
        "audio": {"path": path, "bytes": None},
        "text": None if text is None else whole_characters(str(text)),
        "id": whole_characters(str(name) if name is not None else str(audio or f"row-{index}")),
        "speaker": None if speaker is None else whole_characters(str(speaker)),
        "seconds": plausible_seconds(seconds),
    }
