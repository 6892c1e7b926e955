"""Sounds with class labels, as released: ESC-50 (Piczak 2015, https://github.com/karolpiczak/ESC-50) and UrbanSound8K
(Salamon et al. 2014, https://urbansounddataset.weebly.com/urbansound8k.html).

    meta/esc50.csv, audio/*.wav                                          filename, fold, target, category, esc10, ...
    metadata/UrbanSound8K.csv, audio/fold1/*.wav ... audio/fold10/*.wav  slice_file_name, fold, class, ...

All columns of the CSV are there to filter by: `filter: {fold: [1, 2, 3, 4]}`, `filter: {esc10: ["True"]}`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .dataset_files import read_csv


@dataclass(frozen=True)
class LabelledSounds:
    """A release with one CSV. `file`, `label`: its columns; `in_folds`: audio lies in audio/fold<N>/."""

    table: str
    file: str
    label: str
    in_folds: bool

    MISSING_AUDIO_IS_NORMAL = False  # no field: without annotation

    def matches(self, path: Path) -> bool:
        """Whether a folder holds this release."""
        return (path / self.table).is_file()

    def rows(self, path: Path, split: str | None = None, audio_folder: Path | None = None) -> Iterator[dict]:
        """One row per clip: audio (absolute path), label, id and the CSV's columns.

        Raises ValueError for a split, which these sets do not have, and for a CSV of another kind.
        """
        if split is not None:
            raise ValueError(f"{path}: has folds instead of splits; use e.g. filter: {{fold: [1, 2, 3]}}.")
        root = audio_folder or path / "audio"
        for row in read_csv(path / self.table):
            if self.file not in row or self.label not in row:
                raise ValueError(f"{path / self.table}: lacks the column {self.file} or {self.label}.")
            folder = root / f"fold{row['fold']}" if self.in_folds else root
            yield {
                **row, "audio": str(folder / row[self.file]), "label": row[self.label], "id": row[self.file],
                "captions": [],
            }  # fmt: skip


ESC50 = LabelledSounds("meta/esc50.csv", "filename", "category", in_folds=False)
URBANSOUND8K = LabelledSounds("metadata/UrbanSound8K.csv", "slice_file_name", "class", in_folds=True)
