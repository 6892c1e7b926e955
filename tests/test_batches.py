"""The batch schedule: coverage, reproducibility, grouping, accumulation, ranks, mixtures."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.training.batches import BatchSchedule

SECONDS = list(np.random.default_rng(0).uniform(1, 20, size=203))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    batch=st.one_of(st.tuples(st.integers(1, 9), st.none()), st.tuples(st.none(), st.floats(1, 60))),
    accum=st.integers(1, 4),
    world=st.integers(1, 3),
    steps=st.integers(1, 12),
)
def test_every_rank_gets_the_same_number_of_full_steps(rows, batch, accum, world, steps):
    sizes = {"batch_size": batch[0], "batch_seconds": batch[1]}
    kwargs = {**sizes, "grad_accum": accum, "world_size": world, "steps": steps}
    for rank in range(world):
        batches = list(BatchSchedule(SECONDS[:rows], rank=rank, **kwargs))
        assert len(batches) == steps * accum == len(BatchSchedule(SECONDS[:rows], rank=rank, **kwargs))
        assert all(batches), "a micro-batch is empty"


def test_one_epoch_uses_every_row_once_whatever_the_batching():
    for kwargs in ({"batch_size": 8}, {"batch_seconds": 60.0}, {"batch_size": 3, "grad_accum": 4}):
        draws = [draw for batch in BatchSchedule(SECONDS, epochs=1, **kwargs) for draw in batch]
        assert sorted(draw.row for draw in draws) == list(range(len(SECONDS)))


def test_seed_decides_the_order_and_epochs_differ():
    first, again = (list(BatchSchedule(SECONDS, steps=60, batch_size=8, seed=3)) for _ in range(2))
    assert first == again
    assert first != list(BatchSchedule(SECONDS, steps=60, batch_size=8, seed=4))
    assert [d.row for d in first[0]] != [d.row for d in first[26]]
    assert {d.epoch for batch in first for d in batch} == {0, 1, 2}


def test_ungrouped_steps_have_clips_of_all_lengths():
    """Grouped by length, sounds of 5 s and speech of 10 s never meet."""
    seconds, sources = [5.0] * 100 + [10.0] * 100, [0] * 100 + [1] * 100
    mixed = {}
    for grouped in (True, False):
        schedule = BatchSchedule(seconds, epochs=1, batch_size=8, sources=sources, group_by_length=grouped)
        steps = [[draw.row for draw in step] for step in schedule]
        assert sorted(sum(steps, [])) == list(range(200))
        mixed[grouped] = sum(0 < sum(sources[row] for row in step) < len(step) for step in steps)
    assert mixed[True] <= 1 and mixed[False] > 20


@pytest.mark.parametrize("grouped", [True, False])
def test_a_few_batches_stand_for_all(grouped):
    """Four drawn at random told a training of 60 minutes that it would take 44."""
    rng = np.random.default_rng(1)
    seconds, tokens = list(rng.lognormal(1.5, 0.7, 4000)), list(rng.integers(20, 400, 4000))
    schedule = BatchSchedule(seconds, tokens=tokens, epochs=1, batch_size=8, group_by_length=grouped)
    work = [sum(schedule.work(draw) for draw in batch) for batch in schedule]
    few = [sum(schedule.work(draw) for draw in batch) for batch in schedule.sample(8)]
    assert len(few) == 8 and np.mean(few) == pytest.approx(np.mean(work), rel=0.05)
    assert len(BatchSchedule([1.0], steps=3, batch_size=1).sample(8)) == 1


def test_accumulation_splits_the_same_steps():
    rows = SECONDS[:200]
    whole = list(BatchSchedule(rows, steps=40, batch_size=8))
    parts = list(BatchSchedule(rows, steps=40, batch_size=1, grad_accum=8))
    assert [[parts[8 * i + k][0] for k in range(8)] for i in range(40)] == whole
    ranks = [list(BatchSchedule(rows, steps=40, batch_size=2, grad_accum=2, rank=r, world_size=2)) for r in range(2)]
    for i in range(40):
        together = sorted(d for rank in ranks for micro in rank[2 * i : 2 * i + 2] for d in micro)
        assert together == sorted(whole[i])


def test_batches_group_lengths_and_respect_seconds():
    def padding(batches):
        cost = sum(len(b) * max(SECONDS[d.row] for d in b) for b in batches)
        return cost / sum(SECONDS[d.row] for b in batches for d in b) - 1

    assert padding(list(BatchSchedule(SECONDS, epochs=1, batch_size=8))) < 0.35  # random batches of 8: about 0.75
    batches = list(BatchSchedule(SECONDS, epochs=2, batch_seconds=50.0))
    assert max(len(b) * max(SECONDS[d.row] for d in b) for b in batches) <= 50.0


def test_the_batches_that_are_measured_are_the_largest_and_some_of_all():
    tokens = list(np.random.default_rng(1).integers(1, 900, size=len(SECONDS)))  # long answers about short clips
    schedule = BatchSchedule(SECONDS, epochs=1, batch_size=8, tokens=tokens)
    batches = list(schedule)
    longest, wordiest = schedule.largest()
    assert schedule.padded(longest)[0] == max(len(b) * max(SECONDS[d.row] for d in b) for b in batches)
    assert schedule.padded(wordiest)[1] == max(len(b) * max(tokens[d.row] for d in b) for b in batches)
    sample = schedule.sample(8)
    assert len(sample) == 8 and all(batch in batches for batch in sample) and sample == schedule.sample(8)
    assert len(BatchSchedule(SECONDS, epochs=1, batch_size=8).largest()) == 1, "without text one batch is both"
    assert len(BatchSchedule(SECONDS[:2], steps=1, batch_size=8).sample(8)) == 1


def test_mixture_weights_and_speeds():
    sources = [0] * 150 + [1] * 53
    schedule = BatchSchedule(SECONDS, epochs=4, batch_size=8, sources=sources, weights=[1, 3], speeds=[0.9, 1.0, 1.1])
    draws = [d for batch in schedule for d in batch]
    assert Counter(sources[d.row] for d in draws) == {0: 4 * 51, 1: 4 * 152}  # a quarter and three quarters of 203
    first, second = ({d.row for d in draws if d.epoch == e and sources[d.row] == 0} for e in range(2))
    assert len(first) == len(second) == 51 and first != second
    uses = Counter(d.row for d in draws if d.epoch == 0 and sources[d.row] == 1)
    assert max(uses.values()) - min(uses.values()) == 1 and len(uses) == 53
    assert set(Counter(d.speed for d in draws)) == {0.9, 1.0, 1.1}


def test_fractional_epochs_and_no_rows():
    schedule = BatchSchedule(SECONDS, epochs=1, batch_size=8)
    assert BatchSchedule(SECONDS, epochs=0.5, batch_size=8).steps == pytest.approx(schedule.steps / 2, abs=1)
    with pytest.raises(ValueError, match="no rows"):
        BatchSchedule([], steps=1, batch_size=1)
