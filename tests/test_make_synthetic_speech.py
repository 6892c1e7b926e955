"""tools/make_synthetic_speech.py: reproducible clips, shards of bounded size, readable as training data."""

import io
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

import make_synthetic_speech as maker
from audiophi.data.datasets import load_examples


@pytest.fixture
def tone_engine(monkeypatch):
    """Instead of speech engines, which a test machine may lack: a tone of 0.1 s per letter at 22,050 Hz."""

    def speak(text, rng):
        time = np.arange(int(0.1 * len(text) * 22_050)) / 22_050
        return np.sin(2 * np.pi * rng.uniform(100, 300) * time).astype(np.float32), 22_050, "tone"

    monkeypatch.setattr(maker, "speak_flite", speak)


def clip(line=0, copy=0, text="hello there", seed=0, engines=("flite",), room_share=0.5):
    return maker.make_clip((line, copy, text), seed, engines, (), room_share, 0.9)


def samples_of(row):
    return sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")


def test_same_seed_same_samples_other_seed_others(tone_engine):
    first, again, other = clip(), clip(), clip(seed=1)
    assert np.array_equal(samples_of(first)[0], samples_of(again)[0])
    assert samples_of(other)[0].tolist() != samples_of(first)[0].tolist()


def test_rows_are_what_they_say(tone_engine):
    row = clip(room_share=0.0)
    samples, rate = samples_of(row)
    assert rate == maker.SAMPLE_RATE and samples.ndim == 1
    assert row["seconds"] == pytest.approx(len(samples) / rate, abs=0.01)
    assert row["text"] == "hello there" and row["speaker"] == "tone"
    assert 0.05 < np.abs(samples).max() <= 1.0


def test_silence_and_engine_failure_are_reported_and_not_kept(monkeypatch):
    monkeypatch.setattr(maker, "speak_flite", lambda text, rng: (np.zeros(16_000, np.float32), 16_000, "mute"))
    assert "no sound" in clip()

    def fail(text, rng):
        raise RuntimeError("flite failed: no such voice")

    monkeypatch.setattr(maker, "speak_flite", fail)
    assert clip(line=7) == "line 7: flite failed: no such voice"


def test_copies_of_a_sentence_use_different_engines(monkeypatch):
    for name in ("flite", "espeak"):
        voice = lambda text, rng, name=name: (np.ones(16_000, np.float32), 16_000, name)  # noqa: E731
        monkeypatch.setattr(maker, f"speak_{name}", voice)
    for line in range(5):
        speakers = {clip(line, copy, engines=("flite", "espeak-ng"))["speaker"] for copy in range(2)}
        assert speakers == {"flite", "espeak"}


def test_vocal_tract_scaling_moves_the_pitch():
    rate = 16_000
    tone = np.sin(2 * np.pi * 200 * np.arange(rate) / rate).astype(np.float32)
    scaled = maker.scale_vocal_tract(tone, rate, 1.1)
    peak = np.abs(np.fft.rfft(scaled)).argmax() * rate / len(scaled)
    assert peak == pytest.approx(220, abs=3)
    assert len(scaled) == pytest.approx(rate / 1.1, rel=0.01)


def test_room_keeps_length_and_adds_noise():
    speech = np.concatenate([np.sin(np.arange(8_000) * 0.1), np.zeros(8_000)])
    wet = maker.add_room(speech, np.random.default_rng(0))
    assert len(wet) == len(speech)
    assert 0 < np.std(wet[12_000:]) < np.std(wet[:8_000])


def test_shards_stay_below_the_limit_and_load_as_training_data(tone_engine, tmp_path):
    rows = [clip(line, text="word " * 4) for line in range(12)]
    limit = 2 * max(len(row["audio"]["bytes"]) for row in rows) + 500
    assert maker.write_shards(rows, tmp_path, limit) == 12
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) > 3
    for shard in shards:
        assert sum(len(audio["bytes"]) for audio in pq.read_table(shard)["audio"].to_pylist()) <= limit
    loaded = load_examples(str(tmp_path))
    assert [row.reference for row in loaded] == [row["text"] for row in rows]
    first = loaded[0].clips[0]
    assert len(first.read("first")) == pytest.approx(16_000 * first.seconds, abs=200)


def test_missing_engines_are_named(monkeypatch):
    monkeypatch.setattr(maker.shutil, "which", lambda name: None)
    monkeypatch.setattr(maker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install espeak-ng"):
        maker.find_engines(None, [])
    with pytest.raises(ValueError, match="piper-tts"):
        maker.find_engines(["piper"], [])


@pytest.mark.parametrize("engine", ["flite", "espeak-ng"])
def test_real_engines_speak(engine):
    if shutil.which(engine) is None:
        pytest.skip(f"{engine} is not installed")
    speak = {"flite": maker.speak_flite, "espeak-ng": maker.speak_espeak}[engine]
    samples, rate, speaker = speak("The weather is fine today.", random.Random(0))
    assert rate >= 16_000 and 0.8 < len(samples) / rate < 5 and np.std(samples) > 0.01
    assert speaker.startswith(engine.removesuffix("-ng"))


@pytest.mark.slow
def test_command_line(tmp_path):
    """The result does not depend on the number of processes, and an existing folder is not written into."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("one two three\n\nfour five six\nseven eight\nnine ten\n")
    decoded = []
    for processes in ("1", "2"):
        out = tmp_path / f"out{processes}"
        arguments = [
            str(sentences),
            str(out),
            "--engines",
            "flite",
            "--copies",
            "2",
            "--dev",
            "1",
            "--test",
            "1",
            "--processes",
            processes,
        ]
        assert maker.main(arguments) == 0
        decoded.append([row.clips[0].read(row.id).tobytes() for row in load_examples(str(out))])
    assert len(decoded[0]) == 8 and decoded[0] == decoded[1]
    assert {row.reference for row in load_examples(str(out), split="dev")} == {"seven eight"}
    assert {row.reference for row in load_examples(str(out), split="test")} == {"nine ten"}
    with pytest.raises(SystemExit):
        maker.main(arguments)
    assert not list(tmp_path.glob("*.partial"))
