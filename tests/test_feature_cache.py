"""The cache of encoder outputs: exact round trip, interruptions, damage, fingerprints."""

import json
import os
import resource

import pytest
import torch

from audiophi.training.bad_rows import BadRows
from audiophi.training.cache_filling import fill_cache, open_cache
from audiophi.training.corpus import Corpus
from audiophi.training.feature_cache import FeatureCache, clip_key, fingerprint_of, hash_audio, hash_weights
from audiophi.training.precision import fast_precision
from audiophi.training.recipe import recipe_from_dict


def clip(seed, *lengths, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator) for n in lengths]


def test_round_trip_over_shards_and_processes(tmp_path):
    cache = FeatureCache(tmp_path, {"encoder": "a"}, "float32", shard_bytes=500)
    clips = {f"clip{i}": clip(i, *([3 + i] * (1 + i % 3))) for i in range(12)}
    for key, windows in clips.items():
        cache.put(key, windows)
    cache.flush()
    again = FeatureCache(tmp_path, {"encoder": "a"}, "float32")
    assert len(again) == 12 and len(list(again.folder.glob("*.npy"))) > 3
    for key, windows in clips.items():
        assert again.num_frames(key) == sum(map(len, windows))
        for stored, window in zip(again.get(key), windows, strict=True):
            assert torch.equal(stored, window)


def test_float16_is_close_and_range_is_checked(tmp_path):
    cache = FeatureCache(tmp_path, {}, "float16")
    windows = clip(0, 5)
    cache.put("a", windows)
    torch.testing.assert_close(cache.get("a")[0], windows[0], atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="cache_dtype: float32"):
        cache.put("b", [torch.full((2, 6), 1e5)])


def test_interrupted_and_damaged_shards_are_made_again(tmp_path, caplog):
    cache = FeatureCache(tmp_path, {}, "float32", shard_bytes=1)
    cache.put("whole", clip(0, 4))
    cache.put("damaged", clip(1, 4))
    shards = {json.loads(index.read_text())[0]["key"]: index for index in cache.folder.glob("?" * 32 + ".json")}
    array = shards["damaged"].with_suffix(".npy")
    array.write_bytes(array.read_bytes()[:-8])
    (cache.folder / "deadbeef.npy").write_bytes(b"killed before its index was written")
    (cache.folder / "deadbeef.json.x.partial").write_bytes(b"[")
    again = FeatureCache(tmp_path, {}, "float32")
    assert "whole" in again and "damaged" not in again and len(again) == 1
    assert f"{array} and {array.stem}.json are damaged" in caplog.text and not array.exists()
    again.put("damaged", clip(1, 4))
    again.flush()
    assert "damaged" in FeatureCache(tmp_path, {}, "float32")


def test_other_encoder_layer_or_dtype_is_another_cache(tmp_path):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert hash_weights(first) != hash_weights(second)
    assert hash_weights(first) == hash_weights(first)
    folders = {
        FeatureCache(tmp_path, fingerprint_of(weights=hash_weights(module), layer=layer), dtype).folder
        for module in (first, second)
        for layer in ("last", 2)
        for dtype in ("float16", "float32")
    }
    assert len(folders) == 8


def test_audio_key_is_content_and_speed(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"sound" * 1000)
    assert hash_audio(path) == hash_audio(str(path)) == hash_audio(b"sound" * 1000)
    key = hash_audio(path)
    assert len({clip_key(key), clip_key(key, 0.9), clip_key(hash_audio(b"other"))}) == 3
    path.write_bytes(b"other")
    assert hash_audio(path) != hash_audio(b"sound" * 1000)


def test_more_shards_than_file_descriptors(tmp_path):
    cache = FeatureCache(tmp_path, {}, "float32", shard_bytes=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 50, limits[1]))
    try:
        for number in range(300):
            cache.put(f"clip{number}", [torch.full((2, 3), float(number))])
        again = FeatureCache(tmp_path, {}, "float32")
        assert len(again) == len(list(again.folder.glob("*.npy"))) == 300
        assert all(float(c.get(f"clip{n}")[0].sum()) == 6 * n for n in range(300) for c in (cache, again))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_read_now_is_not_removed(tmp_path, caplog):
    """A directory in the place of a file stands for a share that is away: opening it is an OSError."""
    cache = FeatureCache(tmp_path, {}, "float32", shard_bytes=1)
    cache.put("away", clip(0, 4))
    (array,) = cache.folder.glob("*.npy")
    array.rename(tmp_path / "kept.npy")
    array.mkdir()
    assert "away" not in FeatureCache(tmp_path, {}, "float32")
    assert array.exists() and array.with_suffix(".json").exists() and "cannot be read" in caplog.text
    with pytest.raises(OSError, match=array.name):
        cache.get("away")
    array.rmdir()
    (tmp_path / "kept.npy").rename(array)
    assert torch.equal(FeatureCache(tmp_path, {}, "float32").get("away")[0], clip(0, 4)[0])


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="lacks the encoder's outputs of clip other@1"):
        FeatureCache(tmp_path, {}).get("other@1")


@pytest.fixture
def filled(settings, make_tiny_model, tmp_path, speech):
    """fill(precision, workers) -> the cache of a tiny model, and its corpus."""
    model, processor = make_tiny_model()

    def fill(precision, workers=0):
        stage = {"name": "lm", "loss": "lm", "steps": 1, "batch_size": 1, "precision": precision}
        recipe = recipe_from_dict(settings(stage, cache_dir=str(tmp_path / f"{precision}{workers}")))
        corpus = Corpus(recipe.data.train, BadRows(tmp_path / "bad.jsonl", 1.0))
        cache, encode = open_cache(recipe, model, processor)
        assert fill_cache(corpus, cache, processor, encode, [1.0], batch_seconds=4.0, workers=workers) == 16
        return cache, [cache.get(corpus.key(row, 0, 1.0)) for row in corpus.rows]

    return fill


def test_workers_decode_and_the_features_are_the_same(filled, tmp_path, monkeypatch):
    def waveform(self, *given):
        (tmp_path / f"decoded-by-{os.getpid()}").touch()
        return decode(self, *given)

    decode = Corpus.waveform
    monkeypatch.setattr(Corpus, "waveform", waveform)
    torch.manual_seed(0)
    (_, features), drawn = filled("fp32"), torch.rand(1)
    assert [file.name for file in tmp_path.glob("decoded-by-*")] == [f"decoded-by-{os.getpid()}"]
    torch.manual_seed(0)
    (_, again), drawn_again = filled("fp32", workers=2), torch.rand(1)
    assert len(list(tmp_path.glob("decoded-by-*"))) == 3
    assert drawn == drawn_again, "the cache changes what is drawn after it"
    for one, other in zip(features, again, strict=True):
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-4)


def test_features_are_made_in_the_stages_precision_where_that_is_fast(filled):
    (exact, features), (fast, rounded) = filled("fp32"), filled("bf16")
    differs = fast_precision("bf16", "cpu")[0] == "bf16"
    assert (exact.folder.name != fast.folder.name) == differs
    for one, other in zip(features, rounded, strict=True):
        assert torch.equal(one[0], other[0]) != differs
        torch.testing.assert_close(one[0], other[0], atol=0.1, rtol=0.1)
