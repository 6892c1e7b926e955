"""Registry of tasks by name. To add one: a file with a class of `base.Task`'s interface, and its line here."""

import difflib
from collections.abc import Collection, Iterable

from .answer import Answer
from .base import Report, Row, Task
from .caption import Caption
from .choose import Choose
from .compare import Compare
from .mixed import Mixed
from .no_speech import NoSpeech
from .speaker import Speaker
from .transcribe import Transcribe
from .words import Words

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Transcribe(), Caption(), NoSpeech(), Answer(), Words(), Choose(), Speaker(), Compare(), Mixed())
}


def task_named(name: str) -> Task:
    """ValueError for a name that the registry lacks, with the nearest that it has."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
    raise ValueError(f"task {name!r} is not known; {hint}")


def default_task() -> Task:
    """What data and models are for where nothing says otherwise."""
    return min(TASKS.values(), key=lambda task: task.order)


def task_of_source(columns: Collection[str], instruction: str | None) -> Task:
    """The task of a source that does not name one, by the `Row` fields that its columns fill and the question that it
    asks with every row."""
    if instruction is not None:
        from processing.chat_audiophi import wording_key

        key = wording_key(instruction)
        for task in TASKS.values():
            if key in map(wording_key, (*task.wordings, *task.test_wordings)):
                return task
    claimed = [task for task in TASKS.values() if task.claims(columns, instruction)]
    return max(claimed, key=lambda task: task.order, default=default_task())


def wordings(name: str, given: dict[str, list[str]] | None = None) -> list[str]:
    """How a task is asked: as `given` says by task, else in its own words."""
    name = TASKS[name].asked_as or name
    return list((given or {}).get(name) or TASKS[name].wordings)


def saved_tasks(
    names: Iterable[str], given: dict[str, list[str]] | None = None, questions: Iterable[str] = ()
) -> dict[str, dict]:
    """`AudioPhiProcessor.tasks` of a model that was trained on these tasks. instructions: first the wordings of
    training, then others that mean the same; trained: those of training alone, for the task `answer` its `questions`,
    one of each kind."""
    known = {TASKS[name].asked_as or name for name in names}
    tasks = sorted((TASKS[name] for name in known), key=lambda task: task.order)
    return {
        task.name: {
            "instructions": list(dict.fromkeys([*wordings(task.name, given), *task.wordings, *task.test_wordings])),
            "trained": list(questions) if task.name == Answer.name else wordings(task.name, given),
            "in_pieces": task.in_pieces,
        }
        for task in tasks
    }


def decoding(names: Iterable[str], generation: dict) -> tuple[dict, dict[str, dict]]:
    """A recipe's `generation` as settings of all decoding and those by task: what stands under a task's name comes on
    top of the task's own."""
    common = {key: value for key, value in generation.items() if key not in TASKS}
    known = sorted({TASKS[name].asked_as or name for name in names})
    return common, {name: {**TASKS[name].decoding, **generation.get(name, {})} for name in known}


__all__ = [
    "TASKS",
    "Report",
    "Row",
    "Task",
    "decoding",
    "default_task",
    "saved_tasks",
    "task_named",
    "task_of_source",
    "wordings",
]
