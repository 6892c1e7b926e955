"""One length rule: what the config says, and what encoder and adapter really make."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Wav2Vec2BertConfig, Wav2Vec2Config, WhisperConfig

from modeling_audiophi import ADAPTERS, AudioPhiAdapterConfig, AudioPhiConfig
from modeling_audiophi.adapters import adapter_class
from modeling_audiophi.encoders import encoder_class
from modeling_audiophi.lengths_audiophi import join_windows, length_mask, output_length, shortest_input
from tests.conftest import WAVEFORM_SIZES

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER_CONFIGS = {
    "whisper": WhisperConfig(
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=150,
    ),
    "wav2vec2": Wav2Vec2Config(**{**WAVEFORM_SIZES, **SMALL}),
    "wav2vec2-bert": Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=8, conv_depthwise_kernel_size=3),
}
FRAMES = {"whisper": 300, "wav2vec2": 16_000, "wav2vec2-bert": 120}


@functools.cache
def encoder(name):
    torch.manual_seed(0)
    return encoder_class(ENCODER_CONFIGS[name])(ENCODER_CONFIGS[name]).eval()


@given(
    name=st.sampled_from(sorted(ENCODER_CONFIGS)),
    adapter=st.sampled_from(sorted(ADAPTERS)),
    share=st.lists(st.floats(0.003, 1), min_size=1, max_size=3),
    stack=st.integers(1, 6),
    window=st.integers(1, 20),
    queries=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_rule_equals_what_is_made(name, adapter, share, stack, window, queries):
    adapter_config = AudioPhiAdapterConfig(
        type=adapter,
        stack=stack,
        window=window,
        queries=queries,
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        kernel_size=3,
    )
    config = AudioPhiConfig(
        audio_config=ENCODER_CONFIGS[name], adapter_config=adapter_config, text_config=LlamaConfig()
    )
    lengths = torch.tensor([max(1, int(part * FRAMES[name])) for part in share])
    module = encoder(name)
    size = int(lengths.max())
    shape = {"whisper": (8, size), "wav2vec2": (size,), "wav2vec2-bert": (size, 8)}[name]
    with torch.no_grad():
        hidden, mask = module(torch.randn(len(lengths), *shape), length_mask(lengths, size))
        tokens, token_mask = adapter_class(adapter_config)(adapter_config, 16, 16)(hidden, mask)
    assert tokens.shape[:2] == token_mask.shape
    assert token_mask.sum(1).tolist() == output_length(lengths, config.audio_length_rule).tolist()
    for length, made in zip(lengths.tolist(), token_mask.sum(1).tolist(), strict=True):
        assert config.num_audio_tokens([length, length]) == 2 * made
    assert output_length(config.shortest_frames, config.audio_length_rule) >= 1
    assert output_length(config.shortest_frames - 1, config.audio_length_rule) == 0


@given(
    rule=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=4
    )
)
def test_the_shortest_input_makes_a_token(rule):
    rule = [(kernel, stride, min(padding, kernel - 1), multiply) for kernel, stride, padding, multiply in rule]
    shortest = shortest_input(rule)
    assert output_length(shortest, rule) >= 1
    assert shortest == 1 or output_length(shortest - 1, rule) == 0


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_joined_windows_keep_their_tokens_in_order(lengths, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, len(lengths)], strict=True)]
    mask = length_mask(torch.tensor(lengths), 5)
    tokens = torch.arange(mask.numel()).view(*mask.shape, 1).float()
    joined, joined_mask = join_windows(tokens, mask, torch.tensor(counts))
    assert torch.equal(joined[joined_mask], tokens[mask])
    first = 0
    for row, count in enumerate(counts):
        size = sum(lengths[first : first + count])
        assert joined_mask[row].tolist() == [True] * size + [False] * (joined_mask.shape[1] - size)
        first += count
    with pytest.raises(ValueError, match="adds up to"):
        join_windows(tokens, mask, torch.tensor([len(lengths) + 1] if len(lengths) > 1 else [1, 1]))
