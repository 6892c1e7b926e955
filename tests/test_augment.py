"""SpecAugment and noise on features (frames, size)."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.data.augment import Augment, seeded_generator


def features(frames=200, size=16):
    return torch.randn(frames, size, generator=torch.Generator().manual_seed(0)) + torch.arange(size)


def test_same_key_same_result_other_key_another():
    augment = Augment(time_masks=2, feature_masks=1, feature_width=4, feature_dropout=0.1, noise=0.3, seed=5)
    clip = features()
    assert torch.equal(augment(clip, 1, "a"), augment(clip, 1, "a"))
    assert not torch.equal(augment(clip, 1, "a"), augment(clip, 2, "a"))
    assert not torch.equal(augment(clip, 1, "a"), Augment(**{**augment.__dict__, "seed": 6})(clip, 1, "a"))
    torch.manual_seed(1)
    first = augment(clip, 1, "a")
    torch.manual_seed(2)
    assert torch.equal(first, augment(clip, 1, "a"))


def test_same_in_another_process():
    """Python's hash() of strings differs between processes; a resumed run must not."""
    code = "from audiophi.data.augment import seeded_generator as g; print(g(0, 'clip', 3).initial_seed())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output.split()[-1]) == seeded_generator(0, "clip", 3).initial_seed()


def test_nothing_switched_on_changes_nothing():
    clip = features()
    assert torch.equal(Augment()(clip, 0), clip)


def test_noise_has_the_size_of_each_frame():
    clip = features() * torch.linspace(0.1, 10, 200)[:, None]
    added = Augment(noise=0.5)(clip, 0) - clip
    ratio = added.std(-1) / clip.std(-1)
    assert ratio.mean() == pytest.approx(0.5, rel=0.05)
    assert ratio[:50].mean() == pytest.approx(0.5, rel=0.15) and ratio[-50:].mean() == pytest.approx(0.5, rel=0.15)


@settings(max_examples=50)
@given(frames=st.integers(1, 300), masks=st.floats(0.1, 4), width=st.integers(0, 40), key=st.integers(0, 10**6))
def test_time_masks_are_whole_frames_of_limited_number(frames, masks, width, key):
    clip = features(frames)
    changed = Augment(time_masks=masks, time_width=width)(clip, key)
    touched = (changed != clip).any(-1)
    torch.testing.assert_close(changed[touched], clip.mean(0).expand(int(touched.sum()), -1))
    assert touched.sum() <= max(1, round(masks * frames / 100)) * min(width, frames // 5)


def test_time_masks_do_mask():
    clip = features(1000)
    share = (
        sum(((Augment(time_masks=1, time_width=20)(clip, key) != clip).any(-1)).float().mean() for key in range(20))
        / 20
    )
    assert 0.06 < share < 0.12  # ten masks of ten frames on average


def test_feature_masks_are_bands():
    clip = features()
    for key in range(10):
        touched = (Augment(feature_masks=1, feature_width=5)(clip, key) != clip).any(0).nonzero()[:, 0].tolist()
        assert len(touched) <= 5 and touched == [touched[0] + i for i in range(len(touched))]
    assert any((Augment(feature_masks=1, feature_width=5)(clip, key) != clip).any() for key in range(5))


def test_feature_dropout_masks_features_over_the_whole_clip():
    clip = features(50, 2000)
    changed = Augment(feature_dropout=0.1)(clip, 0)
    touched = (changed != clip).any(0)
    assert touched.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (changed[:, touched] == changed[0, touched]).all()
