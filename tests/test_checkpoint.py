"""The checkpoint in the repository, with the real components: it must go on loading and listening."""

from pathlib import Path

import pytest

from evaluation.scoring import AudioPhiTranscriber, summarize, transcribe_dataset
from processing.datasets import load_audio_dataset

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "audiophi-tiny"


def test_it_is_slim_and_small():
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.slow
def test_it_listens():
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    model = AudioPhiForConditionalGeneration.from_pretrained(CHECKPOINT).float().eval()
    processor = AudioPhiProcessor.from_pretrained(CHECKPOINT)
    rows = load_audio_dataset(str(ROOT / "data" / "synthetic_speech"), split="dev").take(24)
    scores = summarize(transcribe_dataset(rows, AudioPhiTranscriber(model, processor, max_new_tokens=100), 12))
    assert scores["listening_gap"] > 50 and scores["never_stopped"] <= 5
