"""The file of results: appended to as files are heard, continued by the same command after an interruption."""

import json
from datetime import UTC, datetime
from pathlib import Path

FIRST = b'{"file": '  # how every line begins


def when_changed(file: str) -> str | None:
    """When a file last changed, to the microsecond, UTC; None for a URL or a missing one."""
    try:
        return datetime.fromtimestamp(Path(file).stat().st_mtime, UTC).isoformat()
    except (OSError, ValueError):
        return None


class ResultFile:
    """Results as JSON lines at `path` (None: nowhere), each with the `settings` it was made with.

    `done`: files that have a result of the same settings and have not changed since; a file with an error is not done
    and is tried again. A last line that an interruption cut short is dropped. A context manager. Raises ValueError for
    a file that is something else, which is left alone.
    """

    def __init__(self, path: Path | None, settings: dict):
        self.path, self.settings = path, settings
        self.done: set[str] = set()
        self._known: set[bytes] = set()
        self._stream = None
        if path is None:
            return
        whole = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab")
        self._stream.truncate(whole)

    def _read(self) -> int:
        """Notes what the file holds; returns the number of bytes that are whole lines."""
        size = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []):
            if not line.endswith(b"\n") and (line.startswith(FIRST) or FIRST.startswith(line)):
                break
            try:
                result = json.loads(line)
                file = result["file"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}: line {number + 1} is no result of audiophi, so it is left alone"
                ) from None
            self._known.add(line)
            if "error" not in result and self._is_of(result, file):
                self.done.add(file)
            size += len(line)
        return size

    def _is_of(self, result: dict, file: str) -> bool:
        """Whether a result was made with these settings, of the file as it is now."""
        same = all(result.get(name) == value for name, value in self.settings.items())
        return same and result.get("changed") == when_changed(file)

    def add(self, result: dict) -> None:
        """Append one result, on disk at once; an error that the file holds already is not repeated."""
        if self._stream is None:
            return
        line = (
            json.dumps({**result, **self.settings, "changed": when_changed(result["file"])}, ensure_ascii=False) + "\n"
        )
        line = line.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8
        if line not in self._known:
            self._stream.write(line)
            self._stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._stream is not None:
            self._stream.close()
