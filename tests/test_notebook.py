"""docs/audiophi.ipynb, run cell by cell: quickly on tiny components, and as it stands (slow)."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from tests.tiny_runs import ENVIRONMENT, TEXTS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "audiophi.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run_notebook(folder: Path, threads: int, **parameters) -> tuple[dict, dict]:
    """Runs the code cells in order as a kernel in docs/ would, with other parameters; (metrics before, after)."""
    assert [cell["metadata"].get("tags") for cell in CODE].index(["parameters"]) == 0
    cells = ["".join(cell["source"]) for cell in CODE]
    cells.insert(1, "\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    program = folder / "notebook.py"
    program.write_text("\n\n".join(cells), encoding="utf-8")
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, program], cwd=ROOT / "docs", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = Path(parameters["OUT"])
    return tuple(json.loads((out / name / "metrics.json").read_text()) for name in ("before", "after"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, waveform):
    """Folder with the splits train (12 clips) and dev (4) in Parquet, as data/synthetic_speech has them."""
    folder = tmp_path_factory.mktemp("parquet")
    for split, count in (("train", 12), ("dev", 4)):
        rows = []
        for number in range(count):
            sound = io.BytesIO()
            sf.write(sound, waveform(0.8 + 0.1 * number, number), 16_000, format="FLAC")
            audio = {"bytes": sound.getvalue(), "path": f"{number}.flac"}
            rows.append({"audio": audio, "text": TEXTS[number % len(TEXTS)], "speaker": "s", "seconds": 1.0})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000.parquet")
    return folder


def test_the_notebook_runs(tmp_path, parquet, checkpoint, tiny_whisper_dir, tiny_llm_dir):
    components = {"audio": tiny_whisper_dir, "text": tiny_llm_dir}
    before, after = run_notebook(
        tmp_path, 1, MODEL=checkpoint, COMPONENTS=components, SPEECH=str(parquet), OUT=str(tmp_path / "out"),
        CLIPS=8, TESTED=3, STEPS=3, MINUTES=1,
    )  # fmt: skip
    assert before["rows"] == after["rows"] == 3 and before["checkpoint"] != after["checkpoint"]
    questions = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(questions) == 8 and all(q["answer"] == q["transcript"].split()[1] for q in questions)
    asked = {json.loads(line)["instruction"] for line in (tmp_path / "out" / "dev.jsonl").read_text().splitlines()}
    assert not asked & {q["instruction"] for q in questions}


@pytest.mark.slow
def test_the_released_model_learns_from_the_notebook(tmp_path):
    before, after = run_notebook(tmp_path, 2, OUT=str(tmp_path / "out"))
    assert after["accuracy"] >= before["accuracy"] + 20
    assert after["accuracy"] >= after["accuracy_shuffled_audio"] + 20
