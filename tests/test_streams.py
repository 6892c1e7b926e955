"""Rows as they come: who reads which, what is never decoded, and where a resumed run goes on."""

import itertools
import json
import os
import signal
from collections import Counter
from dataclasses import replace

import datasets
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader

from audiophi.data.dataset_streams import stream_examples
from audiophi.data.example import Clip
from audiophi.training.bad_rows import BadRows
from audiophi.training.build import build_model, build_processor
from audiophi.training.callbacks import StageCallback
from audiophi.training.recipe import recipe_from_dict
from audiophi.training.signals import Interrupted
from audiophi.training.streams import StreamingSet
from tests.tiny_runs import ALIGN, largest_difference, train


def parquet(speech, folder, files, group=1000):
    """The manifest `speech` as Parquet files that hold its audio, `group` rows of it in one piece."""
    rows = [json.loads(line) for line in open(speech / "metadata.jsonl")]
    folder.mkdir()
    for number in range(files):
        part = [
            {**row, "audio": {"bytes": (speech / row["audio"]).read_bytes(), "path": None}}
            for row in rows[number::files]
        ]
        datasets.Dataset.from_list(part).to_parquet(folder / f"train-{number}.parquet", batch_size=group)
    return folder


@pytest.fixture
def make_stream(settings, tmp_path):
    def make(path, rank=0, world_size=1, **keys):
        source = {"path": str(path), **keys.pop("source", {})}
        recipe = recipe_from_dict(settings(ALIGN, data={"train": [source], "streaming": True}, **keys))
        processor = build_processor(recipe)
        build_model(replace(recipe, alignment=None, readout=None), processor, None)
        bad = BadRows(tmp_path / "bad.jsonl", 0)
        return StreamingSet(recipe.data.train, bad, processor, recipe.stages[0], recipe, rank, world_size)

    return make


@pytest.mark.parametrize("files", [0, 1, 3, 4], ids=["manifest", "one_file", "three_files", "four_files"])
def test_workers_of_processes_read_every_row_once(make_stream, speech, tmp_path, files):
    path = parquet(speech, tmp_path / "files", files) if files else speech
    heard = Counter()
    for rank in range(2):
        loader = DataLoader(make_stream(path, rank, 2, num_workers=2), batch_size=None, num_workers=2)
        batches = itertools.takewhile(lambda batch: batch[0]["epoch"] == 0, loader)
        heard.update(item["transcripts"][0] + str(item["clips"][0]) for batch in batches for item in batch)
    assert len(heard) == 16 and set(heard.values()) == {1}


def test_who_reads_one_file_does_not_open_the_others(speech, tmp_path):
    folder = parquet(speech, tmp_path / "files", 2)
    (folder / "train-1.parquet").write_bytes(b"cut")
    rows = list(stream_examples([{"path": str(folder)}], part=(0, 2)))
    assert [row.id for row in rows] == [f"clip{number}" for number in range(0, 16, 2)]


@pytest.fixture
def groups_read(monkeypatch):
    """(file, group of rows) in the order in which they are read."""
    read, found = pyarrow.parquet.ParquetFile.read_row_group, []

    def note(file, group, *args, **kwargs):
        found.append((file.metadata.row_group(group).num_rows, group))
        return read(file, group, *args, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", note)
    return found


def test_readers_of_one_file_share_its_groups_of_rows(speech, tmp_path, groups_read):
    folder = parquet(speech, tmp_path / "files", 1, group=2)
    rows = [[row.id for row in stream_examples([{"path": str(folder)}], part=(part, 4))] for part in range(4)]
    assert sum(rows, []) == [f"clip{number}" for number in range(16)] and {len(part) for part in rows} == {4}
    assert groups_read == [(2, group) for group in range(8)]


def test_readers_share_what_a_filter_leaves(speech, tmp_path, groups_read):
    """All that is wanted may lie at the end of a file."""
    folder = parquet(speech, tmp_path / "files", 1, group=2)
    source = {"path": str(folder), "filter": {"id": [f"clip{number}" for number in (12, 13, 15)]}}
    rows = [[row.id for row in stream_examples([source], part=(part, 3))] for part in range(3)]
    assert rows == [["clip12"], ["clip13"], ["clip15"]] and [group for _, group in groups_read] == [6, 6, 7]


@pytest.mark.parametrize("task", [None, "compare"])
@pytest.mark.parametrize("weight", [None, 2.0])
def test_what_was_read_is_neither_read_again_nor_missed_by_questions(speech, tmp_path, groups_read, weight, task):
    """A question about two rows compares with those that came before, also where these are passed over."""
    folder = parquet(speech, tmp_path / "files", 2, group=1)
    sources = [{"path": str(folder), "task": task, "weight": weight}, {"path": str(speech), "weight": weight and 1.0}]
    sources = sources if weight else sources[::-1]  # behind the rows that are passed over are some of the files
    straight = list(stream_examples(sources, part=(0, 2)))
    groups_read.clear()
    left = list(stream_examples(sources, part=(0, 2), skip=9))
    assert len(straight) > 12 and list(map(repr, left)) == list(map(repr, straight[9:]))
    stored = sum(getattr(row, "source", None) == str(folder) for row in straight[9:])
    assert stored > 0 and (len(groups_read) > stored if task else len(groups_read) == stored)
    groups_read.clear()
    assert list(stream_examples(sources, part=(0, 2), skip=len(straight))) == [] == groups_read


def test_what_is_longer_than_max_seconds_is_not_decoded(make_stream, speech, monkeypatch):
    read, decoded = Clip.read, []
    monkeypatch.setattr(Clip, "read", lambda clip, name, rate=16000: decoded.append(name) or read(clip, name, rate))
    stream = make_stream(speech, source={"max_seconds": 1.0})
    batches = itertools.takewhile(lambda batch: batch[0]["epoch"] == 0, stream)
    short = {f"clip{number}" for number in range(16) if 0.8 + 0.15 * (number % 9) <= 1.0}
    assert sum(map(len, batches)) == len(short) and set(decoded) == short


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_was_without_decoding_what_it_has_seen(make_stream, speech, workers):
    def batches(stream):
        stream.buffer = 4
        return iter(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=dict_of))

    def dict_of(batch):
        return {"drawn": [(item["epoch"], item["id"]) for item in batch], "position": batch[0]["position"]}

    straight = list(itertools.islice(batches(make_stream(speech, num_workers=workers)), 7))
    stopped, resumed = make_stream(speech, num_workers=workers), make_stream(speech, num_workers=workers)
    for batch in itertools.islice(batches(stopped), 3):
        stopped.trained_on(batch["position"])
    assert resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    decoded = []
    if not workers:
        item = resumed._item
        resumed._item = lambda example, *rest: decoded.append(example.id) or item(example, *rest)
    assert list(itertools.islice(batches(resumed), 4)) == straight[3:]
    assert len(decoded) <= (7 - 3 + 1) * 4
    assert not make_stream(speech, 0, 2, num_workers=workers).load_state_dict(stopped.state_dict())


def test_a_stopped_run_on_a_stream_continues_bit_for_bit(settings, speech, tmp_path, monkeypatch):
    def make(name):
        stage = {**ALIGN, "steps": 5, "batch_size": 2, "grad_accum": 2}
        data = {"train": [{"path": str(speech)}], "streaming": True}
        return settings(stage, data=data, output_dir=str(tmp_path / name))

    def on_step_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    straight = train(make("straight"))
    begin = StageCallback.on_step_begin
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageCallback, "on_step_begin", on_step_begin)
        train(make("stopped"))
    load, loaded = StreamingSet.load_state_dict, []
    monkeypatch.setattr(StreamingSet, "load_state_dict", lambda self, state: loaded.append(state) or load(self, state))
    assert largest_difference(straight, train(make("stopped"))) == 0
    assert [state["positions"] for state in loaded] == [{"0": [0, -1, 6, 6]}]
