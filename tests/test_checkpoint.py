"""The checkpoints in the repository, with the real components: they must go on loading and listening."""

from pathlib import Path

import pytest

from audiophi.data.datasets import load_examples
from audiophi.evaluation.loop import Listener, predict
from audiophi.evaluation.transcripts import summarize
from audiophi.tasks import TASKS
from modeling_audiophi.engine_audiophi import Engine

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "audiophi-tiny"


def test_it_is_slim_and_small():
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file() and not file.is_symlink()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.slow
def test_the_speech_model_listens():
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    model = AudioPhiForConditionalGeneration.from_pretrained(CHECKPOINT).float().eval()
    processor = AudioPhiProcessor.from_pretrained(CHECKPOINT)
    rows = load_examples(str(ROOT / "data" / "synthetic_speech"), split="dev").take(24)
    task = TASKS["transcribe"]
    hear = Listener(Engine(model, processor), task, with_alignment=True, max_new_tokens=100)
    scores = summarize([*predict(rows, hear, task, 12)])
    assert scores["listening_gap"] > 50 and scores["never_stopped"] <= 5
