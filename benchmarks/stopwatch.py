"""Where time goes: functions are replaced by ones that know how long they took, without what they called."""

import time
from collections.abc import Callable
from contextlib import contextmanager


class Stopwatch:
    """Seconds by label; of nested watched calls, each second counts once, for the innermost one.

        with Stopwatch("rest") as watch:
            watch.over(model, "encode", "encoder")
            ...
        watch.seconds  # {"encoder": 1.2, "rest": 0.3}

    Leaving the `with` block takes the replacements back.
    """

    def __init__(self, rest: str = "rest"):
        self.seconds: dict[str, float] = {}
        self._rest, self._stack, self._since, self._undo = rest, [], 0.0, []

    def __enter__(self):
        self._enter(self._rest)
        return self

    def __exit__(self, *error):
        self._leave()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def over(self, owner, name: str, label: str | Callable, whole: bool = False) -> None:
        """Watches `owner.name`, an object's or a class's function. `label` may be a function of the call's arguments;
        `whole`: what it calls counts for it too."""
        function, own = getattr(owner, name), name in vars(owner)

        def timed(*args, **kwargs):
            with self.part(label if isinstance(label, str) else label(*args, **kwargs), whole):
                return function(*args, **kwargs)

        setattr(owner, name, timed)
        self._undo.append((lambda: setattr(owner, name, function)) if own else lambda: delattr(owner, name))

    @contextmanager
    def part(self, label: str, whole: bool = False):
        """The `with` block counts for `label`."""
        covered = bool(self._stack) and self._stack[-1][1]
        if not covered:
            self._enter(label, whole)
        try:
            yield
        finally:
            if not covered:
                self._leave()

    def lap(self, label: str) -> None:
        """What has passed since the last change counts for `label` (the parts of a backward pass, which calls
        nobody)."""
        self._count(label)

    def _count(self, label: str) -> None:
        now = time.perf_counter()
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._since
        self._since = now

    def _enter(self, label: str, whole: bool = False) -> None:
        if self._stack:
            self._count(self._stack[-1][0])
        self._since = time.perf_counter()
        self._stack.append((label, whole))

    def _leave(self) -> None:
        self._count(self._stack.pop()[0])
