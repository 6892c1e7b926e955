"""The alignment head's second opinion: how a class is spelled."""

import pytest
import torch

from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.alignment_audiophi import AlignmentHead
from modeling_audiophi.spelling_audiophi import Spelling, spell
from tests.conftest import prompts

TEXTS = [" hen", " hens", "hen", " turban"]


def build_spelling(texts=TEXTS, buckets=500, size=8):
    torch.manual_seed(0)
    spellings = [spell(text, buckets) for text in texts]
    spelling = Spelling(len(texts), 6, sum(map(len, spellings)), buckets, size)
    spelling.match(spellings)
    return spelling, spellings


def test_ngrams_know_the_beginning_of_a_word_and_what_words_share():
    plain, plural, inside, other = (set(spell(text, 30_000)) for text in TEXTS)
    assert len(plain) == len("<hen>") + 4 + 3  # single characters, pairs, triples
    assert len(plain & plural) > len(plain & other)
    assert plain != inside and len(plain & inside) >= 6  # "hen" within a word is spelled alike, but begins no word


def test_vectors_are_scaled_sums_of_their_ngrams():
    spelling, spellings = build_spelling()
    for vector, ngrams in zip(spelling.vectors(), spellings, strict=True):
        assert torch.allclose(vector, spelling.table[ngrams].sum(0) / len(ngrams) ** 0.5, atol=1e-5)


def test_spelling_is_added_to_the_scores_of_the_words_and_not_to_the_blank():
    spelling, spellings = build_spelling()
    sizes = {"entries": sum(map(len, spellings)), "buckets": 500, "size": 8}
    head = AlignmentHead(4, 6, sizes)
    head.spelling.load_state_dict(spelling.state_dict())
    tokens, table = torch.randn(2, 3, 6), torch.randn(4, 6)
    scores = head.logits(tokens, table)
    expected = head.scale * tokens @ table.T + head.spelling.query(head.scale * tokens) @ spelling.vectors().T
    assert torch.allclose(scores[..., 1:], expected, atol=1e-4)
    assert torch.allclose(scores[..., 0], head.scale * tokens @ head.blank, atol=1e-5)
    scores.sum().backward()
    assert head.spelling.table.grad.abs().sum() > 0 and head.spelling.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("slim", [True, False])
def test_a_checkpoint_keeps_it(make_tiny_model, waveform, tmp_path, slim):
    _, processor = make_tiny_model()
    texts = [processor.tokenizer.decode([index]) for index in range(10, 310)]
    model, processor = make_tiny_model(align_spelling={"texts": texts, "buckets": 200, "size": 8})
    assert model.config.align_spelling["entries"] == len(model.model.alignment.spelling.ngrams)
    model.save_pretrained(tmp_path, slim=slim)
    again = AudioPhiForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = prompts(processor, [[waveform(0.8)]])
    audio = {name: value for name, value in inputs.items() if name.startswith(("input_feat", "audio_"))}
    first, second = (m.get_audio_features(**audio, with_alignment=True).align_logits for m in (model, again))
    # The same weights; where they lie in memory may change a product's last bits.
    kept = again.model.alignment.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.model.alignment.state_dict().items())
    assert torch.allclose(first, second, atol=1e-6) and again.dtype == torch.float32
    assert again.model.alignment.spelling.ngrams.dtype == torch.int16


def test_half_precision_does_not_touch_the_ngrams(make_tiny_model, tmp_path):
    _, processor = make_tiny_model()
    texts = [processor.tokenizer.decode([index]) for index in range(10, 310)]
    model, _ = make_tiny_model(align_spelling={"texts": texts, "buckets": 30_000, "size": 8})
    expected = model.model.alignment.spelling.ngrams.clone()
    model.save_pretrained(tmp_path)
    again = AudioPhiForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.model.alignment.spelling.ngrams, expected)
