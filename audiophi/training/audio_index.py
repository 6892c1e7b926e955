"""What is known of audio files without opening them: how long they are, and the hash of their content."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from .feature_cache import hash_audio


class Known(NamedTuple):
    """Of a file of `size` bytes that was last changed at `mtime` (ns): `seconds`, `hash`, None where nobody asked."""

    size: int
    mtime: int
    seconds: float | None = None
    hash: str | None = None


class AudioIndex:
    """The files of one source, by their paths. A file that was changed is read again, and a damaged index is made anew.

    Kept in `<cache_dir>/audio_index/<source>/`, JSON Lines; each process adds files of its own, so that several can.

    Args:
        cache_dir: None keeps nothing. together: whether all processes of a run have this index and call `share`
            equally often.
    """

    def __init__(self, cache_dir: str | Path | None, source: str, together: bool = True):
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        self.folder = None if cache_dir is None else Path(cache_dir) / "audio_index" / name
        self.together = together
        self._known: dict[str, Known] = {}
        self._new: set[str] = set()
        self._read: set[str] = set()
        self._refresh()

    def seconds(self, path: str, measure: Callable[[], float]) -> float:
        """Length of a file; `measure` says that of one that is not known."""
        known = self._of(path)
        if known.seconds is None:
            known = self._add(path, known._replace(seconds=measure()))
        return known.seconds

    def hash(self, path: str) -> str:
        """`hash_audio` of a file, with its errors."""
        known = self._of(path)
        if known.hash is None:
            known = self._add(path, known._replace(hash=hash_audio(path)))
        return known.hash

    def share(self) -> None:
        """Saves what is new, and waits for what the other processes found."""
        if self._new and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{uuid.uuid4().hex}.jsonl"
            partial = file.with_suffix(".partial")
            # A file's name need not be UTF-8; JSON escapes what is not ASCII.
            partial.write_text("".join(json.dumps([path, *self._known[path]]) + "\n" for path in sorted(self._new)))
            os.replace(partial, file)
            self._read.add(file.name)
            self._new.clear()
        if self.together:
            PartialState().wait_for_everyone()
        self._refresh()

    def _refresh(self) -> None:
        for file in sorted(self.folder.glob("*.jsonl")) if self.folder is not None else ():
            if file.name in self._read:
                continue
            self._read.add(file.name)
            try:
                for line in file.read_text().splitlines():
                    path, *values = json.loads(line)
                    known, before = Known(*values), self._known.get(path, Known(0, 0))
                    if before[:2] == known[:2]:  # one file tells its length, another one its hash
                        known = known._replace(seconds=known.seconds or before.seconds, hash=known.hash or before.hash)
                    if known.mtime >= before.mtime:
                        self._known[path] = known
            except (OSError, ValueError, TypeError):
                continue  # only costs the time to read the audio

    def _of(self, path: str) -> Known:
        """What is known of a file as it is now; nothing of what is no file here."""
        try:
            stat = os.stat(path)
        except (OSError, ValueError):  # gone, a URL, a NUL in its name: whoever opens it tells more
            return Known(0, 0)
        known = self._known.get(path)
        now = (stat.st_size, stat.st_mtime_ns)
        return known if known is not None and known[:2] == now else Known(*now)

    def _add(self, path: str, known: Known) -> Known:
        if known.mtime:
            self._known[path] = known
            self._new.add(path)
        return known
