"""The cache of encoder outputs: exact round trip, interruptions, damage, fingerprints."""

import json

import numpy as np
import pytest
import torch

from audiophi.training.feature_cache import FeatureCache, clip_key, fingerprint_of, hash_audio, hash_weights


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


def test_interrupted_and_damaged_shards_are_made_again(tmp_path):
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


def test_arrays_are_memory_mapped(tmp_path):
    cache = FeatureCache(tmp_path, {}, "float16")
    cache.put("a", clip(0, 4))
    cache.flush()
    assert all(isinstance(array, np.memmap) for array in cache._open.values())
