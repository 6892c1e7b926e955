"""eval.py, on a tiny checkpoint and generated audio."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile as sf
import torch

from audiophi.cli import eval as eval_script
from audiophi.data.datasets import load_audio_dataset
from audiophi.evaluation.predictions import PredictionFile, fingerprint
from audiophi.evaluation.scoring import AudioPhiTranscriber, transcribe_dataset, transcribe_silence

METRICS = {
    "wer", "wer_ci95", "cer", "substitutions", "deletions", "insertions", "words", "utterances", "normalizer",
    "wer_align", "wer_shuffled_audio", "wer_silence", "listening_gap", "never_stopped", "empty", "rtf",
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path, waveform):
    """A folder with metadata.jsonl: five clips of 0.3 to 1.1 s."""
    texts = ["red green blue", "yellow", "white black red", "blue blue", "green"]
    rows = []
    for index, text in enumerate(texts):
        name = f"clip{index}.wav"
        sf.write(tmp_path / name, waveform(0.3 + 0.2 * index, seed=index), 16_000)
        rows.append({"audio": name, "text": text, "id": f"utt-{index}"})
    write_metadata(tmp_path, rows)
    return tmp_path


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metadata(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def run_eval(checkpoint, data, out, *more):
    arguments = ["--model", checkpoint, "--data", str(data), "--output_dir", str(out), "--max_new_tokens", "5"]
    return eval_script.main([*arguments, "--batch_size", "2", "--device", "cpu", *more])


def test_metrics_and_predictions(checkpoint, corpus, tmp_path, capsys):
    assert run_eval(checkpoint, corpus, tmp_path / "out", "--show", "2") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert METRICS <= set(metrics)
    assert metrics["utterances"] == 5 and metrics["words"] == 10
    assert metrics["listening_gap"] == pytest.approx(metrics["wer_shuffled_audio"] - metrics["wer"])
    assert metrics["wer_align"] is not None and metrics["wer_silence"] is not None
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {p["id"] for p in predictions} == {f"utt-{i}" for i in range(5)}
    for p in predictions:
        assert p["reference"] and {"hypothesis", "substitutions", "deletions", "insertions", "seconds"} <= set(p)
    printed = capsys.readouterr().out
    assert "listening gap" in printed and printed.count("said:") == 2 and "red green blue" in printed


def test_unreadable_rows_are_counted_and_do_not_fail(checkpoint, corpus, tmp_path):
    (corpus / "noise.wav").write_bytes(b"this is not audio")
    rows = read_metadata(corpus)
    write_metadata(corpus, [*rows, {**rows[0], "audio": "noise.wav"}, {**rows[0], "text": " ", "id": "mute"}])
    assert run_eval(checkpoint, corpus, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["utterances"] == 5 and metrics["unreadable_rows"] == 2


def test_a_readable_row_that_the_model_cannot_take_fails_the_run(checkpoint, corpus, tmp_path, capsys):
    """75 s are more audio tokens than the tiny LLM's context of 512 holds; the other rows are scored all the same."""
    sf.write(corpus / "long.wav", np.zeros(75 * 16_000, dtype=np.float32) + 0.01, 16_000)
    write_metadata(corpus, [{"audio": "long.wav", "text": "long", "id": "long"}, *read_metadata(corpus)])
    assert run_eval(checkpoint, corpus, tmp_path / "out") == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["utterances"] == 5 and metrics["unscored_rows"] == 1
    assert "row 0 not scored" in capsys.readouterr().err


def test_bad_arguments_and_data(checkpoint, corpus, tmp_path, capsys):
    assert run_eval(checkpoint, tmp_path / "nowhere.jsonl", tmp_path / "out") == 1
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert run_eval(checkpoint, corpus, tmp_path / "out", "--text_column", "words") == 1
    assert "words" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_eval(checkpoint, corpus, tmp_path / "out", "--limit", "0")


def test_an_interrupted_evaluation_continues(checkpoint, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_eval(checkpoint, corpus, out) == 0
    complete = json.loads((out / "metrics.json").read_text())
    # As a kill in the middle leaves it: no metrics, two whole predictions and a part of the third.
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:20])
    (out / "metrics.json").unlink()
    seen = []
    original = eval_script.transcribe_dataset

    def spy(rows, transcribe, batch_size, sampling_rate, done):
        seen.extend(done)
        return original(rows, transcribe, batch_size, sampling_rate, done)

    monkeypatch.setattr(eval_script, "transcribe_dataset", spy)
    assert run_eval(checkpoint, corpus, out) == 0
    assert len(seen) == 2
    continued = json.loads((out / "metrics.json").read_text())
    assert {k: v for k, v in continued.items() if k != "rtf"} == {k: v for k, v in complete.items() if k != "rtf"}
    # A complete evaluation is not continued but made again.
    seen.clear()
    assert run_eval(checkpoint, corpus, out) == 0 and seen == []


def test_predictions_of_other_settings_are_not_kept(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionFile(path, {"limit": 1}) as file:
        file.add({"row": 0, "hypothesis": "line\u2028separator"})
    with PredictionFile(path, {"limit": 1}) as file:
        assert file.predictions == [{"row": 0, "hypothesis": "line\u2028separator"}]
    with PredictionFile(path, {"limit": 2}) as file:
        assert file.predictions == [] and path.read_bytes() == b""


def test_fingerprint_changes_with_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a")
    before = fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"ab")
    assert fingerprint(str(tmp_path)) != before


def test_transcripts_do_not_depend_on_the_batch(make_tiny_model, corpus):
    model, processor = make_tiny_model(adapter="conv_mlp", readout="collapse")
    transcribe = AudioPhiTranscriber(model, processor, max_new_tokens=6)
    rows = load_audio_dataset(str(corpus))
    alone, together = (
        {p["row"]: (p["hypothesis"], p["hypothesis_align"]) for p in transcribe_dataset(rows, transcribe, size)}
        for size in (1, 5)
    )
    assert alone == together
    assert len(set(alone.values())) > 1


def test_shuffled_audio_equals_decoding_the_other_clip(make_tiny_model, corpus):
    """The shortcut behind wer_shuffled_audio: with one instruction for all, only the audio decides what is heard."""
    model, processor = make_tiny_model(adapter="mlp")
    transcribe = AudioPhiTranscriber(model, processor, max_new_tokens=5)
    rows = load_audio_dataset(str(corpus))
    heard = {p["row"]: p["hypothesis"] for p in transcribe_dataset(rows, transcribe)}
    swapped = [{**rows[index], "audio": rows[(index + 1) % 5]["audio"]} for index in range(5)]
    for p in transcribe_dataset(swapped, transcribe):
        assert p["hypothesis"] == heard[(p["row"] + 1) % 5]


def test_stopping_is_noticed(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter="mlp")
    transcribe = AudioPhiTranscriber(model, processor, max_new_tokens=4)
    end = processor.end_token_id
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: greedy takes token 0, which ends nothing
    assert end != 0 and transcribe([waveform(0.5)])[0]["stopped"] is False
    transcribe.model.generate = lambda **inputs: torch.cat(
        [inputs["input_ids"], torch.full((1, 2), end, dtype=torch.long)], dim=1
    )
    result = transcribe([waveform(0.5)])[0]
    assert result["stopped"] is True and result["hypothesis"] == ""


def test_training_mode_is_restored(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter="mlp")
    model.train()
    AudioPhiTranscriber(model, processor, max_new_tokens=2)([waveform(0.5)])
    assert model.training


def test_silence_is_decoded_once_per_length(waveform):
    calls = []

    def transcribe(clips):
        calls.extend(len(clip) for clip in clips)
        assert not any(clip.any() for clip in clips)
        return [{"hypothesis": str(len(clip))} for clip in clips]

    heard = transcribe_silence([1.1, 1.3, 1.5, 0.2], transcribe)
    assert sorted(calls) == [8_000, 24_000] and heard == {0.5: "8000", 1.5: "24000"}


@pytest.mark.slow
def test_baseline_beside_the_model(checkpoint, tmp_path):
    """Whisper tiny.en with its own decoder hears synthetic speech that the untrained model does not."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    rows = []
    for index, text in enumerate(["the quick brown fox jumps over the lazy dog", "she walked along the river"]):
        subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(tmp_path / f"{index}.wav")], check=True)
        rows.append({"audio": f"{index}.wav", "text": text})
    write_metadata(tmp_path, rows)
    assert run_eval(checkpoint, tmp_path, tmp_path / "out", "--baseline", "openai/whisper-tiny.en") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["baseline"]["wer"] < 30 < metrics["wer"]
    assert metrics["baseline"]["normalizer"] == metrics["normalizer"]
