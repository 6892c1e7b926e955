"""Adapters: stated length equals real length, padding never changes a token, gradients reach every parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_audiophi import ADAPTERS, AudioPhiAdapterConfig
from modeling_audiophi.adapters import adapter_class
from modeling_audiophi.lengths_audiophi import length_mask, output_length
from tests.conftest import random_like_trained

SIZES = {"hidden_size": 16, "kernel_size": 3, "num_layers": 2, "num_heads": 2}


def build(name, **kwargs):
    torch.manual_seed(0)
    config = AudioPhiAdapterConfig(type=name, **{**SIZES, **kwargs})
    return random_like_trained(adapter_class(config)(config, 12, 8)).eval(), config


@given(
    name=st.sampled_from(sorted(ADAPTERS)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    stack=st.integers(1, 5),
    window=st.integers(1, 9),
    queries=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_length_and_padding_invariance(name, lengths, stack, window, queries):
    adapter, config = build(name, stack=stack, window=window, queries=queries)
    lengths = [*lengths, 17]
    hidden = torch.randn(len(lengths), max(lengths), 12, generator=torch.Generator().manual_seed(1)) * 30
    with torch.no_grad():
        tokens, mask = adapter(hidden, length_mask(torch.tensor(lengths), max(lengths)))
        assert torch.isfinite(tokens).all()
        for row, length in enumerate(lengths):
            count = output_length(length, adapter.length_rule(config))
            assert int(mask[row].sum()) == count and mask[row, :count].all()
            if length:
                alone, alone_mask = adapter(hidden[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
                assert int(alone_mask.sum()) == count
                assert torch.allclose(tokens[row, :count], alone[0, :count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_parameter_gets_a_gradient(name):
    adapter, _ = build(name, dropout=0.1)
    adapter.train()
    tokens, mask = adapter(torch.randn(2, 50, 12), length_mask(torch.tensor([50, 33])))
    tokens[mask].square().sum().backward()
    for parameter_name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_scale_of_the_encoder_does_not_matter(name):
    adapter, _ = build(name)
    hidden, mask = torch.randn(1, 24, 12), torch.ones(1, 24, dtype=torch.bool)
    assert torch.allclose(adapter(hidden, mask)[0], adapter(hidden * 34, mask)[0], atol=1e-2)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="unknown adapter 'mof_mlp'; known: .*mlp"):
        adapter_class(AudioPhiAdapterConfig(type="mof_mlp"))
    with pytest.raises(ValueError, match="stack must be at least 1"):
        AudioPhiAdapterConfig(stack=0)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        build("conv_mlp", kernel_size=4)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        build("qformer", num_heads=3)
