"""The sentences of data/: made by the tool, all different, and nothing that anybody must apologise for."""

import re
from pathlib import Path

import pyarrow.parquet
import pytest

import make_everyday_sentences as maker

DATA = Path(__file__).resolve().parents[1] / "data"
SENTENCES = (DATA / "sentences.txt").read_text(encoding="utf-8").splitlines()
# Parts of words that have no business in a newcomer's first sentences.
UNWANTED = """
kill murder rape slave suicid blood weapon gun bomb war soldier dead death die hang hate terror nazi racis shoot stab
sex nude naked breast porn prostitut whore bitch damn hell fuck shit bastard slut
god lord jesus christ bible church priest pray sin satan devil jew muslim islam heathen
drug cocaine heroin beer wine vodka drunk cigar smok
president minister election vote communis fascis
""".split()
ALLOWED = ("church tower",)


def test_nothing_unwanted_is_said():
    text = " ".join(SENTENCES)
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    words = set(text.split())
    whole = {"die", "war", "sin", "god", "gun", "hell", "hang", "lord", "vote", "dead", "jew"}
    found = {w for w in words for part in UNWANTED if (w == part if part in whole else w.startswith(part))}
    assert not found


def test_the_file_is_what_the_tool_makes(tmp_path):
    assert maker.main([str(tmp_path / "out.txt"), "--sentences", str(len(SENTENCES))]) == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == SENTENCES


def test_sentences_are_different_and_plain():
    assert len(set(SENTENCES)) == len(SENTENCES) == 3000
    assert all(re.fullmatch(r"[a-z' ]+", sentence) for sentence in SENTENCES)
    assert all(2 <= len(sentence.split()) <= 20 for sentence in SENTENCES)
    digits = "|".join(maker.ONES[:10])
    assert not any(re.search(rf"\b(?!{digits})(\w+) \1\b|\ba [aeio]", sentence) for sentence in SENTENCES)


def test_the_embedded_speech_says_them():
    parts = [pyarrow.parquet.read_table(DATA / "synthetic_speech" / f"{part}-00000.parquet",
             columns=["text", "gender", "speaker"]) for part in ("train", "dev", "test")]  # fmt: skip
    train, dev, test = (part["text"].to_pylist() for part in parts)
    assert [*train, *dev, *test] == SENTENCES and len(dev) == len(test) == 40
    assert {value for part in parts for value in part["gender"].to_pylist()} == {"male", "female"}
    size = sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file())
    assert size < 25e6
    said = {word for sentence in train for word in sentence.split()}
    assert {word for sentence in [*dev, *test] for word in sentence.split()} <= said


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (58, "fifty eight"), (100, "one hundred"),
     (507, "five hundred and seven")],
)  # fmt: skip
def test_numbers_are_spoken(number, words):
    assert maker.words_of(number) == words


def test_sums_are_right():
    sums = [sentence for sentence in SENTENCES if " plus " in sentence]
    assert len(sums) > 10
    for sentence in sums:
        one, two, total = re.fullmatch(r"(.+) plus (.+) is (.+)", sentence).groups()
        assert maker.words_of(maker.numbers_of(one) + maker.numbers_of(two)) == total


@pytest.mark.parametrize("count", ["0", "30000"])
def test_bad_arguments_are_refused(tmp_path, count):
    with pytest.raises(SystemExit):
        maker.main([str(tmp_path / "out.txt"), "--sentences", count])
