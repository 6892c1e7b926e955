"""SpecAugment and noise on encoder states (windows, frames, size)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.data.augment import Augment, normal_numbers, seed_of, uniform_numbers

ALL = Augment(time_masks=2, time_width=9, feature_dropout=0.1, noise=0.3)


def states(*lengths, size=16):
    """Windows with so many real frames each, what is padded being 7; and their mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), max(lengths), size, generator=torch.Generator().manual_seed(0))
    return torch.where(mask[..., None], values + torch.arange(size), 7.0), mask


def seeds(*numbers):
    return torch.tensor([seed_of(number) for number in numbers])


def test_same_seed_same_result_other_seed_another():
    hidden, mask = states(50, 50)
    first, second = ALL(hidden, mask, seeds(1, 2))
    assert torch.equal(first, ALL(hidden, mask, seeds(1, 3))[0])
    assert not torch.equal(second, ALL(hidden, mask, seeds(1, 3))[1])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), number=st.integers(0, 10**6))
def test_a_window_changes_alike_in_every_batch(lengths, number):
    hidden, mask = states(*lengths)
    together = ALL(hidden, mask, seeds(*range(number, number + len(lengths))))
    for place, length in enumerate(lengths):
        alone = ALL(hidden[place : place + 1, :length], mask[place : place + 1, :length], seeds(number + place))
        torch.testing.assert_close(together[place, :length], alone[0])
        assert (together[place, length:] == 7).all()


def test_same_in_another_process():
    """Python's hash() of strings differs between processes; a resumed run must not. The number is another's."""
    assert seed_of(0, "clip", 3) == 1771202873377957155


def test_global_random_state_is_neither_used_nor_changed():
    hidden, mask = states(30)
    torch.manual_seed(1)
    first = ALL(hidden, mask, seeds(1))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3)) and torch.equal(first, ALL(hidden, mask, seeds(1)))


def test_nothing_switched_on_changes_nothing():
    hidden, mask = states(20, 30)
    assert torch.equal(Augment()(hidden, mask, seeds(1, 2)), hidden)


def test_numbers_are_random():
    """Moments of them, and that neighbouring numbers and seeds have nothing in common."""
    uniform, normal = uniform_numbers(seeds(1, 2), 300, 100), normal_numbers(seeds(1, 2), 300, 100)
    assert uniform.min() > 0 and uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.005) and uniform.std() == pytest.approx(12**-0.5, abs=0.005)
    assert normal.mean() == pytest.approx(0, abs=0.02) and normal.std() == pytest.approx(1, abs=0.02)
    assert (normal**4).mean() == pytest.approx(3, abs=0.2)
    for one in (uniform, normal, uniform_numbers(torch.arange(2), 300, 100)):
        pairs = [(one[0], one[1]), (one[:, 1:], one[:, :-1]), (one[..., 1:], one[..., :-1])]
        for pair in pairs:
            assert abs(torch.corrcoef(torch.stack([part.flatten() for part in pair]))[0, 1]) < 0.03


def test_noise_has_the_size_of_each_frame():
    hidden, mask = states(200)
    hidden = hidden * torch.linspace(0.1, 10, 200)[:, None]
    added = Augment(noise=0.5)(hidden, mask, seeds(0)) - hidden
    ratio = (added.std(-1) / hidden.std(-1))[0]
    assert ratio.mean() == pytest.approx(0.5, rel=0.05)
    assert ratio[:50].mean() == pytest.approx(0.5, rel=0.15) and ratio[-50:].mean() == pytest.approx(0.5, rel=0.15)


@settings(max_examples=50, deadline=None)
@given(frames=st.integers(1, 300), masks=st.floats(0.1, 4), width=st.integers(0, 40), key=st.integers(0, 10**6))
def test_time_masks_are_whole_frames_of_limited_number(frames, masks, width, key):
    hidden, mask = states(frames)
    changed = Augment(time_masks=masks, time_width=width)(hidden, mask, seeds(key))
    touched = (changed != hidden).any(-1)
    torch.testing.assert_close(changed[touched], hidden.mean(1).expand(int(touched.sum()), -1))
    assert touched.sum() <= max(1, round(masks * frames / 100)) * min(width, frames // 5)


def test_time_masks_do_mask():
    hidden, mask = states(*[1000] * 20)
    changed = Augment(time_masks=1, time_width=20)(hidden, mask, seeds(*range(20)))
    assert 0.06 < (changed != hidden).any(-1).float().mean() < 0.12  # ten masks of ten frames on average


def test_feature_dropout_masks_features_over_the_whole_window():
    hidden, mask = states(50, size=2000)
    changed = Augment(feature_dropout=0.1)(hidden, mask, seeds(0))[0]
    touched = (changed != hidden[0]).any(0)
    assert touched.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (changed[:, touched] == changed[0, touched]).all()


def test_what_is_trained_below_gets_its_gradient():
    hidden, mask = states(30)
    weight = torch.ones(16, requires_grad=True)
    ALL(hidden * weight, mask, seeds(1)).square().sum().backward()
    assert weight.grad.abs().min() > 0
