"""Alignment head: CTC, greedy decoding and the collapse."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.alignment_audiophi import NO_TARGET, AlignmentHead
from modeling_audiophi.ctc_loss_audiophi import ctc_negative_log_likelihood
from modeling_audiophi.lengths_audiophi import length_mask
from tests.conftest import prompts, random_like_trained

VOCAB_IDS = torch.tensor([3, 7, 8, 20])
TABLE = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
WORDS = TABLE[VOCAB_IDS]


def build_head():
    torch.manual_seed(0)
    head = AlignmentHead(len(VOCAB_IDS), 6)
    head.vocab_ids.copy_(VOCAB_IDS)
    return head


def path_logits(path, peak=20.0):
    """Logits whose best path is `path` (classes)."""
    return peak * torch.nn.functional.one_hot(torch.tensor(path), len(VOCAB_IDS) + 1).float()[None]


def test_logits_are_scores_against_the_embedding_table():
    head = build_head()
    head.scale.data.fill_(2.0)
    head.bias.data[3] = 0.5
    tokens = torch.randn(1, 2, 6)
    logits = head.logits(tokens, WORDS)
    assert logits.shape == (1, 2, 5)
    assert torch.allclose(logits[0, 1, 3], 2 * tokens[0, 1] @ TABLE[8] + 0.5, atol=1e-5)
    assert torch.allclose(logits[0, 0, 0], 2 * tokens[0, 0] @ head.blank, atol=1e-5)
    assert torch.allclose(head.logits(tokens, 7 * WORDS, 7.0), logits, atol=1e-5)  # an LLM that scales its embeddings


def brute_force_ctc(log_probs, target):
    """Sum over all paths of one clip, by enumeration."""
    total = -math.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        if merged == target:
            score = sum(float(log_probs[t, symbol]) for t, symbol in enumerate(path))
            total = max(total, score) + math.log1p(math.exp(-abs(total - score))) if total > -math.inf else score
    return -total


def test_ctc_loss_is_the_mean_over_clips_of_loss_per_token():
    head = build_head()
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[7, 7, -100], [20, -100, -100]])
    loss, skipped = head.ctc_loss(logits, torch.tensor([4, 2]), labels)
    first = brute_force_ctc(logits[0].log_softmax(-1), [2, 2]) / 2
    second = brute_force_ctc(logits[1, :2].log_softmax(-1), [4])
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-4)
    assert skipped == 0
    total, _ = head.ctc_loss(logits, torch.tensor([4, 2]), labels, num_items=8)
    assert total.item() == pytest.approx((first + second) / 8, rel=1e-4)


def test_nothing_known_and_nobody_speaking_are_two_things():
    """NO_TARGET costs nothing, whatever else stands in the row; an empty target asks for blanks."""
    head = build_head()
    logits, lengths = torch.randn(3, 4, 5, requires_grad=True), torch.tensor([4, 4, 2])
    labels = torch.tensor([[7, 7, -100], [NO_TARGET, 20, 20], [-100, -100, -100]])
    loss, skipped = head.ctc_loss(logits, lengths, labels)
    expected, _ = head.ctc_loss(logits[[0, 2]], lengths[[0, 2]], labels[[0, 2]])
    assert torch.allclose(loss, expected) and skipped == 0
    blank = -logits[2, :2].log_softmax(-1)[:, 0].mean()
    first, _ = head.ctc_loss(logits[:1], lengths[:1], labels[:1])
    assert torch.allclose(loss, (first + blank) / 2, atol=1e-5)
    loss.backward()
    assert not logits.grad[1].any() and logits.grad[0].any() and logits.grad[2].any()
    summed, _ = head.ctc_loss(logits, lengths, labels, num_items=2)
    assert torch.allclose(summed, loss)
    nothing, skipped = head.ctc_loss(logits, lengths, torch.full((3, 1), NO_TARGET))
    assert nothing == 0 and skipped == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), frames=st.integers(1, 7), targets=st.integers(1, 4))
def test_sparse_ctc_has_the_loss_and_gradient_of_torchs(data, batch, frames, targets):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    classes = torch.randint(1, 4, (batch, targets), generator=generator)  # few classes: many repeats
    logits = (3 * torch.randn(batch, frames, 6, generator=generator)).requires_grad_()
    lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
    target_lengths = torch.randint(0, targets + 1, (batch,), generator=generator)
    weights = torch.rand(batch, generator=generator)
    losses = ctc_negative_log_likelihood(logits, classes, lengths, target_lengths)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), logits)
    expected = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), classes, lengths, target_lengths, reduction="none", zero_infinity=True
    )
    (reference,) = torch.autograd.grad((weights * expected).sum(), logits)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert torch.allclose(gradient, reference, atol=1e-4)


def test_transcripts_longer_than_their_audio_are_counted_and_cost_nothing():
    head = build_head()
    logits = torch.randn(3, 3, 5, requires_grad=True)
    # The second needs a blank between its two equal tokens: 4 frames.
    labels = torch.tensor([[3, 7, 8], [7, 7, 8], [3, -100, -100]])
    loss, skipped = head.ctc_loss(logits, torch.tensor([2, 3, 3]), labels)
    loss.backward()
    alone, _ = head.ctc_loss(logits[2:], torch.tensor([3]), labels[2:])
    assert skipped == 2 and loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert logits.grad[:2].abs().max() == 0 and torch.isfinite(logits.grad).all()


def test_unknown_label_is_named():
    with pytest.raises(ValueError, match=r"not in the alignment vocabulary: \[9\]"):
        build_head().ctc_loss(torch.zeros(1, 3, 5), torch.tensor([3]), torch.tensor([[7, 9]]))


def test_labels_may_have_padding_on_the_left():
    head, logits = build_head(), torch.randn(1, 4, 5)
    left = head.ctc_loss(logits, torch.tensor([4]), torch.tensor([[-100, 3, 8]]))[0]
    assert left == head.ctc_loss(logits, torch.tensor([4]), torch.tensor([[3, 8, -100]]))[0]


def test_greedy_merges_repeats_and_drops_blanks():
    head = build_head()
    logits = path_logits([0, 1, 1, 0, 1, 2, 2, 0, 4])
    assert head.greedy(logits, torch.ones(1, 9, dtype=torch.bool)) == [[3, 3, 7, 20]]
    assert head.greedy(logits, length_mask(torch.tensor([2]), 9)) == [[3]]


@pytest.mark.parametrize("spelling", [None, {"buckets": 200, "size": 8}])
def test_the_vocabulary_can_be_extended(make_tiny_model, waveform, spelling):
    _, processor = make_tiny_model()
    decode = lambda index: processor.tokenizer.decode([index])  # noqa: E731
    if spelling:
        spelling = {**spelling, "texts": [decode(index) for index in range(10, 310)]}
    model, processor = make_tiny_model(align_spelling=spelling, readout="collapse")
    random_like_trained(model)
    inputs = prompts(processor, [[waveform(0.8)]])
    audio = {name: value for name, value in inputs.items() if name.startswith(("input_feat", "audio_"))}

    def logits():
        return model.get_audio_features(**audio, with_alignment=True).align_logits

    before, readout = logits(), model.model.readout.state_dict()
    with torch.no_grad():  # a new class the size of the others, so that the blank can be told from it
        model.model.alignment.bias.normal_()
    before = logits()
    assert model.extend_alignment([5, 20, 309, 320], decode) == 2
    after = logits()
    assert model.model.alignment.vocab_ids.tolist() == [5, *range(10, 310), 320]
    assert torch.allclose(after[..., [0, *range(2, 302)]], before, atol=1e-5)
    assert (after[..., 1] != after[..., -1]).all()  # each scored by its own embedding
    assert all(torch.equal(value, readout[name]) for name, value in model.model.readout.state_dict().items())
    assert model.extend_alignment([5, 320], decode) == 0


def test_an_extended_model_is_saved_with_its_new_words(make_tiny_model, tmp_path):
    _, processor = make_tiny_model()
    decode = lambda index: processor.tokenizer.decode([index])  # noqa: E731
    texts = [decode(index) for index in range(10, 310)]
    model, _ = make_tiny_model(align_spelling={"texts": texts, "buckets": 200, "size": 8})
    model.extend_alignment([5, 320], decode)
    model.save_pretrained(tmp_path)
    again = AudioPhiForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in model.model.alignment.state_dict().items():
        assert torch.equal(value, again.model.alignment.state_dict()[name]), name


def test_a_model_without_alignment_cannot_be_extended(make_tiny_model):
    model, _ = make_tiny_model(align=False)
    with pytest.raises(ValueError, match="no alignment head"):
        model.extend_alignment([5], str)
