"""The command line, on a tiny checkpoint: what is printed and written, resuming, bad files, exit codes."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiophi.cli.hear import clock
from audiophi.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
TIME = r"(\d\d):(\d\d):(\d\d),(\d\d\d)"


@pytest.fixture
def clips(tmp_path, waveform):
    """A folder with three clips, the last one longer than the tiny Whisper's window of 2 s, and a text."""
    folder = tmp_path / "clips"
    (folder / "inside").mkdir(parents=True)
    for index, (name, seconds) in enumerate((("a.wav", 0.5), ("inside/b.FLAC", 0.7), ("z.wav", 5.0))):
        sf.write(folder / name, waveform(seconds, seed=index), 16_000)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def audiophi(checkpoint):
    """audiophi(command, *arguments) -> exit code, on the tiny checkpoint."""

    def run(command, *arguments):
        options = ["--model", checkpoint, "--max_new_tokens", "5", "--device", "cpu"]
        return main([command, *map(str, arguments), *options])

    return run


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_is_transcribed_as_text_and_several_with_their_names(audiophi, clips, capsys):
    assert audiophi("transcribe", clips / "a.wav") == 0
    text = capsys.readouterr().out
    assert text.strip() and "a.wav" not in text
    assert audiophi("transcribe", clips, clips / "a.wav", "--batch_size", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(clips / n) for n in ("a.wav", "inside/b.FLAC", "z.wav")]
    assert lines[0] == f"{clips / 'a.wav'}: {text.strip()}"


def test_json_and_subtitles_of_a_long_recording_agree(audiophi, clips, capsys):
    assert audiophi("transcribe", clips / "z.wav", "--format", "json") == 0
    (result,) = lines_of(capsys.readouterr().out)
    chunks = result["chunks"]
    assert result["file"] == str(clips / "z.wav") and len(chunks) > 2
    assert chunks[0]["start"] == 0 and chunks[-1]["end"] == 5.0
    assert result["text"] == " ".join(chunk["text"] for chunk in chunks if chunk["text"])
    assert audiophi("transcribe", clips / "z.wav", "--format", "srt") == 0
    blocks = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    spoken = [chunk for chunk in chunks if chunk["text"]]
    assert len(blocks) == len(spoken) > 0
    for number, (block, chunk) in enumerate(zip(blocks, spoken, strict=True), start=1):
        head, times, text = block.split("\n", 2)
        h1, m1, s1, ms1, h2, m2, s2, ms2 = map(int, re.fullmatch(f"{TIME} --> {TIME}", times).groups())
        assert (int(head), text) == (number, chunk["text"]) and (h1, m1, h2, m2) == (0, 0, 0, 0)
        assert [s1 + ms1 / 1000, s2 + ms2 / 1000] == pytest.approx([chunk["start"], chunk["end"]])
    assert audiophi("transcribe", clips / "z.wav", "--format", "vtt", "--timestamps", "word") == 0
    head, *cues = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    assert head == "WEBVTT" and [cue.split("\n", 2)[2] for cue in cues] == result["text"].split()
    assert all(re.fullmatch(r"00:00:0\d\.\d{3} --> 00:00:0\d\.\d{3}", cue.split("\n")[1]) for cue in cues)
    assert clock(3661.0014) == "01:01:01,001" and clock(59.9996) == "00:01:00,000"


def test_an_ear_that_is_not_there_is_refused(audiophi, clips, capsys):
    assert audiophi("transcribe", clips / "a.wav") == 0
    out = capsys.readouterr().out
    assert audiophi("transcribe", clips / "a.wav", "--hear_with", "alignment") == 0
    assert capsys.readouterr().out == out
    assert audiophi("transcribe", clips / "a.wav", "--hear_with", "ear") == 1
    assert "expected one of alignment, decoder, both" in capsys.readouterr().err


def test_a_bad_file_costs_itself_and_the_exit_code(audiophi, clips, capsys):
    (clips / "bad.wav").write_text("no audio")
    assert audiophi("transcribe", clips / "missing.wav", clips / "bad.wav", clips / "a.wav") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and out.startswith(str(clips / "a.wav"))
    assert "missing.wav" in err and "bad.wav" in err and "2 of 3 files failed" in err


def test_results_are_written_as_they_come_and_continued(audiophi, clips, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "results.jsonl"
    (clips / "bad.wav").write_text("no audio")
    assert audiophi("transcribe", clips, "--output", out) == 1
    complete = lines_of(out.read_text())
    assert [Path(row["file"]).name for row in complete] == ["a.wav", "bad.wav", "b.FLAC", "z.wav"]
    assert "error" in complete[1] and all(row["text"] is not None for row in complete if "error" not in row)
    assert capsys.readouterr().out == ""
    # As a kill leaves it: two whole results and a part of the third.
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:30])
    heard = []
    monkeypatch.setattr("audiophi.cli.hear.as_result", spy(heard))
    assert audiophi("transcribe", clips, "--output", out) == 1
    assert [Path(file).name for file in heard] == ["bad.wav", "b.FLAC", "z.wav"]  # an error is tried again
    assert lines_of(out.read_text()) == complete
    (clips / "bad.wav").unlink()
    heard.clear()
    assert audiophi("transcribe", clips, "--output", out) == 0 and heard == []
    # Nor are they those of other settings, or of a file that has changed since.
    assert audiophi("transcribe", clips / "a.wav", "--output", out, "--num_beams", "2") == 0 and len(heard) == 1
    heard.clear()
    os.utime(clips / "a.wav", (1e9, 1e9))
    assert audiophi("transcribe", clips / "a.wav", "--output", out) == 0 and len(heard) == 1
    heard.clear()
    # Another question is not answered by these results.
    assert audiophi("ask", "Who?", clips / "a.wav", "--output", out) == 0 and len(heard) == 1
    assert lines_of(out.read_text())[-1]["instruction"] == "Who?"


def spy(heard):
    from audiophi.cli.hear import as_result

    def spied(file, answer):
        heard.append(file)
        return as_result(file, answer)

    return spied


def test_a_file_that_holds_something_else_is_left_alone(audiophi, clips, tmp_path, capsys):
    for content in (b"my notes", b"my notes\n", b'{"other": 1}\n'):
        (tmp_path / "notes").write_bytes(content)
        assert audiophi("transcribe", clips, "--output", tmp_path / "notes") == 1
        assert (tmp_path / "notes").read_bytes() == content and "left alone" in capsys.readouterr().err


def test_caption_and_ask(audiophi, clips, capsys):
    assert audiophi("caption", clips / "z.wav", "--format", "json") == 0
    (caption,) = lines_of(capsys.readouterr().out)
    assert caption["text"] and "chunks" not in caption
    assert audiophi("ask", "Transcribe the speech.", clips / "a.wav") == 0
    asked = capsys.readouterr().out
    assert audiophi("transcribe", clips / "a.wav") == 0 and capsys.readouterr().out == asked


def test_wrong_arguments(audiophi, clips, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert audiophi("transcribe", tmp_path / "empty") == 1 and "no audio files" in capsys.readouterr().err
    assert main(["transcribe", str(clips / "a.wav"), "--model", str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().err.startswith("audiophi transcribe: ")
    for arguments in (["transcribe", clips, "--format", "srt"], ["transcribe", clips, "--batch_size", 0],
                      ["ask", " ", clips], ["transcribe"], ["sing", clips]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            audiophi(*arguments)
        assert stop.value.code == 2


def test_info_counts_what_the_model_has(checkpoint, make_tiny_model, capsys, tmp_path):
    assert main(["info", checkpoint]) == 0
    said = capsys.readouterr().out
    model, _ = make_tiny_model(adapter="mlp", readout="frames")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total / 1e6:.2f} M" in re.search(r"  all +(.*)", said)[1]
    adapter = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert f"{adapter / 1e6:.2f} M  mlp" in said and "whisper" in said and "llama" in said and "slim" in said
    assert re.search(r"tokens per second +12.50\n", said) and re.search(r"encoder window +2.0 s", said)
    assert re.search(r"memory in bfloat16 +\d", said) and "GFLOP" in said and "not known" in said
    checkpoint = shutil.copytree(checkpoint, tmp_path / "with_card")
    (checkpoint / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert main(["info", str(checkpoint)]) == 0 and re.search("checkpoint +cc-by-4.0", capsys.readouterr().out)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["info", str(tmp_path)]) == 1 and "llama" in capsys.readouterr().err


def test_push_sends_model_and_processor(checkpoint, monkeypatch, capsys, tmp_path):
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    sent, cards = [], []
    read = [AudioPhiForConditionalGeneration, AudioPhiProcessor]
    monkeypatch.setattr(AudioPhiForConditionalGeneration, "check_components_are_public", lambda self: None)
    monkeypatch.setattr(
        "audiophi.cli.push.publish_folder",
        lambda *a: cards.append((*a[::2], Path(a[1], "README.md").read_text(), len(sent))),
    )
    for kind in (AudioPhiForConditionalGeneration, AudioPhiProcessor):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, *args, **kwargs: sent.append((type(self), args, kwargs)))
    assert main(["push", checkpoint, "org/name", "--private"]) == 0
    assert sent == [(kind, ("org/name",), {"private": True}) for kind in read]
    ((repository, private, card, sent_before),) = cards
    assert (repository, private, sent_before) == ("org/name", True, 0) and 'model="org/name"' in card
    assert main(["push", str(tmp_path), "org/name"]) == 1 and len(sent) == 2 and len(cards) == 1
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "README.md").write_text("written by hand")
    assert main(["push", str(folder), "org/name"]) == 0 and cards[1][2] == "written by hand"
    assert main(["card", str(folder)]) == 0 and main(["push", str(folder), "org/name"]) == 0 and len(cards) == 3
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Nothing was measured", "All is well"))
    capsys.readouterr()
    assert main(["push", str(folder), "org/name"]) == 1 and len(cards) == 3 and len(sent) == 6
    assert "-All is well" in capsys.readouterr().err


def test_it_runs_as_a_module(checkpoint, tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(8000, dtype=np.float32) + 0.01, 16_000)
    command = [sys.executable, "-m", "audiophi", "transcribe", tmp_path / "a.wav", tmp_path / "no.wav"]
    options = ["--model", checkpoint, "--max_new_tokens", "3"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith(f"{tmp_path / 'a.wav'}: ") and "no.wav" in done.stderr


def test_standard_input_is_heard(audiophi, clips, capsys, monkeypatch, tmp_path):
    assert audiophi("transcribe", clips / "a.wav") == 0
    said = capsys.readouterr().out
    for _ in range(2):  # what came before is no result of what comes now
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(open(clips / "a.wav", "rb")))
        assert audiophi("transcribe", "-", "--output", tmp_path / "out.jsonl") == 0
        assert lines_of((tmp_path / "out.jsonl").read_text())[-1]["text"] == said.strip()
    assert "already" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no audio")))
    assert audiophi("transcribe", "-") == 1 and "not audio" in capsys.readouterr().err


def test_a_wrong_model_is_said_in_one_line(clips, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for model in (str(tmp_path / "gone"), "./gone", "checkpoints/gone", "gone", "a/b/c", str(clips / "a.wav")):
        assert main(["transcribe", str(clips / "a.wav"), "--model", model]) == 1
        said = capsys.readouterr().err
        assert said == f"audiophi transcribe: {model}: no such folder, and no id of the Hub (org/name)\n"
        assert main(["eval", "--model", model, "--data", "nothing.jsonl", "--output_dir", str(tmp_path / "out")]) == 1
        assert f"{model}: no such folder" in capsys.readouterr().err
    assert main(["transcribe", str(clips / "a.wav"), "--model", "checkpoints"]) == 1
    assert "checkpoints: this folder holds no config.json" in capsys.readouterr().err


def test_what_bitsandbytes_says_about_a_kernel_is_not_shown_but_all_else_is(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


class Pipe(io.BytesIO):
    """Standard input that hands out a little at a time, and says how much was taken when."""

    def read1(self, size=-1):
        return self.read(min(size, 1111))


def sent(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(data)))


def test_what_comes_through_a_pipe_is_transcribed_window_by_window(audiophi, clips, waveform, capsys, monkeypatch):
    raw = (waveform(5.0, seed=2) * 32_767).astype("<i2").tobytes()
    sent(monkeypatch, raw)
    assert audiophi("transcribe", "-", "--stream", "1.5", "--format", "json") == 0
    pieces = lines_of(capsys.readouterr().out)
    assert len(pieces) > 3 and pieces[0]["start"] == 0 and pieces[-1]["end"] == 5.0
    assert all(one["end"] == two["start"] for one, two in zip(pieces, pieces[1:], strict=False))
    assert all(0 < piece["end"] - piece["start"] <= 1.5 for piece in pieces) and any(piece["text"] for piece in pieces)
    sent(monkeypatch, raw)
    assert audiophi("transcribe", "-", "--stream", "1.5") == 0
    assert capsys.readouterr().out.splitlines() == [piece["text"] for piece in pieces if piece["text"]]
    two = np.frombuffer(raw, "<i2").repeat(2).reshape(-1, 2)  # the same in both channels, with a header
    sf.write(wav := io.BytesIO(), two, 16_000, format="WAV", subtype="PCM_16")
    sent(monkeypatch, wav.getvalue())
    assert audiophi("transcribe", "-", "--stream", "1.5", "--format", "json") == 0
    assert lines_of(capsys.readouterr().out) == pieces
    sf.write(wav := io.BytesIO(), two, 16_000, format="WAV", subtype="FLOAT")
    sent(monkeypatch, wav.getvalue())
    assert audiophi("transcribe", "-", "--stream", "1.5") == 1 and "16-bit" in capsys.readouterr().err
    sent(monkeypatch, b"")
    assert audiophi("transcribe", "-", "--stream") == 0 and capsys.readouterr().out == ""
    for wrong in ([clips / "a.wav", "--stream"], ["-", "--stream", "0.1"], ["-", "--stream", "--format", "srt"]):
        with pytest.raises(SystemExit):
            audiophi("transcribe", *wrong)
    assert "--stream" in capsys.readouterr().err


def test_a_file_comes_through_standard_input(audiophi, clips, capsys, monkeypatch):
    assert audiophi("transcribe", clips / "a.wav") == 0
    expected = capsys.readouterr().out
    sent(monkeypatch, (clips / "a.wav").read_bytes())
    assert audiophi("transcribe", "-") == 0 and capsys.readouterr().out == expected != ""
