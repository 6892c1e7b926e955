"""Checkpoints that can be trusted: written to their end, with checksums, and read back only when they match.

A checkpoint is a folder `checkpoint-STEP` of Trainer's. Its last file, `complete`, is written when all others are on
the disk; it holds their sizes and SHA-256 sums and the seconds trained so far. So a checkpoint without it was cut short
(a kill, a full disk) and is removed when the run resumes; one that does not match it was damaged later: it is renamed
to `damaged-checkpoint-STEP`, that is said, and the one before it is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETE_NAME = "complete"
DAMAGED_PREFIX = "damaged-"
KEPT = 2  # complete checkpoints of a stage: should the newest be damaged, there is another


class SaveError(OSError):
    """Something could not be written; the message says what, where, why, and how to go on."""


class DamagedModel(OSError):
    """A finished stage's model is not what was written; the message names the file and the fix."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """The file holds `text` or what it held before, whatever happens in between, a power cut included."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def checksums(folder: Path) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} of all files below a folder but its marker, which are forced to the disk first."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_NAME):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def seal(folder: Path, seconds: float) -> None:
    """Marks a checkpoint as complete. `seconds`: trained so far."""
    write_atomically(folder / COMPLETE_NAME, json.dumps({"seconds": seconds, "files": checksums(folder)}, indent=1))


def keep_newest(folder: Path, kept: int = KEPT) -> None:
    """Removes all complete checkpoints but the newest ones; each one's marker first, so that none is left in part."""
    for path in complete_checkpoints(folder)[kept:]:
        (path / COMPLETE_NAME).unlink()
        shutil.rmtree(path)


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """Around writing the folder `target`: turns every failure to write into a SaveError, after removing what was
    written of it, which would only take up room."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save's and safetensors' own errors
        shutil.rmtree(target, ignore_errors=True)
        raise SaveError(explain(target, error)) from error


def explain(target: Path, error: Exception) -> str:
    """What could not be saved, why, and what to do."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    found = complete_checkpoints(target.parent)
    size = sum(file.stat().st_size for file in found[0].iterdir() if file.is_file()) if found else 0
    if found:
        rest = f"The last complete checkpoint, {found[0]} ({size / 2**20:.1f} MB), is untouched. "
    else:
        rest = f"There is no earlier checkpoint in {target.parent}. "
    cause = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"cannot save {target}: {cause} ({shutil.disk_usage(existing).free / 2**20:.1f} MB are free there). "
        f"What had been written of it is removed. {rest}"
        "Make room on that disk (or raise the quota or the limit on file sizes) and run the same command again: "
        "it resumes there"
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints that were written to their end, newest first."""
    found = [path.parent for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_NAME}")]
    return sorted(found, key=step_of, reverse=True)


def read_marker(checkpoint: Path) -> dict:
    """{"seconds", "files"}. Raises ValueError for a marker that is damaged itself."""
    marker = json.loads((checkpoint / COMPLETE_NAME).read_text(encoding="utf-8"))
    if isinstance(marker, float | int):  # before there were checksums, it held the seconds alone
        return {"seconds": float(marker), "files": {}}
    if not isinstance(marker, dict) or marker.keys() != {"seconds", "files"}:
        raise ValueError("not a checkpoint's marker")
    return marker


def damage(folder: Path, files: dict[str, dict]) -> str | None:
    """What is wrong with a folder whose files had these `checksums()`; None for nothing."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != known["bytes"]:
            return f"{name} has {size:,} bytes, {known['bytes']:,} were written"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                return f"{name} is not what was written (its SHA-256 sum differs)"
    return None


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint; None for nothing."""
    try:
        return damage(checkpoint, read_marker(checkpoint)["files"])
    except ValueError:
        return f"{COMPLETE_NAME} cannot be read"
    except OSError as error:
        return str(error)


def resumable_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a stage that is what was written, or None; the same in all processes.

    Those that were cut short are removed, damaged ones are set aside, and `say` is told about these.
    """
    if not PartialState().is_main_process:
        chosen = [None]
    else:
        chosen = [_first_good(folder, say)]
    # The main process reads every byte, which must not be done once per process.
    broadcast_object_list(chosen)
    return None if chosen[0] is None else Path(chosen[0])


def _first_good(folder: Path, say: Callable[[str], None]) -> str | None:
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (path / COMPLETE_NAME).exists():
            shutil.rmtree(path)
    complete = complete_checkpoints(folder)
    for number, path in enumerate(complete):
        if (wrong := checkpoint_damage(path)) is None:
            return str(path)
        aside = path.with_name(DAMAGED_PREFIX + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        instead = complete[number + 1].name if number + 1 < len(complete) else None
        say(
            f"  {path} is damaged: {wrong}. It is now {aside.name}; "
            + (f"trying the one before it, {instead}" if instead else "there is no other, so the stage starts again")
        )
    return None
