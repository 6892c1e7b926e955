"""Word error rates: normalisation, counting, intervals, shuffling, the summary of predictions."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.evaluation.conditions import silence_length
from audiophi.evaluation.metrics import (
    bootstrap_interval,
    character_error_rate,
    count_errors,
    derangement,
    word_error_rate,
)
from audiophi.evaluation.text_normalization import language_code, normalize, normalizer_name
from audiophi.evaluation.transcripts import errors_of, rate_so_far, summarize

WORDS = st.sampled_from("red green blue yellow black white".split())
SENTENCES = st.lists(WORDS, max_size=6).map(" ".join)


def prediction(row, reference, hypothesis, **more):
    base = {
        "row": row,
        "id": str(row),
        "speaker": None,
        "seconds": 2.0,
        "reference": reference,
        "hypothesis": hypothesis,
        "hypothesis_align": None,
        "stopped": True,
        "compute_seconds": 0.5,
    }
    return {**base, **errors_of(reference, hypothesis), **more}


def test_normaliser_forgives_writing_and_not_words():
    assert normalize("Mr. Smith won't pay, um, for the COLOUR!") == "mister smith will not pay for the color"
    assert normalize(" ?! ") == ""
    assert "whisper-normalizer" in normalizer_name() and any(c.isdigit() for c in normalizer_name())


def test_normalisers_by_language():
    assert normalize("Für die Mädchen, ja!", "de-AT") == "für die mädchen ja"
    assert normalize("नमस्ते, दुनिया।", "Hindi") == "नमस्ते दुनिया"
    assert normalize("你好，世 界！👍️", "zh-CN") == "你好世界" and normalize("สวัสดี ครับ", "th") == "สวัสดีครับ"
    assert normalize("As  Written, um!", "none") == "As Written, um!"
    assert (
        normalizer_name(["de", None, "zh"]).count("whisper-normalizer") == 2
        and normalizer_name(["none"]) == "as written"
    )
    assert [language_code(name) for name in ("German", "zh_TW", "yue", "Kauderwelsch")] == ["de", "zh", "yue", None]


def test_characters_are_counted_where_words_have_no_spaces():
    texts = [("你好世界", "你好世", "zh"), ("今天天气", "今天天气", "Chinese"), ("a red fox", "a fox", None)]
    rows = [
        prediction(number, *pair, language=language, **errors_of(*pair, language))
        for number, (*pair, language) in enumerate(texts)
    ]
    scores = summarize(rows[:2])
    assert scores["main_score"] == "cer" and scores["cer"] == 12.5 and scores["characters"] == 8
    assert not any(key.startswith("wer") or key == "words" for key in scores) and scores["listening_gap"] is not None
    assert rows[0]["deletions"] == 1 and rows[0]["words"] == 4
    mixed = summarize(rows)
    assert mixed["main_score"] == "wer" and mixed["wer"] == pytest.approx(100 * 2 / 11)


def test_word_error_rate_is_a_corpus_level_percentage():
    nine_for_two = count_errors("he went", "he had gone away with all of the others")
    assert word_error_rate([nine_for_two]) == 400.0  # he right, went wrong, seven words too many
    right = count_errors("one two three four five six seven eight", "one two three four five six seven eight")
    mean_of_utterances = 200.0
    assert word_error_rate([nine_for_two, right]) != mean_of_utterances
    assert word_error_rate([nine_for_two, right]) == pytest.approx(100 * 8 / (2 + right.words))


def test_kinds_of_errors():
    counts = count_errors("the cat sat on a mat", "the hat sat a mat today")
    assert (counts.substitutions, counts.deletions, counts.insertions, counts.words) == (1, 1, 1, 6)
    assert character_error_rate([count_errors("abcd", "abxd")]) == 25.0


def test_empty_reference_and_hypothesis():
    assert count_errors("", "two words").insertions == 2
    assert count_errors("two words", "").deletions == 2
    assert word_error_rate([count_errors("", "word")]) is None
    assert word_error_rate([]) is None


@settings(deadline=None, max_examples=50)
@given(SENTENCES, SENTENCES)
def test_counts_add_up(reference, hypothesis):
    counts = count_errors(reference, hypothesis)
    hits = counts.words - counts.substitutions - counts.deletions
    assert hits >= 0
    assert hits + counts.substitutions + counts.insertions == len(normalize(hypothesis).split())
    assert (counts.errors == 0) == (normalize(reference) == normalize(hypothesis))


def test_interval_contains_the_rate_and_is_reproducible():
    counts = [count_errors("red green blue black", "red green blue white" if i % 3 else "red green") for i in range(60)]
    (low, high), unit = bootstrap_interval(counts, [None] * 60)
    assert low < word_error_rate(counts) < high and unit == "utterance"
    assert bootstrap_interval(counts, [None] * 60)[0] == [low, high]


def test_interval_over_speakers_is_wider_where_speakers_differ():
    counts = [count_errors("red green blue", "red green blue" if i < 30 else "") for i in range(60)]
    speakers = [str(i // 10) for i in range(60)]
    (low, high), unit = bootstrap_interval(counts, speakers)
    (low_utterances, high_utterances), _ = bootstrap_interval(counts, [None] * 60)
    assert unit == "speaker"
    assert high - low > 1.5 * (high_utterances - low_utterances)
    assert bootstrap_interval(counts, ["a", "b"] * 30)[1] == "utterance"  # two speakers say nothing about others


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.integers(0, 3))
def test_derangement_gives_everyone_another_text(texts, seed):
    order = derangement(texts, seed)
    if len(set(texts)) < 2:
        assert order is None
        return
    assert sorted(order) == list(range(len(texts)))
    if max(texts.count(text) for text in texts) <= len(texts) / 2:
        assert all(texts[index] != texts[other] for index, other in enumerate(order))


def test_a_model_that_listens_has_a_gap_and_one_that_does_not_has_none():
    texts = ["red green blue", "yellow black", "white red yellow green", "black blue"]
    listening = summarize([prediction(i, text, text) for i, text in enumerate(texts)])
    assert listening["wer"] == 0 and listening["listening_gap"] == listening["wer_shuffled_audio"] > 50
    deaf = summarize([prediction(i, text, "red green blue") for i, text in enumerate(texts)])
    assert deaf["wer"] > 0 and deaf["listening_gap"] == 0


def test_summary():
    predictions = [
        prediction(0, "red green", "red", hypothesis_align="red green"),
        prediction(1, "blue", "", stopped=False, hypothesis_align="green", seconds=1.2),
        {"row": 2, "id": "2", "error": "damaged", "readable": False},
    ]
    quiet = [prediction(0, "red green", ""), prediction(1, "blue", "blue"), {"row": 2, "error": "damaged"}]
    scores = summarize(predictions, conditions={"silence": quiet})
    assert rate_so_far(predictions) == "66.67" and rate_so_far([]) == "-"
    assert scores["wer"] == pytest.approx(100 * 2 / 3)
    assert (scores["utterances"], scores["words"], scores["deletions"]) == (2, 3, 2)
    assert scores["wer_align"] == pytest.approx(100 / 3)
    assert scores["wer_silence"] == pytest.approx(100 * 2 / 3)
    assert scores["never_stopped"] == scores["empty"] == 50.0
    assert scores["rtf"] == pytest.approx(1.0 / 3.2)


def test_summary_without_an_llm_or_without_rows():
    only_alignment = summarize([prediction(0, "red", None, hypothesis_align="red", stopped=None)])
    assert only_alignment["wer"] is None and only_alignment["wer_align"] == 0
    assert only_alignment["never_stopped"] is None
    assert summarize([])["wer"] is None


@given(st.floats(0.01, 100))
def test_silence_is_as_long_as_the_clip(seconds):
    assert seconds <= silence_length(seconds) < seconds + 0.5 + 1e-9


def test_as_a_metric_of_evaluate(monkeypatch, tmp_path):
    import evaluate

    folder = Path(__file__).resolve().parents[1] / "audiophi" / "evaluation" / "wer"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    scores = metric.compute(predictions=["The cat!", "a b"], references=["the cat sat", "a b"])
    assert scores["wer"] == pytest.approx(20) and scores["deletions"] == 1 and scores["words"] == 5
