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
    output_size = 12 if name == "identity" else 8
    return random_like_trained(adapter_class(config)(config, 12, output_size)).eval(), config


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


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - {"identity"}))
def test_every_parameter_gets_a_gradient(name):
    adapter, _ = build(name, dropout=0.1)
    adapter.train()
    tokens, mask = adapter(torch.randn(2, 50, 12), length_mask(torch.tensor([50, 33])))
    tokens[mask].square().sum().backward()
    for parameter_name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - {"identity"}))
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
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        build("resampler", num_heads=3)
    config = AudioPhiAdapterConfig(type="identity")
    with pytest.raises(ValueError, match="as wide as the LLM, got 12 and 8: use linear"):
        adapter_class(config)(config, 12, 8)


def test_tinyllavas_connectors_exist_under_their_names():
    assert {"linear", "mlp2x_gelu", "qformer", "resampler", "identity"} <= ADAPTERS.keys()


def test_mlp2x_gelu_is_tinyllavas_on_normalised_frames():
    """Linear to the LLM's width, GELU, Linear; two linear layers are all its weights beside the norm."""
    adapter, _ = build("mlp2x_gelu", stack=1)
    shapes = {name: tuple(value.shape) for name, value in adapter.state_dict().items() if name.startswith("mlp")}
    assert shapes == {"mlp.0.weight": (8, 12), "mlp.0.bias": (8,), "mlp.2.weight": (8, 8), "mlp.2.bias": (8,)}
    hidden, weights = torch.randn(1, 5, 12), adapter.mlp
    inner = torch.nn.functional.layer_norm(hidden, (12,)) @ weights[0].weight.T + weights[0].bias
    expected = torch.nn.functional.gelu(inner) @ weights[2].weight.T + weights[2].bias
    assert torch.allclose(adapter(hidden, torch.ones(1, 5, dtype=torch.bool))[0], expected, atol=1e-5)


def test_identity_changes_nothing():
    adapter, config = build("identity", stack=4)
    hidden, mask = torch.randn(2, 5, 12), length_mask(torch.tensor([5, 3]))
    assert all(torch.equal(a, b) for a, b in zip(adapter(hidden, mask), (hidden, mask), strict=True))
    assert not list(adapter.parameters()) and adapter.length_rule(config) == []
    tiny = AudioPhiAdapterConfig(type="identity")
    assert adapter_class(tiny)(tiny, 8, 8)(hidden[..., :8], mask)[0].shape == (2, 5, 8)


def test_resampler_reads_its_window_only():
    adapter, _ = build("resampler", window=5, queries=2)
    hidden, mask = torch.randn(1, 12, 12), torch.ones(1, 12, dtype=torch.bool)
    changed = hidden.clone()
    changed[:, 5:10] *= -1
    with torch.no_grad():
        difference = (adapter(hidden, mask)[0] - adapter(changed, mask)[0]).abs().amax(-1)[0]
    assert (difference[:2] == 0).all() and (difference[4:] == 0).all() and (difference[2:4] > 1e-3).all()


@pytest.mark.parametrize(
    "name, learned, inner",
    [
        ("qformer", "queries", {"self_norm", "self_attention", "cross_norm", "cross_attention", "mlp"}),
        ("resampler", "latents", {"frames_norm", "latents_norm", "query", "key_value", "out", "mlp"}),
    ],
)
def test_windowed_adapters_keep_the_names_that_checkpoints_have(name, learned, inner):
    adapter, _ = build(name, num_layers=2)
    names = [key.split(".") for key in adapter.state_dict()]
    assert {key[0] for key in names} == {
        "norm", "proj_in", "frame_positions", learned, "blocks", "norm_out", "proj_out",
    }  # fmt: skip
    blocks = {(key[1], key[2]) for key in names if key[0] == "blocks"}
    assert blocks == {(number, part) for number in "01" for part in inner}
