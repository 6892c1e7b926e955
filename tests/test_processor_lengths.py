"""The lengths that the processor plans with, without audio, are those of encoder and adapter, for every pair of them
and any length.

The two sides cannot share code (their files ship separately to the Hub), so this is what keeps them together.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

from modeling_audiophi import ADAPTERS
from processing.window_features import window_features

RATE = 16_000
ENCODERS = (
    "tiny_whisper_dir",
    "tiny_wav2vec2_dir",
    "tiny_wav2vec2_layer_dir",
    "tiny_hubert_dir",
    "tiny_wavlm_dir",
    "tiny_w2v_bert_dir",
)

# Of a fixed window, which the extractor fills up.
WINDOWED = ("tiny_ast_dir", "tiny_clap_dir", "tiny_languagebind_dir")

models = {}


@pytest.fixture
def pair(request, make_tiny_model):
    """(model, processor) of an encoder and an adapter, made once."""
    encoder, adapter = request.param
    if request.param not in models:
        window = None
        if adapter == "identity" and encoder != "tiny_whisper_dir":  # 30 s in one window would not fit the context
            window = 400 if encoder == "tiny_w2v_bert_dir" else 8 * RATE
        models[request.param] = make_tiny_model(
            adapter=adapter, align=False, audio=request.getfixturevalue(encoder), window_frames=window
        )
    return models[request.param]


def real_counts(model, inputs):
    """Audio tokens of all clips, from the model's own encoder and adapter."""
    audio = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        return len(model.get_audio_features(**audio).pooler_output)


@pytest.mark.parametrize(
    "pair", [(e, a) for e in ENCODERS for a in ADAPTERS], indirect=True, ids=lambda value: "-".join(value)
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 12_000), min_size=1, max_size=2))
def test_planned_lengths_are_the_models(pair, lengths):
    model, processor = pair
    clips = [(0.1 * np.random.default_rng(n).normal(size=n).astype(np.float32), RATE) for n in lengths]
    batch = processor(text=[processor.audio_token + "x"] * len(clips), audio=clips)
    frames = [processor.frame_counts(n) for n in lengths]
    mask = next(value for name, value in batch.items() if name.endswith("_mask") and name != "attention_mask")
    assert mask.sum(1).tolist() == sum(frames, [])
    planned = [model.config.num_audio_tokens(counts) for counts in frames]
    assert min(planned) >= 1 and real_counts(model, batch) == sum(planned)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_clips_of_several_windows(encoder, request, make_tiny_model):
    window = {"tiny_whisper_dir": 50, "tiny_w2v_bert_dir": 25}.get(encoder, 8_000)
    model, processor = make_tiny_model(align=False, audio=request.getfixturevalue(encoder), window_frames=window)
    assert processor.window_frames == window
    clips = [(np.random.default_rng(n).normal(size=n).astype(np.float32), RATE) for n in (20_001, 3_000, 8_001)]
    batch = processor(text=[processor.audio_token] * 3, audio=clips)
    assert batch["audio_num_windows"].tolist() == [3, 1, 2]
    frames = [processor.frame_counts(len(clip)) for clip, _ in clips]
    assert [len(counts) for counts in frames] == [3, 1, 2]
    assert real_counts(model, batch) == sum(model.config.num_audio_tokens(counts) for counts in frames)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_window_is_shorter_than_the_shortest(encoder, request, make_tiny_model):
    model, processor = make_tiny_model(align=False, audio=request.getfixturevalue(encoder))
    shortest = model.config.shortest_frames
    assert model.config.num_audio_tokens([shortest]) == 1 and model.config.num_audio_tokens([shortest - 1]) == 0
    (frames,) = processor.frame_counts(1)
    assert frames >= shortest and processor.encode_audio(([0.5], RATE))[processor.feature_key].shape[0] == 1


@pytest.mark.parametrize("encoder", [*ENCODERS, *WINDOWED])
def test_frames_are_counted_without_making_features(encoder, request, monkeypatch):
    """A corpus is counted row by row before anything is encoded."""
    extractor = AutoFeatureExtractor.from_pretrained(request.getfixturevalue(encoder))
    features = window_features(extractor)
    rng, first = np.random.default_rng(0), features.shortest_window(1)
    lengths = [first, first + 1, *rng.integers(first, int(0.8 * extractor.sampling_rate), 20).tolist()]
    if features.grain > 1:
        lengths = [length // 320 * 320 for length in lengths]
    made = [int(features.extract(rng.normal(size=n).astype(np.float32))[1].sum()) for n in lengths]
    monkeypatch.setattr(type(extractor), "__call__", lambda *args, **kwargs: pytest.fail("features were made"))
    assert [features.num_frames(n) for n in lengths] == made
