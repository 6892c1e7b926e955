"""What a start reads: audio files once, and each row once."""

import os
import shutil
import string
from io import BytesIO

import pytest
import soundfile
from datasets import Dataset
from transformers import AutoTokenizer

from audiophi.data.alignment_text import AlignmentTokenizer, normalise_transcript
from audiophi.data.datasets import Examples
from audiophi.tasks.base import plain
from audiophi.training.audio_index import AudioIndex
from audiophi.training.bad_rows import BadRows
from audiophi.training.corpus import Corpus
from audiophi.training.kept import kept_vocab
from audiophi.training.recipe import Source


@pytest.fixture
def corpus(tmp_path, speech):
    """make(**source's keys) -> a corpus of a copy of `speech`, whose index is kept."""
    folder = tmp_path / "speech"
    shutil.copytree(speech, folder)

    def make(**keys):
        bad = BadRows(tmp_path / "bad.jsonl", 1.0)
        return Corpus([Source(str(folder), **keys)], bad, cache_dir=str(tmp_path / "cache"))

    make.folder = folder
    return make


def told(corpus) -> list[tuple]:
    keys = [corpus.key(row, 0, 1.0) for row in corpus.rows]
    corpus.share()
    return [(row.index, row.lengths, key) for row, key in zip(corpus.rows, keys, strict=True)]


def test_a_second_start_reads_no_audio(corpus):
    """Other bytes behind the same size and time: whoever opened a file would see them."""
    first = told(corpus())
    files = sorted(corpus.folder.glob("*.wav"))
    for file in files:
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert told(corpus()) == first and len(first) == 16
    for file in files[1:]:
        os.utime(file)
    assert len(corpus().rows) == 1, "files that have changed since are read again"


def test_an_index_is_shared_by_processes_and_outlives_damage(tmp_path):
    file = tmp_path / "\u00e4 \udcff.wav"
    file.write_bytes(b"sound")
    first, second = (AudioIndex(tmp_path, "source", together=False) for _ in range(2))
    assert first.seconds(str(file), lambda: 2.5) == 2.5
    found = second.hash(str(file))
    first.share()
    second.share()
    (first.folder / "damaged.jsonl").write_text('["cut sho')
    third = AudioIndex(tmp_path, "source")
    for index in (second, third):
        assert index.seconds(str(file), lambda: pytest.fail("measured twice")) == 2.5 and index.hash(str(file)) == found
    assert AudioIndex(tmp_path, "other").seconds(str(file), lambda: 1.0) == 1.0
    with pytest.raises(OSError):
        third.hash(str(tmp_path / "missing.wav"))


@pytest.mark.parametrize(("task", "read"), [("transcribe", 1), ("words", 4), ("compare", 2)])
def test_a_start_makes_each_example_once(task, read, corpus, monkeypatch):
    """`read`: rows that are read for one at most; compare draws up to 12 others where it is known what they are."""
    made, rows = [], []
    of, row = Examples.of, Examples._row
    monkeypatch.setattr(Examples, "of", lambda self, *given: (made.append(0), of(self, *given))[1])
    monkeypatch.setattr(Examples, "_row", lambda self, *given: (rows.append(0), row(self, *given))[1])
    found = corpus(task=task)
    assert len(list(found.texts())) == 5 and len(told(found)) == len(found) >= 12
    assert len(made) == 16 and 16 <= len(rows) <= 16 * read


def test_a_second_start_makes_no_example(corpus, monkeypatch):
    """Of another manifest, another specification or other code it makes all again."""
    first, made, of = corpus(task="words"), [], Examples.of
    monkeypatch.setattr(Examples, "of", lambda self, *given: (made.append(0), of(self, *given))[1])

    def known(found) -> tuple:
        return told(found), found.rows, list(found.texts()), found.questions

    second = corpus(task="words")
    assert known(second) == known(first) and first.questions and not made
    for file in (corpus.folder.parent / "cache" / "row_index").rglob("*.json"):
        file.write_text(file.read_text()[:-9])
    assert known(corpus(task="words")) == known(first) and len(made) == 16, "damaged"
    assert len(corpus(task="words", filter={"id": first.example(first.rows[0]).id}).rows) == 1 and len(made) == 18
    metadata = corpus.folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text": "', '"text": "zebra ', 1))
    assert any("zebra" in text for text in corpus(task="words").texts()) and len(made) >= 34
    made.clear()
    monkeypatch.setattr("audiophi.training.row_index.code_hash", lambda: "other code")
    corpus(task="words")
    assert len(made) == 16


def test_audio_that_rows_hold_is_read_once(tmp_path, waveform, monkeypatch):
    """Its length and hash are kept for as long as the table is the same."""
    clips = [BytesIO() for _ in range(3)]
    for number, clip in enumerate(clips):
        soundfile.write(clip, waveform(1.0 + number), 16000, format="FLAC")
    rows = [{"audio": {"bytes": clip.getvalue(), "path": "a.flac"}, "text": "a b"} for clip in clips]
    rows.append({"audio": {"bytes": b"no audio", "path": "b.flac"}, "text": "c"})

    def start() -> tuple:
        bad = BadRows(tmp_path / "bad.jsonl", 1.0)
        found = Corpus([Source(str(tmp_path / "rows.parquet"))], bad, cache_dir=str(tmp_path / "cache"))
        return told(found), bad.reasons

    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    first, reasons = start()
    assert [lengths for _, lengths, _ in first] == [(1.0,), (2.0,), (3.0,)] and [row for _, row in reasons] == [3]
    with monkeypatch.context() as patch:
        patch.setattr(Examples, "of", lambda *_: pytest.fail("read again"))
        assert start() == (first, reasons)
    Dataset.from_list(rows[:2] + rows[3:] + rows[:1]).to_parquet(tmp_path / "rows.parquet")
    assert [lengths for _, lengths, _ in start()[0]] == [(1.0,), (2.0,), (1.0,)]


def test_the_alignments_vocabulary_is_kept_by_its_texts(tmp_path, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    whole, short = AlignmentTokenizer(tokenizer), AlignmentTokenizer(tokenizer, merges=5)
    for align in (whole, short, whole):
        for texts in (["one two"], ["one two", "éa"]):
            assert kept_vocab(align, texts, str(tmp_path)) == align.vocab(texts)
    assert len(list((tmp_path / "align_vocab").iterdir())) == 4
    (tmp_path / "full").write_text("")  # where nothing can be written
    assert kept_vocab(whole, ["one"], str(tmp_path / "full")) == whole.vocab(["one"])


def test_ascii_is_cleaned_as_any_other_text():
    text = "".join(f"{a}{b}" for a in map(chr, range(128)) for b in (" ", "x", "'"))
    assert normalise_transcript(text) + " é" == normalise_transcript(text + " é")
    assert plain(text) + " é" == plain(text + " é")
    assert normalise_transcript(f"{string.punctuation} It's 3") == "' it's 3"
