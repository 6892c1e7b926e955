"""AudioCaps: CSVs as released, audio as far as somebody has it."""

import json

import pytest

from audiophi.training.bad_rows import BadRows, TooManyBadRows
from audiophi.training.corpus import Corpus
from audiophi.training.recipe import Source
from processing import AudioError
from tests.layouts import load, read, tone, write_csv


@pytest.fixture
def audiocaps(tmp_path):
    """Two clips for training, of which one is there, and in test two with five captions each."""
    root = tmp_path / "audiocaps"
    train = [("r1nicOVtvkQ", "130", "A woman talks nearby"), ("-UDGBjjwyaqE", "20", "Clanking sounds")]
    test = [("7fmOlUlwoNg", "20"), ("_BJ455B1aAs", "0")]
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    write_csv(root / "train.csv", [dict(zip(columns, (i, *row), strict=True)) for i, row in enumerate(train)])
    write_csv(
        root / "test.csv",
        [dict(zip(columns, (way, *row, f"{row[0]} way {way}"), strict=True)) for way in range(5) for row in test],
    )
    tone(root / "audio" / "r1nicOVtvkQ_130.wav", 1)
    tone(root / "audio" / "7fmOlUlwoNg.flac", 2)
    tone(root / "audio" / "_BJ455B1aAs_0.wav", 3)
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_of_one_clip_are_its_captions(audiocaps, streaming):
    rows = list(load(str(audiocaps), split="test", streaming=streaming))
    assert [row.id for row in rows] == ["7fmOlUlwoNg_20", "_BJ455B1aAs_0"]
    assert list(rows[0].references) == [f"7fmOlUlwoNg way {way}" for way in range(5)]
    assert all(len(read(row)) == 12_800 for row in rows)


def test_audio_elsewhere(audiocaps, tmp_path):
    (audiocaps / "audio").rename(tmp_path / "wavs")
    rows = load({"path": str(audiocaps / "test.csv"), "audio_folder": str(tmp_path / "wavs")})
    assert [len(read(row)) for row in rows] == [12_800, 12_800]


def test_missing_clips_are_kept_for_the_reader_to_count(audiocaps):
    rows = load(str(audiocaps), split="train")
    assert len(rows) == 2 and len(read(rows[0])) == 12_800
    with pytest.raises(AudioError, match="-UDGBjjwyaqE_20"):
        read(rows[1])


def test_missing_clips_are_listed_and_not_fatal_in_training(audiocaps, tmp_path):
    bad = BadRows(tmp_path / "bad.jsonl", max_share=0.0)
    corpus = Corpus([Source(path=str(audiocaps), split="train")], bad)
    assert [corpus.example(row).id for row in corpus.rows] == ["r1nicOVtvkQ_130"]
    assert len(bad) == 0 and len(bad.expected) == 1
    (line,) = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert line["id"] == "-UDGBjjwyaqE_20" and "no such file" in line["reason"]
    # A file that is there and broken is another matter.
    (audiocaps / "audio" / "-UDGBjjwyaqE_20.wav").write_text("no audio")
    with pytest.raises(TooManyBadRows):
        Corpus([Source(path=str(audiocaps), split="train")], BadRows(tmp_path / "bad.jsonl", max_share=0.0))


def test_without_any_audio_the_run_stops(audiocaps, tmp_path):
    for file in (audiocaps / "audio").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no usable rows"):
        Corpus([Source(path=str(audiocaps), split="train")], BadRows(tmp_path / "bad.jsonl", max_share=1.0))


def test_an_unknown_split_is_named(audiocaps):
    with pytest.raises(ValueError, match="no val.csv of AudioCaps; splits here: test, train"):
        load(str(audiocaps), split="val")
