"""eval.py, on a tiny checkpoint and generated audio."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
from transformers import pipeline

from audiophi.cli import eval as eval_script
from audiophi.data.datasets import load_examples
from audiophi.data.example import Clip, Example
from audiophi.evaluation.conditions import complete, silence
from audiophi.evaluation.loop import Listener, Progress, predict
from audiophi.evaluation.predictions import PredictionFile, fingerprint
from audiophi.publishing.data_sources import About
from audiophi.publishing.licences import HubAnswers
from audiophi.publishing.results import check_metrics, results_section
from audiophi.tasks import TASKS
from modeling_audiophi.engine_audiophi import Engine

TASK = TASKS["transcribe"]

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
    assert "listening gap" in printed and printed.count("right:") == 2 and "red green blue" in printed


def test_a_language_without_spaces_is_scored_by_characters(checkpoint, corpus, tmp_path, capsys):
    rows = [
        {**row, "text": text} for row, text in zip(read_metadata(corpus), ["你好，世界", "今天", "天气"], strict=False)
    ]
    write_metadata(corpus, rows)
    assert run_eval(checkpoint, corpus, tmp_path / "out", "--language", "zh-CN") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["main_score"] == "cer" and metrics["characters"] == 8 and "wer" not in metrics
    assert metrics["settings"]["language"] == "zh-CN" and "BasicTextNormalizer" in metrics["normalizer"]
    assert "CER %" in (printed := capsys.readouterr().out) and "WER" not in printed
    section = results_section(metrics, check_metrics(metrics, "m", checkpoint), "tiny", About(), HubAnswers())
    assert "character error rate, %" in section and "word error" not in section and "8 characters" in section
    assert "--language zh-CN" in section
    write_metadata(corpus, [{**row, "language": "zh"} for row in rows])
    assert run_eval(checkpoint, corpus, tmp_path / "column") == 0
    assert json.loads((tmp_path / "column" / "metrics.json").read_text())["main_score"] == "cer"
    assert run_eval(checkpoint, corpus, tmp_path / "wrong", "--language", "Kauderwelsch") == 1
    assert "Kauderwelsch" in capsys.readouterr().err


def test_unreadable_rows_are_counted_and_do_not_fail(checkpoint, corpus, tmp_path):
    (corpus / "noise.wav").write_bytes(b"this is not audio")
    rows = read_metadata(corpus)
    write_metadata(corpus, [*rows, {**rows[0], "audio": "noise.wav"}, {**rows[0], "text": " ", "id": "mute"}])
    assert run_eval(checkpoint, corpus, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["utterances"] == 5 and metrics["unreadable_rows"] == 2


def test_a_readable_row_that_the_model_cannot_take_fails_the_run(checkpoint, corpus, tmp_path, capsys):
    """75 s in one piece, as for a question, are more audio tokens than the tiny LLM's context of 512 holds; the other
    rows are scored all the same."""
    sf.write(corpus / "long.wav", np.zeros(75 * 16_000, dtype=np.float32) + 0.01, 16_000)
    write_metadata(corpus, [{"audio": "long.wav", "text": "long", "id": "long"}, *read_metadata(corpus)])
    assert run_eval(checkpoint, corpus, tmp_path / "out", "--instruction", "What do you hear?") == 1
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


def test_only_the_conditions_that_are_named_are_asked(checkpoint, corpus, tmp_path, capsys):
    assert run_eval(checkpoint, corpus, tmp_path / "out", "--conditions") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["wer"] is not None and metrics["wer_silence"] is None
    assert not (tmp_path / "out" / "predictions_silence.jsonl").exists()
    with pytest.raises(SystemExit):
        run_eval(checkpoint, corpus, tmp_path / "out", "--conditions", "silence", "text")
    assert "--conditions text" in capsys.readouterr().err


def test_an_interrupted_evaluation_continues(checkpoint, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_eval(checkpoint, corpus, out) == 0
    complete = json.loads((out / "metrics.json").read_text())
    # As a kill in the middle leaves it: no metrics, two whole predictions and a part of the third.
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:20])
    (out / "metrics.json").unlink()
    seen = []
    original = eval_script.predict

    def spy(rows, hear, task, batch_size, sampling_rate, done, progress):
        if len(rows) == 5:  # not the silences
            seen.extend(done)
        return original(rows, hear, task, batch_size, sampling_rate, done, progress)

    monkeypatch.setattr(eval_script, "predict", spy)
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


def listener(made, **settings):
    return Listener(Engine(*made), TASK, with_alignment=True, **settings)


def test_transcripts_do_not_depend_on_the_batch(make_tiny_model, corpus):
    listen = listener(make_tiny_model(adapter="conv_mlp", readout="collapse"), max_new_tokens=6)
    rows = load_examples(str(corpus))
    alone, together = (
        {p["row"]: (p["hypothesis"], p["hypothesis_align"]) for p in predict(rows, listen, TASK, size)}
        for size in (1, 5)
    )
    assert alone == together
    assert len(set(alone.values())) > 1


def test_shuffled_audio_equals_decoding_the_other_clip(make_tiny_model, corpus):
    """The shortcut behind wer_shuffled_audio: with one instruction for all, only the audio decides what is heard."""
    listen = listener(make_tiny_model(adapter="mlp"), max_new_tokens=5)
    rows = load_examples(str(corpus))
    heard = {p["row"]: p["hypothesis"] for p in predict(rows, listen, TASK)}
    swapped = {index: replace(rows[index], clips=rows[(index + 1) % 5].clips) for index in range(5)}
    for p in predict(swapped, listen, TASK):
        assert p["hypothesis"] == heard[(p["row"] + 1) % 5]


def test_the_encoder_runs_once_for_both_readings(make_tiny_model, corpus, monkeypatch):
    model, processor = make_tiny_model(adapter="mlp")
    listen, calls = listener((model, processor), max_new_tokens=3), []
    original = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    (p,) = predict({0: load_examples(str(corpus))[0]}, listen, TASK)
    assert p["hypothesis"] is not None and p["hypothesis_align"] is not None and calls == [1]


def test_a_recording_longer_than_the_window_is_cut_as_by_the_pipeline(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter="conv_mlp", readout="collapse")
    pipe = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    long, short = waveform(1.7 * pipe.window_seconds), waveform(0.5, 1)
    example = Example("transcribe", 0, "a", "x", (Clip(None),))
    told = listener((model, processor), max_new_tokens=5)([(example, [long]), (example, [short])])
    heard = pipe([(long, 16_000), (short, 16_000)], task="transcribe", max_new_tokens=5, do_sample=False)
    assert [result["hypothesis"] for result in told] == [result["generated_text"] for result in heard]
    whole = pipe((long, 16_000), task="transcribe", max_new_tokens=5, do_sample=False, chunk_length_s=0)
    assert whole["generated_text"] != told[0]["hypothesis"]
    assert told[0]["hypothesis_align"].strip() and told[0]["stopped"] in (True, False)


def test_what_is_asked_of_all_rows(make_tiny_model, corpus):
    model, processor = make_tiny_model(adapter="mlp")
    example, clip = load_examples(str(corpus))[0], np.zeros(8_000, dtype=np.float32)
    for instruction in (None, "Say it in French."):
        chat = Listener(Engine(model, processor), TASK, instruction).prompt(example, [clip])
        assert chat[-1]["content"][-1]["text"] == (instruction or "Transcribe the speech.")


def test_training_mode_is_restored(make_tiny_model, waveform):
    model, processor = make_tiny_model(adapter="mlp")
    model.train()
    listener((model, processor), max_new_tokens=2)(
        [(Example("transcribe", 0, "a", "x", (Clip(None),)), [waveform(0.5)])]
    )
    assert model.training


def test_silence_is_decoded_once_per_length():
    seconds, calls = [1.1, 1.3, 1.5, 0.2], []
    rows = [
        Example("transcribe", n, f"id{n}", "x", (Clip({"path": f"{n}.wav"}),), references=("red",)) for n in range(4)
    ]
    own = [{"row": n, "clip_seconds": [value]} for n, value in enumerate(seconds)]

    def hear(batch):
        calls.extend(len(clip) for _, (clip,) in batch)
        assert not any(clip.any() for _, (clip,) in batch)
        return [{"hypothesis": str(len(c)), "hypothesis_align": None, "stopped": True} for _, (c,) in batch]

    plan = silence(rows, own, TASK, 16_000)
    asked = list(predict(plan, hear, TASK))
    heard = {p["row"]: p["hypothesis"] for p in complete(plan, asked, own, rows, TASK)}
    assert sorted(calls) == [8_000, 24_000] and heard == {0: "24000", 1: "24000", 2: "24000", 3: "8000"}


def test_the_time_to_go_is_by_the_audio_done(monkeypatch):
    progress = Progress(10, began=0.0)
    monkeypatch.setattr("time.monotonic", lambda: 20.0)
    assert np.isnan(progress.eta())
    progress.read_rows, progress.read_seconds, progress.done_rows, progress.done_seconds = 5, 50.0, 1, 20.0
    assert progress.eta() == 80.0  # 30 s read and not done, 50 s not read, a second of audio a second


def test_own_scores_are_there_before_a_baseline_starts(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    out, at_start = tmp_path / "out", []

    class Recogniser:
        sampling_rate = 16_000

        def __init__(self, *_):
            at_start.append((json.loads((out / "metrics.json").read_text()), capsys.readouterr().out))
            if len(at_start) == 1:
                raise ValueError("no such recogniser")

        def __call__(self, rows):
            return [{"hypothesis": e.reference, "hypothesis_align": None, "stopped": None} for e, _ in rows]

    monkeypatch.setattr("audiophi.evaluation.baseline.BaselineListener", Recogniser)
    assert run_eval(checkpoint, corpus, out, "--baseline", "some/recogniser") == 1
    metrics, printed = at_start[0]
    assert METRICS <= set(metrics) and metrics["unfinished"] == ["baseline"] and "listening gap" in printed
    before = (out / "predictions.jsonl").read_bytes()
    capsys.readouterr()
    assert run_eval(checkpoint, corpus, out, "--baseline", "some/recogniser") == 0  # goes on where it stopped
    assert "5 of 5 rows are already" in at_start[1][1]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["baseline"]["wer"] == 0 and "unfinished" not in metrics
    assert (out / "predictions.jsonl").read_bytes() == before  # compute times, too: nothing was asked again


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
