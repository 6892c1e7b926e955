"""Clips in which nobody speaks, made without files."""

import numpy as np
import pytest

from audiophi.data import dataset_noise
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.datasets import load_examples


def test_clips_are_what_their_rows_say():
    silent = load_examples({"path": "noise:16", "task": "no_speech"})
    assert len(silent) == 16 and {(row.reference, row.clips[0].transcript) for row in silent} == {("", "")}
    assert {row.id.split("-")[0] for row in silent} == set(dataset_noise.KINDS)
    for row in silent:
        samples = row.clips[0].read(row.id)
        assert len(samples) / 16_000 == pytest.approx(row.clips[0].seconds, abs=1e-3)
        assert np.any(samples) != row.id.startswith("silence") and np.abs(samples).max() <= 1


def test_sounds_are_of_their_kind_and_no_two_alike():
    """Sparse, tonal, or neither; loud and soft; alone in digital silence, as a muted line has them, and above noise."""
    kinds = {}
    for row in load_examples({"path": "noise:300", "task": "no_speech"}):
        kinds.setdefault(row.id.split("-")[0], []).append(row.clips[0].read(row.id))
    for kind in ("clicks", "beeps", "rustle"):
        peaks = [np.abs(clip).max() for clip in kinds[kind]]
        assert min(peaks) < 0.02 and 0.5 < max(peaks) <= 1
        alone = [np.mean(clip == 0) > 0.2 for clip in kinds[kind]]
        assert 0 < sum(alone) < 0.8 * len(alone), kind

    def crest(clip):  # of a sine 1.4, of noise about 4
        return np.abs(clip).max() / np.sqrt(np.mean(clip**2))

    def tonal(clip):  # the share of the strongest hundredth of frequencies
        power = np.sort(np.abs(np.fft.rfft(clip)) ** 2)[::-1]
        return power[: len(power) // 100].sum() / power.sum()

    middle = {kind: [np.median([f(clip) for clip in clips if clip.any()]) for f in (crest, tonal)]
              for kind, clips in kinds.items() if kind != "silence"}  # fmt: skip
    assert middle["clicks"][0] > 20 > middle["rustle"][0] > 5 > 3 > middle["beeps"][0]
    assert min(middle["beeps"][1], middle["hum"][1]) > 0.8 > 0.5 > max(middle["clicks"][1], middle["rustle"][1])
    clicking = [crest(clip) for clip in kinds["clicks"]]
    assert max(clicking) > 5 * min(clicking)


def test_a_clip_is_the_same_every_time_and_in_every_number_of_clips():
    few, many = (load_examples({"path": f"noise:{count}", "task": "no_speech"}) for count in (4, 9))
    for one, other in zip(few, many, strict=False):
        assert one.clips[0].audio["bytes"] == other.clips[0].audio["bytes"]
    different = {row.clips[0].audio["bytes"] for row in many}
    assert len(different) == 9


def test_it_can_be_streamed_and_divided():
    source = [{"path": "noise:5", "task": "no_speech"}]
    ids = [row.id for part in range(2) for row in stream_examples(source, part=(part, 2))]
    assert sorted(ids) == sorted(row.id for row in load_examples({"path": "noise:5", "task": "no_speech"}))


@pytest.mark.parametrize("path", ["noise:0", "noise:many", "noise:-3", "noise:"])
def test_a_number_of_clips_is_asked_for(path):
    with pytest.raises(ValueError, match="noise:300"):
        load_examples({"path": path, "task": "no_speech"})


def test_it_has_no_splits():
    with pytest.raises(ValueError, match="no splits"):
        load_examples({"path": "noise:3", "task": "no_speech", "split": "train"})
