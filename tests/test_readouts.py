"""Readouts: what of the audio the language model gets to read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.training.build import apply_tuning
from audiophi.training.recipe import Stage, Tune
from modeling_audiophi.lengths_audiophi import length_mask
from modeling_audiophi.readout_collapse import SHARPNESS, CollapseReadout
from modeling_audiophi.readout_mixed import SOUND_FRAMES, MixedReadout, clip_statistics
from modeling_audiophi.readouts import READOUTS
from tests.conftest import prompts
from tests.test_alignment import TABLE, WORDS, build_head, path_logits


def zero_readout():
    readout = CollapseReadout(6, 8)
    torch.nn.init.zeros_(readout.proj.weight)
    torch.nn.init.zeros_(readout.proj.bias)
    return readout


@given(path=st.lists(st.integers(0, 4), min_size=1, max_size=12), padding=st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_collapse_keeps_the_greedy_words_at_the_first_frame_of_each_run(path, padding):
    head = build_head()
    logits = path_logits(path + [3] * padding)
    mask = length_mask(torch.tensor([len(path)]), len(path) + padding)
    tokens = torch.randn(1, len(path) + padding, 6)
    embeds, keep = zero_readout()(tokens, mask, logits, WORDS)
    words = head.greedy(logits, mask)[0]
    expected = [t for t, symbol in enumerate(path) if symbol and (t == 0 or path[t - 1] != symbol)]
    assert keep[0].nonzero()[:, 0].tolist() == expected
    assert torch.allclose(embeds[keep], TABLE[words], atol=1e-4)
    assert embeds[~keep].abs().sum() == 0


def test_collapse_is_a_mean_over_the_run_and_carries_the_acoustic_state():
    logits = torch.full((1, 3, 5), -30.0)
    logits[0, :, 2] = torch.tensor([1.0, 2.0, -30.0])
    logits[0, :, 1] = torch.tensor([0.0, 0.5, -30.0])
    logits[0, 2, 0] = 5.0
    tokens = torch.randn(1, 3, 6)
    readout = CollapseReadout(6, 8)
    embeds, keep = readout(tokens, torch.ones(1, 3, dtype=torch.bool), logits, WORDS)
    weights = (SHARPNESS * logits[0, :2, 1:]).softmax(-1)
    expected = (weights @ WORDS).mean(0) + readout.proj(readout.norm(tokens[0, :2].mean(0)))
    assert keep.tolist() == [[True, False, False]]
    assert torch.allclose(embeds[0, 0], expected, atol=1e-5)


def test_collapse_is_the_same_alone_and_in_a_batch():
    readout = CollapseReadout(6, 8)
    lengths = [9, 4, 1]
    tokens, logits = torch.randn(3, 9, 6), 3 * torch.randn(3, 9, 5)
    embeds, keep = readout(tokens, length_mask(torch.tensor(lengths)), logits, WORDS)
    for row, length in enumerate(lengths):
        mask = torch.ones(1, length, dtype=torch.bool)
        alone = readout(tokens[row : row + 1, :length], mask, logits[row : row + 1, :length], WORDS)
        assert torch.allclose(embeds[row, :length], alone[0][0], atol=1e-6)
        assert torch.equal(keep[row, :length], alone[1][0]) and not keep[row, length:].any()


def test_gradient_flows_through_the_posteriors_and_the_residual():
    head, readout = build_head(), CollapseReadout(6, 8)
    tokens = torch.randn(2, 8, 6, requires_grad=True)
    logits = head.logits(tokens, WORDS)
    embeds, keep = readout(tokens, torch.ones(2, 8, dtype=torch.bool), logits, WORDS)
    assert keep.any()
    embeds.square().sum().backward()
    for parameter in (tokens, head.scale, readout.proj.weight):
        assert parameter.grad.abs().max() > 0


@given(path=st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), min_size=1, max_size=60), padding=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_mixed_keeps_the_words_and_every_whole_piece_without_words(path, padding):
    readout = MixedReadout(6, 8).eval()
    logits = path_logits(path + [0] * padding)
    mask = length_mask(torch.tensor([len(path)]), len(path) + padding)
    tokens = torch.randn(1, len(path) + padding, 6)
    encoded = (torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    embeds, keep = readout(tokens, mask, logits, WORDS, encoded)
    clip = readout.clip_norm(clip_statistics(*encoded))[0]
    expected, start = [], 0
    while start < len(path):
        end = start
        while end < len(path) and path[end] == path[start]:
            end += 1
        if path[start]:
            expected.append((start, end))
        else:
            pieces = range(start, end - SOUND_FRAMES + 1, SOUND_FRAMES)
            expected += [(piece, piece + SOUND_FRAMES) for piece in pieces]
        start = end
    expected = expected or [(0, len(path))]  # never nothing at all
    assert keep[0].nonzero()[:, 0].tolist() == [first for first, _ in expected]
    for first, last in expected:
        if not path[first]:
            state = readout.state_norm(tokens[0, first:last].mean(0))
            sound = readout.sounds(torch.cat([state, clip]))
            assert torch.allclose(embeds[0, first], sound, atol=1e-4)
    assert embeds[~keep].abs().sum() == 0


def test_mixed_is_the_same_alone_and_in_a_batch():
    readout = MixedReadout(6, 8).eval()
    lengths, frames = [30, 14, 3], [61, 28, 7]
    tokens, logits, hidden = torch.randn(3, 30, 6), 3 * torch.randn(3, 30, 5), torch.randn(3, 61, 8)
    logits[..., 0] += 5
    encoded = (hidden, length_mask(torch.tensor(frames)))
    embeds, keep = readout(tokens, length_mask(torch.tensor(lengths), 30), logits, WORDS, encoded)
    for row, length in enumerate(lengths):
        mask, one = torch.ones(1, length, dtype=torch.bool), slice(row, row + 1)
        encoded = (hidden[one, : frames[row]], torch.ones(1, frames[row], dtype=torch.bool))
        alone = readout(tokens[one, :length], mask, logits[one, :length], WORDS, encoded)
        assert torch.allclose(embeds[row, :length], alone[0][0], atol=1e-5)
        assert torch.equal(keep[row, :length], alone[1][0]) and not keep[row, length:].any()


@given(frames=st.integers(0, 6), padding=st.integers(0, 3))
def test_clip_statistics_know_only_real_frames(frames, padding):
    hidden = torch.randn(1, frames + padding, 4)
    if not frames + padding:
        return
    mask = length_mask(torch.tensor([frames]), frames + padding)
    statistics = clip_statistics(hidden, mask)[0]
    real = hidden[0, :frames]
    if not frames:
        assert torch.isfinite(statistics).all()
        return
    expected = torch.cat([real.mean(0), real.std(0, correction=0), real.amax(0)])
    assert torch.allclose(statistics, expected, atol=2e-3)


def sound_readout():
    """A readout and what it is called with for a batch of two silent clips of 24 tokens."""
    readout = MixedReadout(6, 8).eval()
    arguments = (torch.randn(2, 24, 6), torch.ones(2, 24).bool(), path_logits([0] * 24).repeat(2, 1, 1), WORDS)
    return readout, (*arguments, (torch.randn(2, 5, 8), torch.ones(2, 5).bool()))


def test_sounds_are_learned_by_the_language_model():
    readout, arguments = sound_readout()
    (readout(*arguments)[0] * torch.randn(6)).sum().backward()
    for name, parameter in readout.named_parameters():
        assert name.startswith("sound_words.") or parameter.grad.abs().max() > 0, name


def test_sounds_come_to_lie_near_the_words_that_describe_them():
    torch.manual_seed(1)
    readout, arguments = sound_readout()
    labels = torch.tensor([[0, 2, 2], [1, -1, -1]])
    table = WORDS
    optimizer = torch.optim.Adam(readout.parameters(), 0.02)
    losses = []
    for _ in range(60):
        embeds, keep = readout(*arguments)
        loss = readout.sound_loss(embeds, keep, labels, table)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1.0 < losses[0]  # with a word twice as likely as the other it could not be below log 2
    scores = readout.sound_words(readout(*arguments)[0][keep], table)
    assert scores[:2].topk(2).indices.sort().values.tolist() == [[0, 2], [0, 2]]
    assert scores[2:].argmax(-1).tolist() == [1, 1]


def test_the_sound_loss_is_a_sum_over_described_clips():
    readout, arguments = sound_readout()
    embeds, keep = readout(*arguments)
    table, nothing = WORDS, torch.tensor([[-1], [-1]])
    both, first, second = (
        readout.sound_loss(embeds, keep, torch.tensor(labels), table)
        for labels in ([[0, 2], [1, -1]], [[0, 2], [-1, -1]], [[-1, -1], [1, -1]])
    )
    assert torch.allclose(both, first + second, atol=1e-5) and first > 0 and second > 0
    nothing = readout.sound_loss(embeds, keep, nothing, table)
    assert nothing == 0
    nothing.backward()  # every process of several has the same gradients to exchange
    assert all(parameter.grad is not None for parameter in readout.sound_words.parameters())


@pytest.mark.parametrize("before", READOUTS)
@pytest.mark.parametrize("after", READOUTS)
def test_another_readout_keeps_what_both_have(make_tiny_model, waveform, tmp_path, before, after):
    model, processor = make_tiny_model(readout=before)
    shared = {name: value.clone() for name, value in model.model.readout.state_dict().items()}
    model.set_readout(after)
    assert type(model.model.readout) is READOUTS[after] and model.config.readout == after
    for name, value in model.model.readout.state_dict().items():
        if name in shared:
            assert torch.equal(value, shared[name])
    inputs = prompts(processor, [[waveform(0.9)]])
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, expected)


def test_a_readout_that_does_not_fit_is_refused(make_tiny_model):
    model, _ = make_tiny_model(align=False)
    for name, message in (("mixed", "needs an alignment head"), ("average", "expected one of")):
        with pytest.raises(ValueError, match=message):
            model.set_readout(name)
    assert model.config.readout == "frames"


def test_a_stage_can_train_the_readout_alone(make_tiny_model):
    model, _ = make_tiny_model(readout="mixed")
    apply_tuning(model, Stage("lm", "lm", Tune(adapter="frozen", readout="full")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {f"model.readout.{name}" for name, _ in model.model.readout.named_parameters()}
    assert trained == {name for name in names if ".sound_words." not in name}
    apply_tuning(model, Stage("sounds", "align", Tune(adapter="frozen", readout="full")))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    apply_tuning(model, Stage("lm", "lm", Tune(adapter="full", readout="frozen")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("model.readout.") for name in trained)
