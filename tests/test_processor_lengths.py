"""The processor's token counts equal what encoder and adapter really return, for every pair of them and any length.

The two sides cannot share code (their files ship separately to the Hub), so this is what keeps them together.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_audiophi import ADAPTERS
from modeling_audiophi.lengths_audiophi import output_length
from modeling_audiophi.lengths_audiophi import shortest_input as shortest_input_of_model
from processing.processing_audiophi import count_tokens, shortest_input

RATE = 16_000
ENCODERS = (
    "tiny_whisper_dir",
    "tiny_wav2vec2_dir",
    "tiny_wav2vec2_layer_dir",
    "tiny_hubert_dir",
    "tiny_wavlm_dir",
    "tiny_w2v_bert_dir",
)
LAYERS = st.tuples(st.integers(1, 10), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4)).filter(
    lambda layer: layer[2] < layer[0]
)

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
    """Audio tokens per clip, from the model's own encoder and adapter."""
    with torch.inference_mode():
        features = model.get_audio_features(**inputs).pooler_output
    return len(features)


@pytest.mark.parametrize(
    "pair", [(e, a) for e in ENCODERS for a in ADAPTERS], indirect=True, ids=lambda value: "-".join(value)
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 12_000), min_size=1, max_size=2))
def test_placeholders_equal_the_models_tokens(pair, lengths):
    model, processor = pair
    clips = [(0.1 * np.random.default_rng(n).normal(size=n).astype(np.float32), RATE) for n in lengths]
    batch = processor(text=[processor.audio_token + "x"] * len(clips), audio=clips)
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert placeholders == [processor.num_audio_tokens(n) for n in lengths]
    assert min(placeholders) >= 1
    audio = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert real_counts(model, audio) == sum(placeholders)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_clips_of_several_windows(encoder, request, make_tiny_model):
    window = {"tiny_whisper_dir": 50, "tiny_w2v_bert_dir": 25}.get(encoder, 8_000)
    model, processor = make_tiny_model(align=False, audio=request.getfixturevalue(encoder), window_frames=window)
    assert processor.window_frames == window
    clips = [(np.random.default_rng(n).normal(size=n).astype(np.float32), RATE) for n in (20_001, 3_000, 8_001)]
    batch = processor(text=[processor.audio_token] * 3, audio=clips)
    assert batch["audio_num_windows"].tolist() == [3, 1, 2]
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert placeholders == [processor.num_audio_tokens(len(clip)) for clip, _ in clips]
    audio = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert real_counts(model, audio) == sum(placeholders)


@given(rule=st.lists(LAYERS, max_size=8), length=st.integers(0, 100_000))
def test_both_counting_functions_agree(rule, length):
    rule = [list(layer) for layer in rule]
    assert count_tokens(length, rule) == output_length(length, rule)


@given(rule=st.lists(LAYERS, max_size=5))
def test_shortest_input_is_the_shortest(rule):
    shortest = shortest_input(rule)
    assert count_tokens(shortest, rule) >= 1
    assert shortest == 1 or count_tokens(shortest - 1, rule) == 0
    assert shortest <= shortest_input_of_model([list(layer) for layer in rule])
