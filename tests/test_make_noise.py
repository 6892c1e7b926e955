"""Clips in which nobody speaks."""

import json

import numpy as np
import pytest
import soundfile as sf

import make_noise as maker
from audiophi.data.datasets import load_examples


def test_clips_are_what_their_rows_say(tmp_path, capsys):
    assert maker.main([str(tmp_path / "noise"), "--clips", "12", "--max_seconds", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "noise" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["kind"] for row in rows} == set(maker.KINDS)
    for row in rows:
        samples, rate = sf.read(tmp_path / "noise" / row["audio"])
        assert rate == maker.SAMPLE_RATE and abs(len(samples) / rate - row["seconds"]) < 1e-3
        assert np.any(samples) == (row["kind"] != "silence") and np.abs(samples).max() <= 1
    silent = load_examples({"path": str(tmp_path / "noise"), "task": "no_speech"})
    assert len(silent) == 12 and {(row.reference, row.clips[0].transcript) for row in silent} == {("", "")}


def test_the_same_call_makes_the_same_clips(tmp_path):
    for name in "ab":
        maker.main([str(tmp_path / name), "--clips", "6", "--max_seconds", "1"])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("arguments", [["--clips", "0"], ["--max_seconds", "0.1"]])
def test_bad_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(SystemExit):
        maker.main([str(tmp_path / "x"), *arguments])
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    maker.main([str(tmp_path), "--clips", "1", "--max_seconds", "1"])
    with pytest.raises(SystemExit):
        maker.main([str(tmp_path), "--clips", "1"])
    assert "exists" in capsys.readouterr().err
