"""Training end to end on tiny random components: stages, resuming, accumulation, cache, bad rows, what runs and what
is saved."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from audiophi.cli.train import main as train_command
from audiophi.training.cache_filling import encoding_progress
from audiophi.training.corpus import TooManyBadRows
from audiophi.training.recipe import RecipeError
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from tests.tiny_runs import ALIGN, LM, ROOT, largest_difference, train


def test_both_stages_end_in_a_model_that_transcribes(settings, speech, capsys, waveform):
    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech), "limit": 6}]}
    weights = train(settings({**ALIGN, "eval_steps": 3}, LM, data=data, report_to=["tensorboard"]))
    out = Path(settings()["output_dir"])
    printed = capsys.readouterr().out
    assert "audio tokens" not in printed and "tokens/s" in printed and "ETA" in printed and "GB of memory" in printed
    assert "stage align: loss align, 6 steps" in printed and "of a context of 512" in printed
    assert not any(key.startswith("model.audio_tower") for key in weights), "the frozen encoder was saved"
    assert any(".lora_" in key for key in weights)
    entries = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["stage"] == "align" and "wer_align" in e] == [3, 6]
    assert {"wer", "listening_gap", "wer_align"} <= entries[-1].keys() | entries[-2].keys()
    assert all(later["seconds"] >= earlier["seconds"] for earlier, later in itertools.pairwise(entries))
    logged = next(e for e in entries if "loss" in e)
    assert logged["grad_norm_adapter"] > 0 and logged["align_loss"] == pytest.approx(logged["loss"], rel=1e-4)
    assert (out / "curves.png").stat().st_size > 5000
    assert list(out.glob("*/runs/**/events*")), "no TensorBoard log"
    card = (out / "final" / "README.md").read_text()
    assert "# tiny" in card and "Nothing was measured" in card and "stage of tiny" in card and str(out) not in card
    assert (out / "final" / "curves.png").read_bytes() == (out / "curves.png").read_bytes()
    model = AudioPhiForConditionalGeneration.from_pretrained(out / "final").eval()
    processor = AudioPhiProcessor.from_pretrained(out / "final")
    message = [
        {"type": "audio", "audio": waveform(1.0, 3), "sampling_rate": 16000},
        {"type": "text", "text": "Transcribe."},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_losses_fall(settings):
    """The align stage must be able to memorise 16 clips of noise; a wrong loss or frozen adapter cannot."""
    train(
        settings(
            {**ALIGN, "steps": 60, "batch_size": 8, "learning_rate": 5e-3},
            adapter={"type": "mlp", "stack": 2, "dropout": 0.0},
        )
    )
    entries = [json.loads(line) for line in (Path(settings()["output_dir"]) / "history.jsonl").read_text().splitlines()]
    losses = [e["align_loss"] for e in entries if "align_loss" in e]
    assert losses[-1] < 0.7 * losses[0]


def test_align_never_runs_the_llm(settings, monkeypatch):
    from transformers import LlamaModel

    def refuse(*args, **kwargs):
        raise AssertionError("the align stage ran the LLM")

    monkeypatch.setattr(LlamaModel, "forward", refuse)
    data = settings()["data"]
    train(settings({**ALIGN, "eval_steps": 3}, data={**data, "eval": data["train"]}))


def test_filling_the_cache_says_how_far_it_is(monkeypatch, capsys):
    clock = itertools.count(0, 6)  # seconds between two batches
    monkeypatch.setattr("audiophi.training.cache_filling.time", SimpleNamespace(monotonic=lambda: next(clock)))
    report = encoding_progress(print)
    for done in (4, 8, 12, 16):
        report(done, 16)
    assert capsys.readouterr().out.splitlines() == [
        "cache: 4 of 16 clips encoded, ETA 0:18",
        "cache: 12 of 16 clips encoded, ETA 0:06",
        "cache: 16 of 16 clips encoded",
    ]


def test_cached_features_are_used_and_change_nothing(settings, tmp_path, monkeypatch):
    augmented = {"noise": 0.3, "spec_augment": {"time_masks": 4.0, "time_width": 5}}
    stages = ({**ALIGN, **augmented}, {**LM, **augmented, "loss": "both", "lora": {"r": 2, "dropout": 0.0}})
    data = {**settings()["data"], "speeds": [0.9, 1.0, 1.1]}
    live = train(settings(*stages, data=data, cache=False, output_dir=str(tmp_path / "live")))
    cached = train(settings(*stages, data=data, output_dir=str(tmp_path / "cached")))
    assert largest_difference(live, cached) < 2e-4  # float32 rounding of differently padded batches
    plain = ({**ALIGN}, {**LM, "loss": "both", "lora": {"r": 2, "dropout": 0.0}})
    assert largest_difference(train(settings(*plain, data=data, output_dir=str(tmp_path / "plain"))), cached) > 1e-3

    from modeling_audiophi.encoder_whisper import WhisperAudioEncoder

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder ran although everything is cached")

    monkeypatch.setattr(WhisperAudioEncoder, "forward", refuse)
    again = train(settings(*stages, data=data, output_dir=str(tmp_path / "again")))
    assert largest_difference(again, cached) == 0


@pytest.mark.parametrize("loss", ["align", "both"])
def test_eight_clips_once_are_one_clip_eight_times(settings, tmp_path, loss):
    stage = {
        **LM,
        "loss": loss,
        "tune": {"llm": "frozen" if loss == "align" else "full"},
        "steps": 3,
        "llm_learning_rate": 1e-3,
    }
    adapter = {**settings()["adapter"], "dropout": 0.0}
    whole = train(settings({**stage, "batch_size": 8}, adapter=adapter, output_dir=str(tmp_path / "a")))
    parts = train(
        settings({**stage, "batch_size": 1, "grad_accum": 8}, adapter=adapter, output_dir=str(tmp_path / "b"))
    )
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert largest_difference(whole, parts) < 3e-4


def test_finished_stages_are_skipped_and_other_settings_refused(settings, capsys):
    first = train(settings(ALIGN))
    capsys.readouterr()
    assert largest_difference(first, train(settings(ALIGN))) == 0
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="stages.0.learning_rate"):
        train(settings({**ALIGN, "learning_rate": 1e-2}))
    with pytest.raises(RecipeError, match="seed"):
        train(settings(ALIGN, seed=5))
    both = train(settings(ALIGN, LM))  # a further stage continues from the finished one
    assert both.keys() > first.keys()


def test_killed_and_resumed_is_uninterrupted(settings, tmp_path):
    stages = (
        {**ALIGN, "steps": 12, "save_steps": 4, "eval_steps": 3, "noise": 0.2},
        {**LM, "steps": 12, "save_steps": 4, "lora": {"r": 2, "dropout": 0.1}},
    )
    data = {**settings()["data"], "speeds": [0.9, 1.1], "eval": settings()["data"]["train"]}
    straight = train(settings(*stages, data=data, output_dir=str(tmp_path / "straight")))
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(yaml.safe_dump(settings(*stages, data=data, output_dir=str(tmp_path / "killed"))))
    command = [sys.executable, str(ROOT / "train.py"), str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    history = tmp_path / "killed" / "history.jsonl"

    def kill_at(stage, step):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            reached = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
            if any(e["stage"] == stage and e["step"] >= step for e in reached):
                break
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()

    kill_at("align", 6)
    kill_at("lm", 6)
    # A checkpoint that was cut short, newer than all others, must not be taken.
    broken = tmp_path / "killed" / "lm" / "checkpoint-11"
    broken.mkdir()
    (broken / "trainable.safetensors").write_bytes(b"half")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout and "stage align: finished before" in result.stdout
    resumed = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    assert largest_difference(straight, resumed) == 0
    steps = [e["step"] for e in map(json.loads, history.read_text().splitlines()) if e["stage"] == "lm" and "loss" in e]
    assert steps == sorted(set(steps))


def test_checkpoints_hold_only_what_is_trained(settings, monkeypatch):
    from audiophi.training import stages

    monkeypatch.setattr(stages.shutil, "rmtree", lambda *args, **kwargs: None)
    train(settings({**ALIGN, "save_steps": 3}))
    checkpoint = Path(settings()["output_dir"]) / "align" / "checkpoint-6"
    keys = load_file(checkpoint / "trainable.safetensors").keys()
    assert keys and not any("audio_tower" in key or "language_model" in key or "readout" in key for key in keys)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(keys - {"model.alignment.vocab_ids"})


@pytest.mark.parametrize("cache", [True, False])
def test_bad_rows_are_listed_and_skipped(settings, speech, tmp_path, waveform, cache):
    bad = tmp_path / "bad"
    bad.mkdir()
    whole = speech / "0.wav"
    (bad / "truncated.wav").write_bytes(whole.read_bytes()[:-4000])
    (bad / "text.wav").write_text("this is not audio")
    soundfile.write(bad / "nan.wav", np.full(9000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(bad / "silent_text.wav", waveform(1.0), 16000)
    rows = [{"audio": f"{name}.wav", "text": "x y", "id": name} for name in ("truncated", "text", "nan", "missing")]
    rows.append({"audio": "silent_text.wav", "text": " ... ", "id": "no_text"})
    (bad / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(speech)}, {"path": str(bad)}]
    stage = {**ALIGN, "steps": 8}
    train(settings(stage, data={"train": sources, "max_bad_rows": 0.5}, cache=cache))
    listed = [json.loads(line) for line in (Path(settings()["output_dir"]) / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"truncated", "text", "nan", "missing", "no_text"}
    assert all(row["reason"] for row in listed)
    with pytest.raises(TooManyBadRows, match="bad_rows.jsonl"):
        other = str(tmp_path / "strict")
        train(settings(stage, data={"train": sources, "max_bad_rows": 0.05}, cache=cache, output_dir=other))


def test_encoder_can_be_tuned_and_layers_mixed(settings, tmp_path):
    tuned = {**ALIGN, "tune": {"encoder": "full"}, "encoder_learning_rate": 1e-3, "spec_augment": {"time_masks": 1.0}}
    weights = train(settings(tuned, output_dir=str(tmp_path / "tuned")))
    assert any(key.startswith("model.audio_tower.encoder.layers") for key in weights)
    mixed = train(settings({**ALIGN, "noise": 0.1}, encoder_layer="mix", output_dir=str(tmp_path / "mixed")))
    (name,) = [key for key in mixed if key.endswith("layer_weights")]
    assert mixed[name].abs().max() > 0, "the layer mix did not learn"


def test_long_prompts_are_left_out_of_the_lm_stage(settings, speech, tmp_path, waveform):
    long = tmp_path / "long"
    long.mkdir()
    soundfile.write(long / "long.wav", waveform(25.0), 16000)
    (long / "metadata.jsonl").write_text(json.dumps({"audio": "long.wav", "text": "too long", "id": "long"}) + "\n")
    data = {"train": [{"path": str(speech)}, {"path": str(long)}], "max_bad_rows": 0.1}
    train(settings({**LM, "steps": 6}, readout="frames", data=data))
    assert "exceed the context" in (Path(settings()["output_dir"]) / "bad_rows.jsonl").read_text()


def test_streaming_trains(settings, speech):
    data = {"train": [{"path": str(speech)}], "streaming": True, "speeds": [0.9, 1.0]}
    first = train(settings({**ALIGN, "steps": 7}, data=data))
    assert first


def test_tempo_changes_on_cached_features(settings, tmp_path):
    plain = train(settings(ALIGN, output_dir=str(tmp_path / "plain")))
    first, second = (
        train(settings({**ALIGN, "time_stretch": 0.2}, output_dir=str(tmp_path / name))) for name in ("a", "b")
    )
    assert largest_difference(first, second) == 0
    assert largest_difference(first, plain) > 1e-4


@pytest.mark.slow
def test_two_processes_train_as_one(settings, tmp_path):
    adapter = {**settings()["adapter"], "dropout": 0.0}
    data = {**settings()["data"], "eval": settings()["data"]["train"]}
    stages = ({**ALIGN, "eval_steps": 2}, {**LM, "loss": "both", "lora": {"r": 2, "dropout": 0.0}})
    keys = {"adapter": adapter, "data": data, "logging_steps": 1}
    one = train(settings(*stages, output_dir=str(tmp_path / "one"), **keys))
    halves = [{**stage, "batch_size": 2} for stage in stages]
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump(settings(*halves, output_dir=str(tmp_path / "two"), **keys)))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
        str(recipe),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert largest_difference(one, load_file(tmp_path / "two" / "final" / "model.safetensors")) < 1e-4
    histories = [
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 6 + 4, "a step's log is missing"  # also at steps with an evaluation
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_unknown_adapter_keys_are_refused(settings):
    with pytest.raises(RecipeError, match="adapter: unknown key 'stak'"):
        train(settings(ALIGN, adapter={"type": "mlp", "stak": 4}))


def test_command_line_errors_have_exit_codes(settings, tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings(ALIGN)))
    assert train_command([str(recipe), "--stages.0.stepz", "3"]) == 2
    said = capsys.readouterr().err
    assert "stages.0.stepz" in said and "steps" in said


def test_benchmark_writes_both_curves(settings, speech, tmp_path, monkeypatch):
    import align_vs_lm

    def tiny_recipe(name, *stages, **keys):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(*stages, data=data, **keys)))
        return path

    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech)}]}
    lm = {**LM, "tune": {"adapter": "full"}}
    runs = {"align_then_lm": tiny_recipe("both", ALIGN, LM), "lm": tiny_recipe("alone", lm, readout="frames")}
    monkeypatch.setattr(align_vs_lm, "RUNS", runs)
    out = tmp_path / "benchmark"
    arguments = ["--seconds", "0.5", "--timing_steps", "2", "--evaluations", "2", "--output_dir", str(out)]
    assert align_vs_lm.main([*arguments, "--lm.stages.0.learning_rate", "1e-4", "--seed", "1"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["recipes"]["lm"]["stages"][0]["learning_rate"] == 1e-4
    assert results["recipes"]["align_then_lm"]["stages"][1]["learning_rate"] == 1e-3
    assert {recipe["seed"] for recipe in results["recipes"].values()} == {1}
    for points in results["curves"].values():
        assert points[-1]["best"] >= 0 and points[-1]["seconds"] < 5
    assert {p["stage"] for p in results["curves"]["align_then_lm"]} == {"align", "lm"}
    assert (out / "curves.png").stat().st_size > 5000


def test_minutes_cut_the_steps_and_a_resumed_run_keeps_to_them(settings, speech, tmp_path, monkeypatch, capsys):
    from audiophi.training import stages

    monkeypatch.setattr(stages, "measure_step", lambda *arguments: (6.0, 0))
    data = {"train": [{"path": str(speech)}]}
    run = settings({**ALIGN, "steps": 60, "minutes": 0.5, "save_steps": 2}, data=data)
    train(run)
    printed = capsys.readouterr().out
    record = tmp_path / "out" / "align" / "stage.json"
    done = json.loads(record.read_text())
    assert done["steps"] == 5 and "loss align, 5 steps" in printed
    # As if killed after its last checkpoint, and taken up on a machine of another speed.
    monkeypatch.setattr(stages, "measure_step", lambda *arguments: (1.0, 0))
    record.unlink()
    train(run)
    assert json.loads(record.read_text())["steps"] == 5
