"""The list of rows that cannot be used, and when there are too many of them."""

import json
from pathlib import Path

from accelerate import PartialState


class TooManyBadRows(ValueError):
    """More rows than `data.max_bad_rows` allows cannot be used; the message names the list."""


class BadRows:
    """Counts unusable rows, known by source and number, and lists them in a JSONL file: id, source, row, reason.

    Args:
        path: the list; emptied here by the main process. max_share: of `total` rows (set `total` when it is known).
    """

    def __init__(self, path: Path, max_share: float):
        self.path, self.max_share, self.total = Path(path), max_share, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if PartialState().is_main_process:
            self.path.write_text("")
        self.reasons: dict[tuple[str, int], str] = {}
        self._listed, self._read = set(), 0  # lines of the list, also those of other processes; bytes of it read
        self.expected: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self.reasons) - len(self.expected)

    def add(self, source: str, number: int, row_id: str, reason: str, expected: bool = False) -> None:
        """Records a row once; raises TooManyBadRows when the share is exceeded. `expected` rows, as the missing files
        of a set that nobody has all of, are listed but not counted."""
        if (source, number) in self.reasons:
            return
        self.reasons[source, number] = reason
        if expected:
            self.expected.add((source, number))
        told = {"id": row_id, "source": source, "row": number, "reason": reason}
        line = json.dumps(told, ensure_ascii=False)
        line = line.encode("utf-8", "backslashreplace") + b"\n"  # a file's name need not be UTF-8
        with open(self.path, "a+b") as file:
            # Other processes and data loader workers write to the same list: what is new in it is read.
            file.seek(self._read)
            for written in file:
                if not written.endswith(b"\n"):
                    break
                self._listed.add(written)
                self._read += len(written)
            if line not in self._listed:
                file.write(line)
        if not expected and self.total and len(self) > self.max_share * self.total:
            raise TooManyBadRows(
                f"{len(self)} of {self.total} rows cannot be used, more than data.max_bad_rows = {self.max_share:g} "
                f"allows. They are listed with the reasons in {self.path}; the last: {row_id}: {reason}"
            )
