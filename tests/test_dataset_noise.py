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
