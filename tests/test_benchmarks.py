"""The benchmarks of `make bench` at tiny size: the same code, in seconds. Their figures say nothing."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import against_peer
import cost_vs_work
import measuring
import packing
import profile_step
import run_all
import stopwatch
import transcribe_folder
from stopwatch import Stopwatch


@pytest.fixture(scope="module")
def tiny():
    return measuring.make_model("tiny")


# ---- what they share -------------------------------------------------------------------------------------------------


def test_speech_has_the_wanted_length_and_its_words():
    clips = measuring.joined_speech(3, 6.5)
    assert [len(wave) for wave, _ in clips] == [104_000] * 3 and len({text for _, text in clips}) == 3
    rates = [len(text.split()) / 6.5 for _, text in clips]
    assert all(1 < rate < 5 for rate in rates), rates
    assert all(np.abs(wave).max() > 0.05 for wave, _ in clips)


def test_an_untrained_model_keeps_as_much_as_a_trained_one(tiny):
    model, processor = tiny
    kept = measuring.kept_per_second(model, processor, measuring.joined_speech(2, 20.0))
    assert kept == pytest.approx(measuring.KEPT_PER_SECOND, abs=0.1)


def test_rounds_are_interleaved_and_bounded():
    order = []
    work = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measuring.interleaved(work, repetitions=2, seconds=60)
    assert order == ["a", "b"] * 3 and [len(values) for values in times.values()] == [2, 2], "one is a warm-up"
    slow = {"slow": lambda: time.sleep(0.05)}
    assert len(measuring.interleaved(slow, repetitions=50, seconds=0.2)["slow"]) in (1, 2, 3)
    assert len(measuring.interleaved(slow, repetitions=50, seconds=0)["slow"]) == 1, "at least one round"


def test_stopwatch_counts_every_second_once_and_leaves_no_trace(monkeypatch):
    now = 0.0
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))

    def work(seconds):
        nonlocal now
        now += seconds

    class Worker:
        def outer(self):
            work(2)
            self.inner()

        def inner(self):
            work(5)

    worker, plain = Worker(), Worker.inner
    with Stopwatch("rest") as watch:
        watch.over(worker, "outer", "outer")
        watch.over(Worker, "inner", lambda self: "inner")
        worker.outer()
        work(3)
        watch.lap("lap")
        work(1)
    assert watch.seconds == {"outer": 2, "inner": 5, "lap": 3, "rest": 1}
    assert Worker.inner is plain and not vars(worker)
    with Stopwatch() as watch:
        watch.over(Worker, "outer", "all of it", whole=True)
        watch.over(Worker, "inner", "inner")
        worker.outer()
    assert "inner" not in watch.seconds and watch.seconds["all of it"] == 7


def test_results_are_replaced_section_by_section(tmp_path):
    path = tmp_path / "deep" / "results.json"
    measuring.write_results(path, "a", {"headline": {"train_ratio_7s": 2.0, "train_ratio_9s": 1.0}})
    measuring.write_results(path, "b", {"cases": [1]})
    measuring.write_results(path, "a", {"headline": {"train_ratio_7s": 3.0}})
    results = json.loads(path.read_text())
    assert results["train_ratio_7s"] == 3.0 and "train_ratio_9s" not in results and results["b"] == {"cases": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


# ---- against the peers -----------------------------------------------------------------------------------------------


def test_peers_get_their_own_number_of_audio_tokens():
    audio, pad = 9, 0
    batch = {
        "input_ids": torch.tensor([[pad, pad, 1, 9, 2, 3], [1, 9, 2, 3, 4, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "labels": torch.tensor([[-100] * 4 + [2, 3], [-100] * 4 + [4, 5]]),
    }
    made = against_peer.with_audio_tokens(batch, audio, [1, 2], pad)
    assert made["input_ids"].tolist() == [[1, 9, 2, 3, pad, pad, pad], [1, 9, 9, 2, 3, 4, 5]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert made["labels"].tolist() == [[-100, -100, 2, 3, -100, -100, -100], [-100] * 5 + [4, 5]]
    batch["input_ids"][1, 4] = 9
    with pytest.raises(ValueError, match="row 1 has 2 audio placeholders"):
        against_peer.with_audio_tokens(batch, audio, [1, 2], pad)


def test_against_peers(tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--weights", "tiny", "--quick", "--lengths", "3", "--output", str(path)]
    assert against_peer.main(arguments) == 0
    results = json.loads(path.read_text())
    section = results["against_peer"]
    train, generate = section["cases"]
    assert section["complete"] and (train["task"], generate["task"]) == ("train", "generate")
    assert set(train["medians"]) == {"ours", "ours, cached", "voxtral", "qwen2_audio"}
    assert set(generate["medians"]) == {"ours", "voxtral", "qwen2_audio"}
    for case in section["cases"]:
        # 30 s always; 25 a second; what the collapse keeps.
        assert case["audio_tokens"]["voxtral"] == 375 and case["audio_tokens"]["qwen2_audio"] == 75
        assert case["audio_tokens"]["ours"] == pytest.approx(3 * measuring.KEPT_PER_SECOND, abs=1)
        ratio = case["medians"]["voxtral"] / case["medians"]["ours"]
        assert results[f"{case['task']}_ratio_3s"] == pytest.approx(ratio, abs=1e-3)
    assert "| train | 3 s | 2 |" in capsys.readouterr().out


def test_the_headline_is_the_worse_batch_size():
    cases = [
        {"task": "train", "seconds": 7.0, "ratios": {"voxtral": 4.0, "qwen2_audio": 2.0}},
        {"task": "train", "seconds": 7.0, "ratios": {"voxtral": 3.0}},
        {"task": "generate", "seconds": 30.0, "ratios": {"voxtral": 0.9}},
    ]
    assert against_peer.headline(cases) == {
        "train_ratio_7s": 3.0,
        "train_ratio_7s_qwen2_audio": 2.0,
        "generate_ratio_30s": 0.9,
    }


def test_peers_are_of_our_size_and_learn_only_their_adapter(tiny):
    ours, _ = tiny
    for name in against_peer.PEERS:
        peer = against_peer.make_peer(name, ours)
        for part in ("audio_tower", "language_model"):
            count = sum(p.numel() for p in getattr(peer.model, part).parameters())
            assert count == sum(p.numel() for p in getattr(ours.model, part).parameters()), (name, part)
        trained = [name for name, p in peer.named_parameters() if p.requires_grad]
        assert trained and all("multi_modal_projector" in name for name in trained)
    wider = type(ours.config).from_dict(ours.config.to_dict())
    wider.text_config.hidden_size *= 2
    with pytest.raises(RuntimeError, match="size mismatch"):
        against_peer.make_peer("voxtral", SimpleNamespace(config=wider, model=ours.model))


# ---- where time goes -------------------------------------------------------------------------------------------------


def test_profiles_name_all_parts(tmp_path):
    path = tmp_path / "results.json"
    assert profile_step.main(["--weights", "tiny", "--quick", "--output", str(path)]) == 0
    section = json.loads(path.read_text())["profile_step"]
    assert len(section["profiles"]) == 4 and not section["left_out"]
    lm, align, together, alone = section["profiles"].values()
    both = {"features", "prompts and padding", "augmentation", "encoder", "adapter", "alignment's scores", "optimizer"}
    both |= {"backward: readout, alignment, CTC", "backward: adapter"}
    assert both <= set(lm) and both <= set(align)
    assert {"LLM on the prompt", "LLM's head and loss", "backward: LLM", "backward: LLM's head and loss"} <= set(lm)
    assert "CTC loss" in align and not any("LLM" in part for part in align)
    decoding = {"LLM on the prompt", "CTC's share in the scores", "LLM without audio"}
    assert decoding <= set(alone) and {*decoding, "LLM, token by token"} <= set(together)
    assert "| all |" in profile_step.table(section)


def test_packing_is_measured_beside_padding(tmp_path):
    path = tmp_path / "results.json"
    assert packing.main(["--weights", "tiny", "--quick", "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    section = results["packing"]
    assert results["packing_ratio"] > 0 and 0.2 < section["share_of_padding"] < 0.8
    assert min(section["kept_bytes"].values()) > 0  # of a tiny model mostly masks, so nothing about which is more
    assert "| padded |" in packing.table(section)


# ---- cost against work -----------------------------------------------------------------------------------------------


def test_cost_of_audio_is_measured_until_time_is_out(tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--weights", "tiny", "--quick", "--parts", "audio", "--output", str(path)]
    assert cost_vs_work.main(arguments) == 0
    section = json.loads(path.read_text())["cost_vs_work"]
    assert [row["size"] for row in section["length"]] == [1, 4] and [row["size"] for row in section["batch"]] == [1, 2]
    assert all(row["seconds"] > 0 and row["memory"] >= 0 for row in section["length"] + section["batch"])
    assert "| clips of 7 s at once | seconds |" in capsys.readouterr().out
    assert cost_vs_work.main([*arguments, "--minutes", "1e-9"]) == 0
    section = json.loads(path.read_text())["cost_vs_work"]
    assert len(section["left_out"]) == 3, "the first case is how the others are judged"


def test_what_training_does_with_a_manifest_before_its_first_step(tmp_path):
    runs = []
    for rows, with_seconds in ((40, True), (80, False)):
        manifest = cost_vs_work.write_manifest(tmp_path, rows, with_seconds)
        assert len(manifest.read_text().splitlines()) == rows and ("duration" in manifest.read_text()) == with_seconds
        runs.append({"rows": rows, "with_seconds": with_seconds, "parts": cost_vs_work.prepare_rows(manifest)})
    assert {"reading and checking its rows", "hashes of the audio", "order of batches"} <= set(runs[0]["parts"])
    assert all(part["seconds"] > 0 for run in runs for part in run["parts"].values())
    table = cost_vs_work.table({"length": [], "batch": [], "rows": runs, "left_out": ["1,000 rows (at most 9 s)"]})
    assert "| rows of the manifest | 40 | 80, lengths not given |" in table and "left for: 1,000 rows" in table


def test_growth_names_the_largest_part():
    def run(rows, read, hashed):
        parts = {"read": (read, 2**20), "hashes": (hashed, 2**21), "(streaming)": (99.0, 0)}
        parts = {name: {"seconds": seconds, "memory": memory} for name, (seconds, memory) in parts.items()}
        return {"rows": rows, "with_seconds": True, "parts": parts}

    text = cost_vs_work.growth([run(10, 1.0, 1.0), run(100, 4.0, 6.0)])
    assert text.startswith("10 times the rows take 5.0 times the seconds (2.0 to 10.0 s); most of it, 60 %: hashes.")
    assert "1.0 times the memory (3.0 to 3.0 MiB); most of it, 67 %: hashes." in text


# ---- a folder of files -----------------------------------------------------------------------------------------------


def test_a_folder_is_transcribed_by_command_and_by_whisper(tmp_path, checkpoint, monkeypatch):
    words = transcribe_folder.write_folder(tmp_path, 3)
    assert sorted(words) == ["0000.flac", "0001.flac", "0002.flac"] and all(words.values())
    assert transcribe_folder.audio_seconds([str(path) for path in tmp_path.iterdir()]) > 3
    monkeypatch.setattr("audiophi.cli.hear.DEFAULT_MODEL", tmp_path)

    class Stub:
        sampling_rate = 16_000

        def __init__(self, model, device):
            assert model == "openai/whisper-tiny.en" and device == "cpu"

        def words(self, clips):
            return [f"{len(clip)} samples" for clip in clips]

    monkeypatch.setattr("audiophi.evaluation.baseline.BaselineListener", Stub)
    heard = transcribe_folder.hear_in_this_process("whisper", tmp_path, transcribe_folder.WHISPER["whisper"], 2)
    assert set(heard["texts"]) == set(words) and all("samples" in text for text in heard["texts"].values())
    assert transcribe_folder.summary([{**heard, "all": 9.0}], 3.0, words)["rtf_all"] == 3.0
    del heard["texts"]["0001.flac"]
    with pytest.raises(RuntimeError, match="1 files were not transcribed, 0001.flac"):
        transcribe_folder.summary([{**heard, "all": 9.0}], 3.0, words)
    for name in ("0001.flac", "0002.flac"):
        (tmp_path / name).unlink()
    ours = transcribe_folder.hear_in_this_process("one by one", tmp_path, checkpoint, 2)
    assert set(ours["texts"]) == {"0000.flac"} and ours["load"] > 0 and ours["work"] > 0


def test_without_weights_a_folder_is_not_transcribed(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert transcribe_folder.main(["--weights", "random", "--output", str(path)]) == 0
    assert "Not measured: the checkpoint's base components are not on this machine." in capsys.readouterr().out
    assert json.loads(path.read_text())["transcribe_folder"]["complete"]


@pytest.mark.slow
def test_a_folder_is_transcribed_by_real_models(tmp_path):
    path = tmp_path / "results.json"
    assert transcribe_folder.main(["--weights", "checkpoint", "--quick", "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    found = results["transcribe_folder"]["contestants"]
    assert set(found) == set(transcribe_folder.CONTESTANTS) and results["transcribe_ratio"] > 0
    assert all(one["wer"] < 60 and one["all"] > one["work"] > 0 for one in found.values())


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_results_file_holds():
    results = measuring.read_results(run_all.RESULTS)
    page = run_all.PAGE.read_text(encoding="utf-8")
    assert run_all.filled(page, run_all.tables(results)) == page, "run `python benchmarks/run_all.py --tables`"
    with pytest.raises(ValueError, match="no markers <!-- missing -->"):
        run_all.filled(page, {"missing": "x"})


def test_all_are_run_each_with_its_share_of_the_time(tmp_path, monkeypatch, capfd):
    commands = []

    def child(command, seconds):
        commands.append(command)
        name = command[1].rpartition("/")[2].removesuffix(".py")
        if name == "transcribe_folder":
            section = {"machine": measuring.machine(), "weights": "random", "quick": True, "complete": True}
            section |= {"seconds": 1.0, "skipped": "a test", "headline": {"transcribe_ratio": 2.5}}
            measuring.write_results(tmp_path / "results.json", name, section)
        return 1 if name == "profile_step" else 0

    monkeypatch.setattr(run_all, "TRIAL", tmp_path)
    monkeypatch.setattr(run_all, "run", child)
    assert run_all.main(["--quick", "--minutes", "10", "--weights", "random"]) == 1
    assert "profile_step ended with 1" in capfd.readouterr().err
    minutes = [float(command[command.index("--minutes") + 1]) for command in commands]
    assert sum(minutes) == pytest.approx(10) and all("--quick" in command for command in commands)
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert "| `transcribe_ratio` | 2.5 |" in page and "Not measured: a test." in page and "A trial" in page
    assert page.count(run_all.NOT_MEASURED) == 4
    commands.clear()
    assert run_all.main(["--quick", "--only", "cost_vs_work"]) == 0
    assert len(commands) == 1 and "cost_vs_work.py" in commands[0][1]


def test_what_takes_too_long_is_ended_with_all_that_it_began(tmp_path):
    file = tmp_path / "pid"
    assert run_all.run(["sh", "-c", f"sleep 60 & echo $! > {file}; wait"], seconds=3) == "a time-out"
    child = Path("/proc", file.read_text().strip(), "stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it goes on")
    assert run_all.run([sys.executable, "-c", "raise SystemExit(3)"], seconds=60) == 3
