"""Registry of data sets with a layout of their own: name -> `matches(path)`, `rows(path, split, audio_folder)` and
`MISSING_AUDIO_IS_NORMAL`.

To add one: a small file with these three, and a line here. Rows have the names that dataset_columns.py knows.
"""

from pathlib import Path

from . import dataset_audiocaps, dataset_clotho, dataset_noise
from .dataset_files import metadata_file
from .dataset_questions import AIR_BENCH, CLOTHO_AQA, MMAU, SPEECH_IFEVAL, VOICEBENCH
from .dataset_sounds import ESC50, URBANSOUND8K

KINDS = {
    "clotho": dataset_clotho, "audiocaps": dataset_audiocaps, "esc50": ESC50, "urbansound8k": URBANSOUND8K,
    "clotho_aqa": CLOTHO_AQA, "mmau": MMAU, "air_bench": AIR_BENCH, "voicebench": VOICEBENCH,
    "speech_ifeval": SPEECH_IFEVAL, "noise": dataset_noise,
}  # fmt: skip
MADE = {"noise"}  # of no files: what follows the prefix is a number of clips
ONLY_BY_PREFIX = {"voicebench", *MADE}  # its columns could be anybody's


def split_kind(path: str) -> tuple[str | None, str]:
    """("clotho", "folder") for "clotho:folder"; the kind of a path without such a prefix is found by its files, None
    for none of these.

    A folder's own metadata.{jsonl,csv,parquet} takes precedence; with the prefix it is not looked at. Raises ValueError
    for a prefix that the path does not fit, FileNotFoundError for one without a path.
    """
    prefix, colon, rest = path.partition(":")
    if colon and prefix in KINDS:
        place = Path(rest).expanduser()
        if prefix in MADE:
            if not KINDS[prefix].matches(place):
                raise ValueError(f"{path}: give a number of clips, as {prefix}:300.")
            return prefix, path
        if not place.exists():
            raise FileNotFoundError(f"{path}: no such file or folder {rest!r}.")
        if not KINDS[prefix].matches(place):
            raise ValueError(f"{path}: {rest} has not the files of {prefix} (see processing/dataset_*.py).")
        return prefix, rest
    place = Path(path).expanduser()
    if not place.exists() or (place.is_dir() and metadata_file(place) is not None):
        return None, path
    known = (name for name, kind in KINDS.items() if name not in ONLY_BY_PREFIX and kind.matches(place))
    return next(known, None), path


def missing_audio_is_normal(path: str) -> bool:
    """Whether a data specification's path is a set of which nobody has every clip."""
    kind, _ = split_kind(path)
    return kind is not None and KINDS[kind].MISSING_AUDIO_IS_NORMAL
