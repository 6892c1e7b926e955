"""eval.py --task caption, on a tiny checkpoint and sounds in released layouts."""

import json

import pytest

from audiophi.cli import eval as eval_script
from tests.layouts import clotho_captions, tone, write_clotho, write_csv

SCORES = {
    *("cider_d", "cider_d_shuffled", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"),
    *("label_accuracy", "label_accuracy_shuffled", "listening_gap", "never_stopped", "empty", "rtf"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_tiny_model):
    model, processor = make_tiny_model(adapter="mlp", readout="frames", align=False)
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture
def esc50(tmp_path):
    rows = []
    for number, category in enumerate(("dog", "rain", "sea_waves", "dog", "rain")):
        name = f"1-{number}-A.wav"
        tone(tmp_path / "esc" / "audio" / name, number, 0.5 + 0.1 * number)
        rows.append({"filename": name, "fold": 1, "target": number, "category": category})
    write_csv(tmp_path / "esc" / "meta" / "esc50.csv", rows)
    return tmp_path / "esc"


def run_eval(checkpoint, data, out, *more, task="caption"):
    arguments = ["--task", task, "--model", checkpoint, "--data", str(data), "--output_dir", str(out)]
    return eval_script.main([*arguments, "--max_new_tokens", "5", "--batch_size", "2", "--device", "cpu", *more])


def read(out):
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [json.loads(line) for line in lines]


def test_classes_are_scored_by_label_accuracy(checkpoint, esc50, tmp_path, capsys):
    assert run_eval(checkpoint, esc50, tmp_path / "out", "--label_column", "category") == 0
    metrics, predictions = read(tmp_path / "out")
    assert metrics.keys() >= SCORES and metrics["clips"] == 5 and metrics["classes"] == 3
    assert metrics["listening_gap_of"] == "label_accuracy"
    assert metrics["settings"]["instruction"] == "Describe the sound."
    assert sorted(p["label"] for p in predictions) == ["dog", "dog", "rain", "rain", "sea waves"]
    assert all(len(p["references"]) == 7 and p["hypothesis_align"] is None for p in predictions)
    printed = capsys.readouterr().out
    assert "label accuracy %" in printed and "CIDEr-D" in printed and "WER" not in printed


def test_clotho_has_five_references(checkpoint, tmp_path):
    clotho = write_clotho(tmp_path / "clotho", ("evaluation",))
    assert run_eval(checkpoint, clotho, tmp_path / "out", "--split", "evaluation") == 0
    metrics, predictions = read(tmp_path / "out")
    assert metrics["references"] == 20 and metrics["label_accuracy"] is metrics["label_accuracy_shuffled"] is None
    assert metrics["listening_gap"] == pytest.approx(metrics["cider_d"] - metrics["cider_d_shuffled"])
    by_row = sorted(predictions, key=lambda p: p["row"])
    assert [p["references"] for p in by_row] == [clotho_captions(number) for number in range(4)]


def test_scores_are_of_the_predictions(checkpoint, esc50, tmp_path, monkeypatch):
    """A model that always hears the clip's class, and one that hears another: 100 and 0 %."""
    names = {8_000: "a dog", 9_600: "rain falls", 11_200: "the waves of the sea", 12_800: "a dog", 14_400: "rain"}

    class Knows:
        sampling_rate = 16_000

        def __call__(self, rows):
            heard = [names[len(clip)] for _, (clip,) in rows]
            return [{"hypothesis": words, "hypothesis_align": None, "stopped": True} for words in heard]

    monkeypatch.setattr(eval_script, "load_listener", lambda args: Knows())
    assert run_eval(checkpoint, esc50, tmp_path / "out") == 0
    metrics, _ = read(tmp_path / "out")
    assert (metrics["label_accuracy"], metrics["label_accuracy_shuffled"], metrics["listening_gap"]) == (100, 0, 100)
    assert metrics["cider_d"] > 10 * metrics["cider_d_shuffled"] and metrics["bleu_1"] > 0.5


def test_an_interrupted_evaluation_continues(checkpoint, esc50, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_eval(checkpoint, esc50, out) == 0
    complete, _ = read(out)
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:15])
    (out / "metrics.json").unlink()
    original, calls = eval_script.load_listener, []

    def counted(args):
        listen = original(args)
        return type("Spy", (), {
            "sampling_rate": listen.sampling_rate,
            "__call__": lambda self, rows: calls.extend(rows) or listen(rows),
        })()  # fmt: skip

    monkeypatch.setattr(eval_script, "load_listener", counted)
    assert run_eval(checkpoint, esc50, out) == 0
    assert len(calls) == 2
    continued, _ = read(out)
    assert {**continued, "rtf": 0} == {**complete, "rtf": 0}


def test_missing_files_of_audiocaps_are_counted_and_not_fatal(checkpoint, tmp_path, capsys):
    rows = [{"youtube_id": name, "start_time": 30, "caption": f"{name} sounds"} for name in ("here", "there", "gone")]
    write_csv(tmp_path / "caps" / "test.csv", rows)
    for number, name in enumerate(("here", "there_30")):
        tone(tmp_path / "wavs" / f"{name}.wav", number)
    audio = ["--audio_folder", str(tmp_path / "wavs")]
    assert run_eval(checkpoint, tmp_path / "caps", tmp_path / "out", *audio) == 0
    metrics, _ = read(tmp_path / "out")
    assert metrics["clips"] == 2 and metrics["unreadable_rows"] == 1 and metrics["cider_d"] is not None
    assert "gone_30" in capsys.readouterr().err


def test_what_does_not_go_together_is_said(checkpoint, esc50, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run_eval(checkpoint, esc50, out, task="transcribe") == 1
    assert "--task caption" in capsys.readouterr().err
    arguments = ["--model", checkpoint, "--data", str(esc50), "--output_dir", str(out)]
    assert eval_script.main(arguments) == 1 and "add --task caption" in capsys.readouterr().err
    assert run_eval(checkpoint, esc50, out, "--label_column", "colour") == 1
    assert "no column 'colour'" in capsys.readouterr().err
    for wrong in (["--label_column", "x"], ["--official"], ["--audio_folder", "x"]):
        with pytest.raises(SystemExit):
            run_eval(checkpoint, esc50, out, *wrong, task="transcribe")
    with pytest.raises(SystemExit):
        run_eval(checkpoint, esc50, out, "--baseline", "openai/whisper-tiny.en")
    assert not out.exists()


def test_official_metrics_are_asked_for_before_the_model_is_loaded(checkpoint, esc50, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AAC_METRICS_JAVA_PATH", str(tmp_path / "java"))
    monkeypatch.setattr(eval_script, "load_listener", None)
    assert run_eval(checkpoint, esc50, tmp_path / "out", "--official") == 1
    assert "aac-metrics-download" in capsys.readouterr().err
