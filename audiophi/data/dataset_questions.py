"""Benchmarks of questions about audio, as released; each is a `Release` in dataset_registry.py.

    MMAU test-mini (Sakshi et al. 2024, github.com/Sakshi113/MMAU)
        mmau-test-mini.json            [{id, audio_id, question, choices, answer, task, ...}, ...]
    AIR-Bench, foundation (Yang et al. 2024, github.com/OFA-Sys/AIR-Bench)
        Foundation_meta.json           [{path, question, choice_a ... choice_d, answer_gt, task_name, dataset_name,
        TASK_DATASET/path              uniq_id}, ...]
    Clotho-AQA (Lipping et al. 2022, zenodo.org/records/6473207)
        clotho_aqa_{train,val,test}.csv   file_name, QuestionText, answer, confidence: three annotators, three lines
        audio_files/
    VoiceBench (Chen et al. 2024, github.com/MatthewCYM/VoiceBench)
        *.parquet or *.jsonl           prompt (what is said in `audio`, the only question), reference or output
    Speech-IFEval (Lu et al. 2025, github.com/kehanlu/Speech-IFEval)
        speech-ifeval-v1.jsonl         audio_filepath, transcription, instruction, prompt, input, target, question_type
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from .dataset_files import audio_files, csv_columns, manifest_rows, read_csv
from .example import AUDIO

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Release:
    """One benchmark. find: path -> its files, by split; read: (file, split, folder of the audio) -> rows."""

    find: Callable[[Path], dict[str, Path]]
    read: Callable[[Path, str, Path], Iterator[dict]]

    MISSING_AUDIO_IS_NORMAL = False  # no field: without annotation

    def matches(self, path: Path) -> bool:
        """Whether a path holds this benchmark: one of its files, or a folder of them."""
        return bool(self.find(path))

    def rows(self, path: Path, split: str | None = None, audio_folder: Path | None = None) -> Iterator[dict]:
        """One row per question: audio (absolute path), question or messages, answer (one or several), choices, metric,
        kind, transcript, id. Raises ValueError for a split that is not there."""
        files = self.find(path)
        if split is not None and split not in files:
            raise ValueError(f"{path}: has no split {split!r}; here: {', '.join(sorted(files))}.")
        for name, file in sorted(files.items()):
            if split in (None, name):
                yield from self.read(file, name, audio_folder or file.parent)


def _files(path: Path, pattern: str, fits: Callable[[Path], bool]) -> dict[str, Path]:
    found = [path] if path.is_file() else [*path.glob(pattern), *path.glob(f"*/{pattern}")]
    return {file.stem: file for file in reversed(found) if file.match(pattern) and fits(file)}


def _rows(file: Path) -> Iterator[dict]:
    """Rows of a JSON, JSONL or Parquet file."""
    if file.suffix != ".parquet":
        yield from manifest_rows(file)
        return
    for batch in pq.ParquetFile(file).iter_batches(64):
        yield from batch.to_pylist()


def _first(file: Path) -> dict:
    """The first row of a file; {} for one that cannot be read."""
    try:
        return next(_rows(file), {})
    except (ValueError, OSError):
        return {}


# ---- MMAU ----------------------------------------------------------------------------------------------------------


def _find_mmau(path: Path) -> dict[str, Path]:
    return _files(path, "*.json", lambda file: {"audio_id", "choices", "question"} <= _first(file).keys())


def _read_mmau(file: Path, split: str, folder: Path) -> Iterator[dict]:
    for row in manifest_rows(file):
        yield {
            "audio": str(folder / row["audio_id"]), "question": row["question"], "choices": row["choices"],
            "answer": row.get("answer"), "metric": "choice", "kind": row.get("task"), "id": row["id"],
        }  # fmt: skip


# ---- AIR-Bench -----------------------------------------------------------------------------------------------------


def _find_air(path: Path) -> dict[str, Path]:
    return _files(path, "Foundation_meta.json", lambda file: {"choice_a", "answer_gt"} <= _first(file).keys())


def _read_air(file: Path, split: str, folder: Path) -> Iterator[dict]:
    for row in manifest_rows(file):
        choices = [row[key] for letter in LETTERS if row.get(key := f"choice_{letter.lower()}")]
        right = row["answer_gt"]
        place = folder / f"{row['task_name']}_{row['dataset_name']}" / row["path"]
        yield {
            "audio": str(place), "question": row["question"], "choices": choices, "answer": right, "metric": "choice",
            "kind": row["task_name"], "id": str(row["uniq_id"]),
        }  # fmt: skip


# ---- Clotho-AQA ----------------------------------------------------------------------------------------------------


def _find_clotho_aqa(path: Path) -> dict[str, Path]:
    columns = {"file_name", "QuestionText", "answer"}
    found = _files(path, "clotho_aqa_*.csv", lambda file: columns <= set(csv_columns(file)))
    return {name.removeprefix("clotho_aqa_"): file for name, file in found.items()}


def _read_clotho_aqa(file: Path, split: str, folder: Path) -> Iterator[dict]:
    found = {clip.name: clip for clip in audio_files(folder)}
    questions: dict[tuple[str, str], list[str]] = {}
    for row in read_csv(file):
        asked = (row["file_name"].strip(), row["QuestionText"].strip())
        questions.setdefault(asked, []).append(row["answer"].strip())
    for (name, question), answers in questions.items():
        told = Counter(answer.lower() for answer in answers)
        binary = set(told) <= {"yes", "no"}
        # Of three annotators the majority, as the paper's accuracy has it for yes and no; of words any of them.
        right = [told.most_common(1)[0][0]] if binary else list(told)
        yield {
            "audio": str(found.get(name, folder / "audio_files" / name)), "question": question, "answer": right,
            "metric": "yes_no" if binary else "exact", "kind": "yes or no" if binary else "one word",
            "id": f"{name}: {question}", "split": split,
        }  # fmt: skip


# ---- VoiceBench ----------------------------------------------------------------------------------------------------


def _find_voicebench(path: Path) -> dict[str, Path]:
    def fits(file: Path) -> bool:
        first = _first(file)
        return {"prompt", "audio"} <= first.keys() and bool({"reference", "output"} & first.keys())

    return {**_files(path, "*.jsonl", fits), **_files(path, "*.parquet", fits)}


def _read_voicebench(file: Path, split: str, folder: Path) -> Iterator[dict]:
    """The question is spoken: the user's turn is the clip alone."""
    for number, row in enumerate(_rows(file)):
        right = row.get("reference", row.get("output"))
        letter = isinstance(right, str) and re.fullmatch("[A-D]", right.strip()) is not None
        audio = row["audio"]
        if isinstance(audio, str):
            audio = str(folder / audio)
        yield {
            "audio": audio, "messages": [{"role": "user", "content": [AUDIO]}], "answer": right,
            "choices": list("ABCD") if letter else None, "metric": "choice" if letter else "contains",
            "kind": file.stem, "transcript": row["prompt"], "id": str(row.get("id", number)),
        }  # fmt: skip


# ---- Speech-IFEval -------------------------------------------------------------------------------------------------


def _find_speech_ifeval(path: Path) -> dict[str, Path]:
    columns = {"audio_filepath", "input", "instruction", "target", "question_type"}
    return _files(path, "*.jsonl", lambda file: columns <= _first(file).keys())


def _read_speech_ifeval(file: Path, split: str, folder: Path) -> Iterator[dict]:
    """The form is a rule of each row's own, which is not scored here: whether the right word is in the answer is."""
    for number, row in enumerate(manifest_rows(file)):
        kind = re.sub(r"[-_]?\d+$", "", str(row["question_type"]))
        yield {
            "audio": str(folder / row["audio_filepath"]), "question": row["input"], "answer": str(row["target"]),
            "metric": "contains", "kind": kind or "form", "transcript": row.get("transcription"), "id": str(number),
            "seconds": row.get("duration"),
        }  # fmt: skip


MMAU = Release(_find_mmau, _read_mmau)
AIR_BENCH = Release(_find_air, _read_air)
CLOTHO_AQA = Release(_find_clotho_aqa, _read_clotho_aqa)
VOICEBENCH = Release(_find_voicebench, _read_voicebench)
SPEECH_IFEVAL = Release(_find_speech_ifeval, _read_speech_ifeval)
