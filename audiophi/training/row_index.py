"""What the rows of a source tell, made once and kept on disk: to make an example of each at every start would take
minutes of large data."""

import hashlib
from collections.abc import Iterator

from audiophi.data.datasets import Examples
from audiophi.data.example import RowError

from .kept import code_hash, kept
from .row_facts import Facts, facts_of, questions_of

PART = 5000  # rows in one file


class RowIndex:
    """The `Facts` of all rows of `table`, in their order.

    Kept in `<cache_dir>/row_index/<key>/`, one file for so many rows, each with the first question of each kind. The
    key covers what they follow from: the source's rows, its specification, the code. Files that rows name are not read.

    Args:
        cache_dir: None keeps nothing. text_case: see `normalise_transcript`.
    """

    def __init__(self, cache_dir: str | None, table: Examples, text_case: str):
        self.cache_dir, self.table, self.text_case = cache_dir, table, text_case
        made_of = None if cache_dir is None else table.made_of()
        told = f"{made_of} {text_case} {code_hash()}"
        self._folder = made_of and f"row_index/{hashlib.sha256(told.encode()).hexdigest()[:32]}"

    def make(self, part: slice) -> None:
        """Sees to a part of it, for processes that do this together."""
        if self._folder:
            for start in self._starts()[part]:
                self._part(start)

    def parts(self) -> Iterator[tuple[list[Facts], list]]:
        """(facts of some rows, (task, kind, question) as `questions_of` has them), part by part."""
        for start in self._starts():
            rows, questions = self._part(start)
            yield [Facts(*row) for row in rows], questions

    def _starts(self) -> range:
        return range(0, len(self.table), PART)

    def _part(self, start: int) -> list:
        name = self._folder and f"{self._folder}/{start}"
        return kept(self.cache_dir, name, lambda: self._made(start))

    def _made(self, start: int) -> list:
        rows, questions = [], {}
        for index in range(start, min(start + PART, len(self.table))):
            try:
                example = self.table[index]
            except RowError as error:
                rows.append(Facts(error.id or f"row {index + 1}", str(error)))
                continue
            rows.append(facts_of(example, self.text_case))
            if rows[-1].reason is None:
                for *about, wording in questions_of(example):
                    questions.setdefault(tuple(about), wording)
        return [rows, [[*about, wording] for about, wording in questions.items()]]
