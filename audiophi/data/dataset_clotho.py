"""Clotho as released (Drossos et al. 2020, https://zenodo.org/records/4783391).

clotho_captions_{development,validation,evaluation}.csv   file_name, caption_1 ... caption_5
development/, validation/, evaluation/                    the unpacked audio, beside the CSVs or deeper
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .dataset_files import audio_files, csv_columns, read_csv

CAPTIONS = re.compile(r"clotho_captions_(\w+)\.csv")
MISSING_AUDIO_IS_NORMAL = False


def matches(path: Path) -> bool:
    """Whether a path is Clotho: one of its CSVs, or a folder that holds them."""
    if path.is_dir():
        return bool(_tables(path))
    columns = csv_columns(path)
    return "file_name" in columns and "caption_1" in columns


def rows(path: Path, split: str | None = None, audio_folder: Path | None = None) -> Iterator[dict]:
    """One row per clip with its captions and the split; `audio` is an absolute path (where the release has it, if it is
    not there).

    `path`: the folder, or one CSV; `split`: development, validation or evaluation, None for all there are;
    `audio_folder`: where the audio is, if not below the CSVs' folder. Raises ValueError for a split that is not there.
    """
    tables = _tables(path) if path.is_dir() else {_split_of(path): path}
    if split is not None and split not in tables:
        raise ValueError(f"{path}: has no clotho_captions_{split}.csv; splits here: {', '.join(sorted(tables))}.")
    root = audio_folder or (path if path.is_dir() else path.parent)
    files = audio_files(root)
    for name, table in sorted(tables.items()):
        if split is not None and name != split:
            continue
        # The same file name may occur in several splits: the split's own folder comes first.
        ordered = sorted(files, key=lambda file: name in file.relative_to(root).parts, reverse=True)
        found = {}
        for file in ordered:
            found.setdefault(_key(file.name), file)
        for row in read_csv(table):
            file_name = row["file_name"].strip()
            captions = [row[column] for column in row if column and re.fullmatch(r"caption_\d+", column)]
            yield {
                "audio": str(found.get(_key(file_name), root / name / file_name)),
                "captions": captions,
                "id": file_name,
                "split": name,
            }


def _tables(folder: Path) -> dict[str, Path]:
    """Split -> its CSV, in the folder or one below."""
    files = [*folder.glob("clotho_captions_*.csv"), *folder.glob("*/clotho_captions_*.csv")]
    return {_split_of(file): file for file in reversed(files)}


def _split_of(table: Path) -> str:
    match = CAPTIONS.fullmatch(table.name)
    return match[1] if match else table.stem


def _key(name: str) -> str:
    """A file name without suffix and without what archivers and re-encoders change in it (spaces, punctuation)."""
    return re.sub(r"[\W_]+", "_", Path(name).stem).strip("_").lower()
