"""tools/build_cache.py: the cache of encoder outputs, filled before the training and by many processes."""

import json
import re
import subprocess
import sys

import pytest
import yaml

import build_cache
from modeling_audiophi.hearing_audiophi import HearingMixin
from tests.tiny_runs import ALIGN, ENVIRONMENT, LM, ROOT, train

PATIENCE = 600  # seconds


@pytest.fixture
def cached(settings, speech, tmp_path):
    """A recipe's file: 16 clips and one that cannot be read, at two speeds; two stages read the cache."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "bad.wav").write_bytes((speech / "0.wav").read_bytes()[:30])
    row = {"audio": "bad.wav", "text": "cut short", "id": "cut", "seconds": 1.0}
    (bad / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    data = {"train": [{"path": str(speech)}, {"path": str(bad)}], "speeds": [0.9, 1.0], "max_bad_rows": 0.5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings({**ALIGN, "steps": 2}, {**LM, "steps": 2}, data=data)))
    return recipe


def test_the_cache_is_built_in_shards_resumed_and_used(cached, settings, capsys, monkeypatch):
    assert build_cache.main([str(cached), "--shard", "1/2"]) == 0
    first = capsys.readouterr().out
    assert build_cache.main([str(cached), "--shard=2/2"]) == 0
    second = capsys.readouterr().out
    clips = [int(line.split(" clips encoded now")[0].split()[-1]) for line in (first, second)]
    assert sum(clips) == 32 and min(clips) >= 14, "the shards are not equal parts"
    assert build_cache.main([str(cached), "--shard", "1/1"]) == 0
    assert "17 rows, 0 clips encoded now, 1 bad rows" in capsys.readouterr().out
    monkeypatch.setattr(HearingMixin, "encode", None)  # the training does not run the encoder
    train(yaml.safe_load(cached.read_text()))
    printed = capsys.readouterr().out
    assert printed.count("cache: 32 clips") == 2, "a stage has another cache"


@pytest.mark.faults
def test_two_shards_at_once_and_processes_in_each(cached, tmp_path):
    """Writers that share a folder, and datasets.map's workers."""
    command = [sys.executable, str(ROOT / "tools" / "build_cache.py"), str(cached), "--num_proc", "2", "--shard"]
    running = [
        subprocess.Popen([*command, f"{n}/2"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for n in (1, 2)
    ]
    printed = "".join(process.communicate(timeout=PATIENCE)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert sum(int(n) for n in re.findall(r"(\d+) clips encoded now", printed)) == 32
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/fingerprint.json"))
    listed = [
        clip["key"]
        for index in folder.glob("*.json")
        if index.stem != "fingerprint"
        for clip in json.loads(index.read_text())
    ]
    assert len(listed) == len(set(listed)) == 32


def test_what_cannot_be_built_is_refused_by_name(cached, capsys, tmp_path):
    for arguments, named in (
        (["--shard", "3/2"], "--shard 3/2"),
        (["--num_proc", "0"], "--num_proc 0"),
        (["--cache", "false"], "cache: false"),
        (["--data.streaming", "true"], "data.streaming: true"),
        (["--stages.0.tune.encoder", "full"], "stages.0.tune.encoder"),
        (["--shard"], "--shard needs a value"),
    ):
        assert build_cache.main([str(cached), *arguments]) == 2
        assert named in capsys.readouterr().err
    assert build_cache.main([str(cached), "--data.max_bad_rows", "0.01"]) == 1
    assert "bad_rows_cache" in capsys.readouterr().err
