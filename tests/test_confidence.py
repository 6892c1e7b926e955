"""How sure two ears are of a word."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import pipeline

from modeling_audiophi.confidence_audiophi import UNFITTED, fitted, found_in, plain, word_confidence, word_votes
from tests.test_ears import whisper_dir  # noqa: F401, a fixture
from tools.measure_confidence import reliability

WORDS = st.lists(st.sampled_from(["a", "dog", "barks", "the", "bark", "Fox,"]), max_size=8)


def test_each_text_votes_with_its_probability():
    """exp(-0.1 * 4) and exp(-0.4 * 4) of three words and an end; capitals and marks do not count."""
    pairs = [("The fox, runs", -0.1), ("the box runs", -0.4)]
    first, second = math.exp(-0.4), math.exp(-1.6)
    votes = word_votes("The fox, runs", pairs, "fox run")
    assert [heard for _, heard in votes] == [0, 1, 0]
    assert [share for share, _ in votes] == pytest.approx([1, first / (first + second), 1])
    sure = word_confidence("The fox, runs", pairs, "fox run", (-1, 2, 3))
    assert sure == pytest.approx([1 / (1 + math.exp(-logit)) for logit in (1, 2 + 2 * votes[1][0], 1)])
    assert word_confidence("so", [], None) == pytest.approx([1 / (1 + math.exp(-UNFITTED[0]))])


@given(WORDS, WORDS)
@hypothesis_settings(deadline=None)
def test_a_word_is_found_where_a_text_has_it_in_order(words, others):
    found = found_in(" ".join(words), " ".join(others))
    assert len(found) == len(words) and all(found_in(" ".join(words), " ".join(words)))
    rest = map(plain, others)  # what is found is a subsequence of the other text
    assert all(plain(word) in rest for word, there in zip(words, found, strict=True) if there)


@pytest.mark.parametrize(
    ("text", "other", "missing"),
    [
        ("Dr. Smith saw 9 dogs.", "doctor smith saw nine cats", ["dogs."]),
        ("late by 209 minutes", "it was late by two hundred and nine minutes", []),
        ("late by two hundred and nine minutes", "late by 209 minutes", []),
        ("We don't know: 9 of 10", "we do not know nine of eleven", ["10"]),
        ("Es war schön, Dr. Müller", "es war schon dr. müller", ["schön,"]),
        ("um yes", "yes", ["um"]),
    ],
)
def test_numbers_and_titles_agree_however_they_are_written(text, other, missing):
    found = found_in(text, other)
    assert [word for word, there in zip(text.split(), found, strict=True) if not there] == missing


def test_what_is_fitted_is_calibrated():
    """Of words with the same votes as many are right as it says."""
    torch.manual_seed(0)
    kinds = {(1.0, 1.0): 0.99, (1.0, 0.0): 0.8, (0.4, 1.0): 0.7, (0.4, 0.0): 0.2}
    votes = [kind for kind in kinds for _ in range(2000)]
    right = [bool(torch.rand(()) < kinds[kind]) for kind in votes]
    weights = fitted(votes, right)
    for kind, share in kinds.items():
        logit = weights[0] + weights[1] * kind[0] + weights[2] * kind[1]
        assert 1 / (1 + math.exp(-logit)) == pytest.approx(share, abs=0.06)
    assert all(abs(value) < 20 for value in fitted([(1.0, 1.0)] * 50, [True] * 50))


def test_reliability_of_words():
    rows, error = reliability([0.1, 0.15, 0.97, 1.0], [False, True, True, True])
    assert [row[:3] for row in rows] == [(0.0, 0.2, 2), (0.95, 0.98, 1), (0.98, 1.0, 1)]
    assert [row[4] for row in rows] == [0.5, 1.0, 1.0] and error == pytest.approx((2 * 0.375 + 0.03) / 4)


def test_the_pipeline_tells_it_of_every_word(make_tiny_model, whisper_dir, waveform, monkeypatch):  # noqa: F811
    model, processor = make_tiny_model(audio=whisper_dir, hear_with="both", readout="collapse")
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    clip = {"raw": waveform(0.7), "sampling_rate": 16_000}
    texts = [("the fox runs", -0.1), ("the box runs", -0.4)]
    monkeypatch.setattr(model, "_decoder", (lambda *args: [texts], model.words_decoder()[1]), raising=False)
    monkeypatch.setattr(model.model.alignment, "greedy", lambda *args: [model.words_as_tokens("fox runs")])
    how = {"task": "transcribe", "verbatim": True, "hear_ctc_weight": 0.0, "hear_confidence": [-1.0, 2.0, 3.0]}
    plain = pipe(clip, **how)
    result = pipe(clip, return_confidence=True, return_timestamps="word", **how)
    wanted = word_confidence("the fox runs", texts, "fox runs", (-1.0, 2.0, 3.0))
    assert plain == {"generated_text": "the fox runs"} and result["generated_text"] == "the fox runs"
    assert [word["text"] for word in result["words"]] == ["the", "fox", "runs"]
    assert [word["confidence"] for word in result["words"]] == pytest.approx(wanted, abs=1e-3)
    assert [chunk["confidence"] for chunk in result["chunks"]] == [word["confidence"] for word in result["words"]]
    json.dumps(result)
    rows = pipe([clip, clip], return_confidence=True, batch_size=1, **how)
    assert [row["words"] for row in rows] == [result["words"]] * 2
    assert "words" not in pipe(clip, instruction="Who?", return_confidence=True, max_new_tokens=2)
    model.config.hear_with = "alignment"
    with pytest.raises(ValueError, match="return_confidence: how sure a word is takes two ears"):
        pipe(clip, return_confidence=True)
