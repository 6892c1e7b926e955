"""AudioCaps (Kim et al. 2019, https://github.com/cdjkim/audiocaps): its CSVs, and audio that everybody cut out of
YouTube themselves.

    train.csv, val.csv, test.csv                               audiocap_id, youtube_id, start_time, caption
    {youtube_id}_{start_time}.wav or {youtube_id}.wav          anywhere below the folder, or in `audio_folder`

Validation and test have five captions a clip, in as many lines. Videos disappear, so nobody has all clips: rows without
a file are kept, for the reader to count and list.
"""

from collections.abc import Iterator
from pathlib import Path

from .dataset_files import audio_files, csv_columns, read_csv

COLUMNS = {"youtube_id", "start_time", "caption"}
MISSING_AUDIO_IS_NORMAL = True


def matches(path: Path) -> bool:
    """Whether a path is AudioCaps: one of its CSVs, or a folder that holds them."""
    return bool(_tables(path)) if path.is_dir() else set(csv_columns(path)) >= COLUMNS


def rows(path: Path, split: str | None = None, audio_folder: Path | None = None) -> Iterator[dict]:
    """One row per clip with its captions and the split; `audio` is the absolute path of its file (the first name it
    could have, if there is none).

    `path`: the folder, or one CSV; `split`: a CSV's name (train, val, test), None for all there are; `audio_folder`:
    where the audio is, if not below the CSVs' folder. Raises ValueError for a split that is not there.
    """
    tables = _tables(path) if path.is_dir() else {path.stem: path}
    if split is not None and split not in tables:
        raise ValueError(f"{path}: has no {split}.csv of AudioCaps; splits here: {', '.join(sorted(tables))}.")
    root = audio_folder or (path if path.is_dir() else path.parent)
    found = {file.stem: file for file in reversed(audio_files(root))}
    for name, table in sorted(tables.items()):
        if split is not None and name != split:
            continue
        clips: dict[str, dict] = {}
        for row in read_csv(table):
            video, start = row["youtube_id"], row["start_time"].removesuffix(".0")
            stem = f"{video}_{start}"
            if stem not in clips:
                file = found.get(stem) or found.get(video) or root / f"{stem}.wav"
                clips[stem] = {"audio": str(file), "captions": [], "id": stem, "youtube_id": video, "split": name}
            clips[stem]["captions"].append(row["caption"])
        yield from clips.values()


def _tables(folder: Path) -> dict[str, Path]:
    files = [*folder.glob("*.csv"), *folder.glob("*/*.csv")]
    return {file.stem: file for file in reversed(files) if set(csv_columns(file)) >= COLUMNS}
