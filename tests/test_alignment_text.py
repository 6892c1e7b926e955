"""Transcript normalisation and the short-unit tokenisation of CTC targets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from audiophi.data.alignment_text import AlignmentTokenizer, normalise_transcript


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_dir):
    return AutoTokenizer.from_pretrained(tiny_llm_dir)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("HE WENT  HOME", "he went home"),
        ("“Don’t,” she said—twice!", "don't she said twice"),
        ("well-known\tÉcole, 3 o'clock\n", "well known école 3 o'clock"),
        ("...", ""),
        ("E\u0301cole", "école"),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_lower(text, expected):
    assert normalise_transcript(text) == expected
    assert normalise_transcript(expected) == expected


def test_keep_only_collapses_spaces():
    assert normalise_transcript("  Well-known,\n Sir! ", "keep") == "Well-known, Sir!"
    with pytest.raises(ValueError, match="'title' is not one of lower, keep"):
        normalise_transcript("a", "title")


@settings(max_examples=60)
@given(text=st.text(alphabet="abcdefghijklmnopqrstuvwxyz' é3", max_size=40), merges=st.sampled_from([None, 0, 5, 50]))
def test_decode_returns_the_text(tokenizer, text, merges):
    text = normalise_transcript(text)
    units = AlignmentTokenizer(tokenizer, merges)
    assert units.decode(units.encode(text)) == text


def test_fewer_merges_make_shorter_units_with_the_llms_own_ids(tokenizer):
    text = "the quick brown fox"
    counts = [len(AlignmentTokenizer(tokenizer, merges).encode(text)) for merges in (0, 20, 60, None)]
    assert counts == sorted(counts, reverse=True) and counts[0] == len(text) + 1 and counts[-1] < counts[0]
    assert AlignmentTokenizer(tokenizer, None).encode(text) == tokenizer(" " + text)["input_ids"]
    for token in tokenizer.convert_ids_to_tokens(AlignmentTokenizer(tokenizer, 20).encode(text)):
        assert len(token) <= 4


def test_the_first_word_is_tokenised_as_inside_a_sentence(tokenizer):
    units = AlignmentTokenizer(tokenizer, 20)
    assert units.encode("fox fox") == units.encode("fox") * 2
    assert units.encode("  ") == [] == units.encode("")


def test_vocabulary_covers_the_texts_and_every_letter(tokenizer):
    units = AlignmentTokenizer(tokenizer, 20)
    vocabulary = units.vocab(["the quick fox", "3 bears"])
    assert vocabulary == sorted(set(vocabulary)) and max(vocabulary) < len(tokenizer)
    spelled = AlignmentTokenizer(tokenizer, 0)
    for word in ("xylophone", "don't"):
        # The space before a word is in the vocabulary because the texts have words.
        assert set(spelled.encode(word)[1:]) <= set(vocabulary)
    assert set(units.encode("the quick")) <= set(vocabulary)
    assert set(units.encode("37")) <= set(vocabulary), "digits are spelled where there are digits"
    assert not set(units.encode("X")) <= set(vocabulary)


@pytest.mark.parametrize(("text", "word"), [("это мой дом", "щука"), ("你好世界", "丗")])
def test_vocabulary_spells_the_script_of_the_texts(tokenizer, text, word):
    spelled = AlignmentTokenizer(tokenizer, 0)
    assert not set(word) & set(text)
    for units in (spelled, AlignmentTokenizer(tokenizer, None)):
        assert set(spelled.encode(word)) <= {*units.vocab([text]), *spelled.encode("x")}
    assert not set(spelled.encode(word)) <= {*spelled.vocab(["the fox"]), *spelled.encode("x")}


def test_a_tokenizer_that_puts_a_space_itself_gets_no_other():
    """As SentencePiece's of the Llama 2 family do."""
    pieces = ["<unk>", "▁", "t", "h", "e", "x", "th", "▁th", "▁the"]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        [("t", "h"), ("▁", "th"), ("▁th", "e")], unk_token="<unk>", fuse_unk=True,
    )  # fmt: skip
    words = Tokenizer(model)
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    units = AlignmentTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    assert units.encode("the the") == [8, 8]
    assert {2, 3, 4, 5} <= set(units.vocab(["the"])), "letters inside of a word"


def test_special_tokens_in_a_transcript_do_not_reach_the_decoded_text(tokenizer):
    units = AlignmentTokenizer(tokenizer, 20)
    assert units.decode([*units.encode("fox"), tokenizer.eos_token_id]) == "fox"


def test_only_a_bpe_can_be_truncated(tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match="merges=10.*WordLevel"):
        AlignmentTokenizer(fast, 10)
    with pytest.raises(ValueError, match="merges=-1"):
        AlignmentTokenizer(tokenizer, -1)
