"""Which files a data set may name.

    a manifest, Parquet file or folder on this machine   any: beside it, absolute, or with `..` (it is its user's own)
    what came from elsewhere: a data set of the Hub,      only files inside its own folder; a row that names another
    a folder that was downloaded from there, an           one ends the loading with a ValueError
    unpacked release (LibriSpeech, dataset_registry.py)
    URLs                                                  only where the specification says `allow_urls: true`

Inside means by name: links are followed, because the Hub's cache is made of them and people link data from other disks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import constants

URL_PREFIXES = ("http://", "https://")


@dataclass(frozen=True)
class Reach:
    """What the rows of `source` may name. `folders`: nothing outside of them, None: any file."""

    source: str
    folders: tuple[str, ...] | None
    allow_urls: bool = False

    def check(self, path: str, row: str = "a row") -> str:
        """The path or URL itself. ValueError naming source and row for one that is out of reach."""
        if path.startswith(URL_PREFIXES):
            if not self.allow_urls:
                raise ValueError(
                    f"{self.source}: {row} names the URL {path}. A data set's URLs are fetched only when allowed: "
                    "add allow_urls: true to its specification."
                )
        elif self.folders is not None and not any(is_inside(path, folder) for folder in self.folders):
            raise ValueError(
                f"{self.source}: {row} names {path}, which is outside of the data set's own folder. Data from elsewhere "  # noqa: E501
                "may only name its own files; if this one is right, name it in a manifest of your own."
            )
        return path


def is_inside(path: str, folder: str) -> bool:
    """Whether a path, `..` resolved by name, is in a folder. A stream's `hf://` paths are taken as they are."""
    if folder.startswith("hf://"):
        return path.rpartition("::")[2].startswith((f"{folder}/", f"{folder}@")) and ".." not in path.split("/")
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath((path, folder)) == folder


def reach_of_folder(entry: dict, folder: Path, *more: Path | None, released: bool = False) -> Reach:
    """The reach of what lies in `folder`; of a release it ends there and at `more`."""
    home = downloaded_folder(folder)
    folders = (folder, *filter(None, more)) if released else home and (home,)
    return Reach(entry["path"], folders and tuple(map(str, folders)), bool(entry["allow_urls"]))


def reach_of_hub(entry: dict, name: str) -> Reach:
    """The reach of a data set of the Hub: its own files as the Hub's client keeps them, or as `datasets` unpacked
    them."""
    own = os.path.join(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    unpacked = os.path.join(datasets.config.EXTRACTED_DATASETS_PATH)
    return Reach(entry["path"], (own, unpacked, f"hf://datasets/{name}"), bool(entry["allow_urls"]))


def downloaded_folder(folder: Path) -> Path | None:
    """The data set's own folder where `folder` was downloaded from the Hub: in the Hub's cache, or with the notes that
    `hf download --local-dir` leaves. None for any other folder."""
    folder, cache = Path(os.path.abspath(folder)), Path(os.path.abspath(constants.HF_HUB_CACHE))
    if cache in folder.parents:
        return cache / folder.relative_to(cache).parts[0]
    notes = Path(".cache", "huggingface", "download")
    return next((place for place in (folder, *folder.parents) if (place / notes).is_dir()), None)
