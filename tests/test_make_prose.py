"""Sentences from books."""

import bz2
import json
import struct
import zlib

import pytest

import make_prose as maker

BOOK = """CHAPTER ONE

"Mr. Bennet had no choice--none at all," said she; but it was not to be thought of.
He went. The year 1811 was a very cold one indeed.

_Every body_ walked to the village in the rain, and no one spoke.
"""


def test_sentences_are_whole_and_readable():
    assert maker.sentences(BOOK) == [
        "Mr Bennet had no choice, none at all, said she;",
        "but it was not to be thought of.",
        "Every body walked to the village in the rain, and no one spoke.",
    ]  # neither the heading, nor what is too short, nor figures that can be read in several ways


def test_held_out_texts_are_left_out(tmp_path, capsys):
    book, held_out, out = tmp_path / "book.txt", tmp_path / "metadata.jsonl", tmp_path / "out.txt"
    book.write_text(BOOK)
    held_out.write_text(json.dumps({"text": "WALKED TO THE VILLAGE IN A COACH"}) + "\n")
    assert maker.main([str(out), str(book), "--without", str(held_out)]) == 0
    assert len(out.read_text().splitlines()) == 3, "five words in a row are no quotation"
    held_out.write_text(json.dumps({"text": "WALKED TO THE VILLAGE IN THE RAIN"}) + "\n")
    assert maker.main([str(out), str(book), "--without", str(held_out)]) == 0
    assert len(out.read_text().splitlines()) == 2 and "village" not in out.read_text()
    assert maker.main([str(out), str(book), "--lines", "1"]) == 0
    assert len(out.read_text().splitlines()) == 1


def r_strings(lines):
    return b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line.encode() for line in lines)


@pytest.mark.parametrize("kind", ["zlib", "bz2"])
def test_an_r_database_is_read(kind):
    chunks = []
    for lines in (["a b", ""], ["c"]):
        raw = r_strings(lines)
        packed = zlib.compress(raw) if kind == "zlib" else b"2" + bz2.compress(raw)
        chunks.append(struct.pack(">I", len(raw)) + packed)
    assert maker.read_rdb(b"".join(chunks)) == "a b\n\nc"


def test_what_is_no_book_is_refused(tmp_path, capsys):
    (tmp_path / "x.rdb").write_bytes(b"this is no database")
    (tmp_path / "empty.txt").write_text("ONE\n")
    for name, message in (("x.rdb", "not an R"), ("empty.txt", "no sentences"), ("missing.txt", "missing.txt")):
        assert maker.main([str(tmp_path / "out.txt"), str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()
