"""Scores of captions: against figures worked out by hand or frozen from the official programs."""

import math
import sys

import pytest

from audiophi.evaluation.caption_metrics import (
    MetricsMissing,
    caption_scores,
    label_accuracy,
    names_class,
    official_scores,
    stem,
    tokenize,
)
from audiophi.evaluation.captions import summarize as summarize_captions

CLASSES = ["dog bark", "rain", "sea waves", "engine idling", "violin or fiddle"]


@pytest.mark.parametrize(
    "caption, tokens",
    [  # frozen from Stanford's PTBTokenizer 3.4.1 -preserveLines -lowerCase, less coco-caption's punctuation
        ("A person's dog doesn't bark, it can't!", "a person 's dog does n't bark it ca n't"),
        ("Someone cannot speak; they're quiet.", "someone can not speak they 're quiet"),
        ("A walkie-talkie (old) beeps - 3 times", "a walkie-talkie -lrb- old -rrb- beeps 3 times"),
        ("Loud metal/rock music at 7.5 or 1,000 Hz", "loud metal/rock music at 7.5 or 1,000 hz"),
        ('The dogs\' barks:  "woof"...', "the dogs barks woof"),
    ],
)
def test_tokens_are_those_of_the_official_tokenizer(caption, tokens):
    # The official scripts lower-case -LRB- and then fail to recognise it as punctuation; nobody gains from that.
    assert tokenize(caption) == [token for token in tokens.split() if token not in ("-lrb-", "-rrb-")]


def test_bleu_and_rouge_by_hand():
    scores = caption_scores(["a dog barks loudly"], [["A dog barks.", "Rain!"]])
    # Unigrams 3 of 4, bigrams 2 of 3, trigrams 1 of 2; the closest reference is shorter: no brevity penalty.
    assert scores["bleu_1"] == pytest.approx(3 / 4, abs=1e-6)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3), abs=1e-6)
    assert scores["bleu_3"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3), abs=1e-6)
    precision, recall, beta = 3 / 4, 1.0, 1.2
    rouge = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert scores["rouge_l"] == pytest.approx(rouge, abs=1e-6)
    assert scores["cider_d"] is None, "CIDEr-D needs two clips"


def test_cider_d_by_hand():
    # Two clips with one reference of one word each: idf = ln 2, cosine 1 for unigrams, none for longer: 10 / 4.
    scores = caption_scores(["Dog.", "cat"], [["dog"], ["rain"]])
    assert scores["cider_d"] == pytest.approx((10 / 4 + 0) / 2)
    # What is in every clip's references says nothing.
    assert caption_scores(["dog", "dog"], [["dog"], ["dog"]])["cider_d"] == 0


def test_case_and_punctuation_do_not_count_and_silence_scores_nothing():
    references = [["A dog is barking.", "Dog barks!"], ["Rain is falling.", "It rains."]]
    shouted = caption_scores(["A DOG IS BARKING", "RAIN IS FALLING"], references)
    assert shouted == caption_scores(["a dog is barking.", "Rain, is falling..."], references)
    assert shouted["bleu_4"] == pytest.approx(1, abs=1e-5) and shouted["rouge_l"] == pytest.approx(1)
    empty = caption_scores(["", "."], references)
    assert empty["cider_d"] == empty["rouge_l"] == 0 and empty["bleu_1"] < 1e-6
    assert set(caption_scores([], []).values()) == {None}
    with pytest.raises(ValueError, match="clip 1: none of its references has a word"):
        caption_scores(["a", "b"], [["a"], ["...", ""]])


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aac_metrics.functional", None)
    for metric in (caption_scores, official_scores):
        with pytest.raises(MetricsMissing, match=r"pip install -e '.\[caption\]'"):
            metric(["a", "b"], [["a"], ["b"]])


def test_official_set_without_java_says_so(monkeypatch):
    monkeypatch.setenv("AAC_METRICS_JAVA_PATH", "/no/such/java")
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", "/no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MetricsMissing, match="Java 8 to 13 .* `aac-metrics-download`"):
        official_scores(["a dog", "rain"], [["a dog"], ["rain"]])


@pytest.mark.parametrize(
    "words",
    [
        "bark barks barking barked",
        "cry cries crying",
        "wave waves",
        "sneeze sneezes sneezing sneezed",
        "clap claps clapping clapped",
        "idle idling",
        "buzz buzzing buzzes",
        "fall falls falling",
        "glass glasses",
    ],
)
def test_inflections_have_one_stem(words):
    assert len({stem(word) for word in words.split()}) == 1


def test_different_words_have_different_stems():
    words = "rain train siren rooster wing wind waves wood door dog cat crow cow clock can car bus bass horse engine"
    assert len({stem(word) for word in words.split()}) == len(words.split())


@pytest.mark.parametrize(
    "caption, label, named",
    [
        ("A dog is barking.", "dog bark", True),
        ("a barking dog", "dog bark", True),
        ("a dog growls", "dog bark", False),  # half of the label
        ("a dog barks in the rain", "dog bark", False),  # another class as well
        ("waves on a sea", "sea waves", True),
        ("the training of a dog that barks", "dog bark", True),  # rain is not in training
        ("an engine and a dog that barks", "dog bark", True),  # an engine is only half of a class
        ("a violin or a fiddle", "violin or fiddle", True),
        ("", "rain", False),
    ],
)
def test_a_caption_names_its_class_and_no_other(caption, label, named):
    assert names_class(caption, label, CLASSES) is named


def test_a_part_of_the_label_is_no_other_class():
    classes = ["engine", "engine idling"]
    assert names_class("an engine is idling", "engine idling", classes)
    assert not names_class("an engine is idling", "engine", classes)
    assert names_class("an engine starts", "engine", classes)


def test_label_accuracy_is_a_percentage():
    captions = ["a dog barks", "a dog barks", "rain", "rain"]
    assert label_accuracy(captions, ["dog bark", "rain", "rain", "rain"], CLASSES) == 75
    assert label_accuracy([], [], CLASSES) is None


def predictions(heard, labels=("dog bark", "rain", "dog bark", "rain")):
    references = {"dog bark": ["A dog is barking.", "A dog bark."], "rain": ["Rain is falling.", "Rain."]}
    return [
        {
            "row": row, "hypothesis": text, "references": references[label], "label": label, "seconds": 2.0,
            "stopped": True, "compute_seconds": 0.5,
        }
        for row, (text, label) in enumerate(zip(heard, labels, strict=True))
    ]  # fmt: skip


def test_a_model_that_listens_has_a_gap_and_one_that_does_not_has_none():
    listens = summarize_captions(predictions(["a dog bark", "rain", "a dog bark", "rain"]))
    assert listens["label_accuracy"] == 100 and listens["label_accuracy_shuffled"] == 0
    assert listens["listening_gap"] == 100 and listens["listening_gap_of"] == "label_accuracy"
    assert listens["cider_d"] > 1 > listens["cider_d_shuffled"] == 0 and listens["distinct_captions"] == 2
    assert listens["classes"] == 2 and listens["references"] == 8 and listens["rtf"] == 0.25
    deaf = summarize_captions(predictions(["rain"] * 4))
    assert deaf["label_accuracy"] == deaf["label_accuracy_shuffled"] == 50 and deaf["listening_gap"] == 0
    assert deaf["cider_d"] == pytest.approx(deaf["cider_d_shuffled"]) and deaf["distinct_captions"] == 1


def test_classes_of_the_data_without_a_prediction_count_as_others():
    heard = predictions(["a dog barks at the sea waves", "rain", "a dog bark", "rain"])
    assert summarize_captions(heard)["label_accuracy"] == 100
    assert summarize_captions(heard, CLASSES)["label_accuracy"] == 75


def test_without_classes_the_gap_is_of_cider_d():
    captions = predictions(["a dog bark", "rain", "a dog bark", "rain"])
    scores = summarize_captions([{**p, "label": None} for p in captions])
    assert scores["label_accuracy"] is scores["label_accuracy_shuffled"] is None
    assert scores["listening_gap_of"] == "cider_d"
    assert (
        scores["listening_gap"] == pytest.approx(scores["cider_d"] - scores["cider_d_shuffled"]) and scores["cider_d"]
    )


def test_one_clip_and_errors_leave_what_can_be_said():
    (only,) = predictions(["a dog bark"], ["dog bark"])
    scores = summarize_captions([{"row": 7, "error": "broken", "readable": False}, only])
    assert scores["clips"] == 1 and scores["label_accuracy"] == 100 and scores["bleu_1"] > 0
    assert scores["cider_d"] is scores["label_accuracy_shuffled"] is scores["listening_gap"] is None
    assert summarize_captions([])["clips"] == 0


def test_training_goes_on_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "aac_metrics.functional", None)
    scores = summarize_captions(predictions(["a dog bark", "rain", "rain", "rain"]), with_package=False)
    assert scores["cider_d"] is None and scores["label_accuracy"] == 75
