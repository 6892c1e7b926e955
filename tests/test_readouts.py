"""Readouts: what of the audio the language model gets to read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_audiophi.lengths_audiophi import length_mask
from modeling_audiophi.readouts_audiophi import READOUTS, SHARPNESS, SOUND_FRAMES, CollapseReadout, MixedReadout
from tests.conftest import prompts
from tests.test_alignment import TABLE, VOCAB_IDS, build_head, path_logits
from training.build import apply_tuning
from training.recipe import Stage, Tune


def zero_readout():
    readout = CollapseReadout(6)
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
    embeds, keep = zero_readout()(tokens, mask, head, logits, TABLE)
    words = head.greedy(logits, mask)[0]
    expected = [t for t, symbol in enumerate(path) if symbol and (t == 0 or path[t - 1] != symbol)]
    assert keep[0].nonzero()[:, 0].tolist() == expected
    assert torch.allclose(embeds[keep], TABLE[words], atol=1e-4)
    assert embeds[~keep].abs().sum() == 0


def test_collapse_is_a_mean_over_the_run_and_carries_the_acoustic_state():
    head = build_head()
    logits = torch.full((1, 3, 5), -30.0)
    logits[0, :, 2] = torch.tensor([1.0, 2.0, -30.0])
    logits[0, :, 1] = torch.tensor([0.0, 0.5, -30.0])
    logits[0, 2, 0] = 5.0
    tokens = torch.randn(1, 3, 6)
    readout = CollapseReadout(6)
    embeds, keep = readout(tokens, torch.ones(1, 3, dtype=torch.bool), head, logits, TABLE)
    weights = (SHARPNESS * logits[0, :2, 1:]).softmax(-1)
    expected = (weights @ TABLE[VOCAB_IDS]).mean(0) + readout.proj(readout.norm(tokens[0, :2].mean(0)))
    assert keep.tolist() == [[True, False, False]]
    assert torch.allclose(embeds[0, 0], expected, atol=1e-5)


def test_collapse_is_the_same_alone_and_in_a_batch():
    head, readout = build_head(), CollapseReadout(6)
    lengths = [9, 4, 1]
    tokens, logits = torch.randn(3, 9, 6), 3 * torch.randn(3, 9, 5)
    embeds, keep = readout(tokens, length_mask(torch.tensor(lengths)), head, logits, TABLE)
    for row, length in enumerate(lengths):
        mask = torch.ones(1, length, dtype=torch.bool)
        alone = readout(tokens[row : row + 1, :length], mask, head, logits[row : row + 1, :length], TABLE)
        assert torch.allclose(embeds[row, :length], alone[0][0], atol=1e-6)
        assert torch.equal(keep[row, :length], alone[1][0]) and not keep[row, length:].any()


def test_gradient_flows_through_the_posteriors_and_the_residual():
    head, readout = build_head(), CollapseReadout(6)
    tokens = torch.randn(2, 8, 6, requires_grad=True)
    logits = head.logits(tokens, TABLE)
    embeds, keep = readout(tokens, torch.ones(2, 8, dtype=torch.bool), head, logits, TABLE)
    assert keep.any()
    embeds.square().sum().backward()
    for parameter in (tokens, head.scale, readout.proj.weight):
        assert parameter.grad.abs().max() > 0


@given(path=st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), min_size=1, max_size=40), padding=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_mixed_keeps_the_words_and_every_whole_piece_without_words(path, padding):
    head, readout = build_head(), MixedReadout(6)
    logits = path_logits(path + [0] * padding)
    mask = length_mask(torch.tensor([len(path)]), len(path) + padding)
    tokens = torch.randn(1, len(path) + padding, 6)
    embeds, keep = readout(tokens, mask, head, logits, TABLE)
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
            sound = readout.sounds(tokens[0, first:last].mean(0))
            assert torch.allclose(embeds[0, first], sound, atol=1e-4)
    assert embeds[~keep].abs().sum() == 0


def test_mixed_is_the_same_alone_and_in_a_batch():
    head, readout = build_head(), MixedReadout(6)
    lengths = [30, 14, 3]
    tokens, logits = torch.randn(3, 30, 6), 3 * torch.randn(3, 30, 5)
    logits[..., 0] += 5
    embeds, keep = readout(tokens, length_mask(torch.tensor(lengths), 30), head, logits, TABLE)
    for row, length in enumerate(lengths):
        mask = torch.ones(1, length, dtype=torch.bool)
        alone = readout(tokens[row : row + 1, :length], mask, head, logits[row : row + 1, :length], TABLE)
        assert torch.allclose(embeds[row, :length], alone[0][0], atol=1e-5)
        assert torch.equal(keep[row, :length], alone[1][0]) and not keep[row, length:].any()


def test_sounds_are_learned():
    head, readout = build_head(), MixedReadout(6)
    tokens = torch.randn(1, 12, 6)
    readout(tokens, torch.ones(1, 12).bool(), head, path_logits([0] * 12), TABLE)[0].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in readout.sounds.named_parameters() if n not in ("1.bias",))


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
    assert trained == {f"model.readout.{name}" for name, _ in model.model.readout.named_parameters()}
    apply_tuning(model, Stage("lm", "lm", Tune(adapter="full", readout="frozen")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("model.readout.") for name in trained)
