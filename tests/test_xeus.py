"""XEUS, the model: equal to ESPnet's own modules, and no clip depends on its batch.

`reference/xeus_tiny.safetensors` was made from ESPnet by tools/make_xeus_reference.py; the slow test makes it again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_audiophi import XeusConfig, XeusModel
from modeling_audiophi.encoders import encoder_class
from modeling_audiophi.lengths_audiophi import length_mask, output_length, shortest_input
from tests.xeus_reference import REFERENCE, Reference, tiny

ROOT = Path(__file__).resolve().parents[1]


# ---- ESPnet


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_espnet_on_a_padded_batch(attention):
    reference = tiny(espnet_exact=True)
    model = reference.model()
    model.set_attn_implementation(attention)
    assert len(set(reference.lengths.tolist())) == 3
    assert reference.difference(model) < 1e-5
    frames = model._get_feat_extract_output_lengths(reference.lengths)
    assert torch.equal(frames, reference.tensors["output_lengths"])


def test_default_mode_equals_espnet_for_one_clip_and_not_for_a_padded_batch():
    reference, exact = tiny(), tiny(espnet_exact=True).model()
    model = reference.model()
    with torch.no_grad():
        alone = reference.speech[:1]
        assert torch.allclose(model(alone).last_hidden_state, exact(alone).last_hidden_state, atol=1e-5)
    assert reference.difference(model) > 0.1


def test_parameters_of_the_released_model():
    with torch.device("meta"):
        model = XeusModel(XeusConfig())
    count = {
        name: sum(p.numel() for key, p in model.named_parameters() if key.startswith(name))
        for name in ("frontend", "feature_projection", "")
    }
    assert count == {"frontend": 4_210_176, "feature_projection": 525_312, "": 574_121_600}


# ---- the model


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_lengths(lengths):
    """The rule, the mask and the frames that come out agree; nothing is NaN, not even for silence or no samples."""
    encoder = encoder_class(tiny().config)(tiny().config).eval()
    rule = encoder.length_rule(encoder.config)
    size = max(1, *lengths)
    with torch.no_grad():
        hidden, mask = encoder(torch.zeros(len(lengths), size), length_mask(torch.tensor(lengths), size))
    assert mask.sum(1).tolist() == [output_length(length, rule) for length in lengths]
    assert hidden.shape[:2] == mask.shape and torch.isfinite(hidden).all()
    assert mask.shape[1] == max(1, output_length(size, rule))


def test_released_lengths():
    rule = encoder_class(XeusConfig()).length_rule(XeusConfig())
    assert output_length(32_000, rule) == 99 and shortest_input(rule) == 400
    with pytest.raises(ValueError, match="399 samples make no frame"):
        tiny().model()(torch.zeros(1, 399))
    with pytest.raises(ValueError, match=r"\(batch, samples\), got a tensor of shape \(1, 80, 30\)"):
        tiny().model()(torch.zeros(1, 80, 30))


@pytest.mark.parametrize("layer", ["last", 0, -1, "mix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_does_not_depend_on_its_batch(layer, dtype):
    reference = tiny()
    encoder = encoder_class(reference.config)(reference.config, layer)
    encoder.model.load_state_dict(reference.model().state_dict(), strict=layer in ("last", "mix"))
    encoder = encoder.eval().to(dtype)
    # Garbage in the padding, and more of it than the longest clip needs.
    speech = torch.nn.functional.pad(reference.speech, (0, 777))
    mask = torch.nn.functional.pad(reference.mask, (0, 777))
    speech = speech.masked_fill(~mask, 3.0)
    with torch.no_grad():
        hidden, hidden_mask = encoder(speech, mask)
        assert hidden.dtype == dtype and torch.isfinite(hidden).all()
        for row, length in enumerate(reference.lengths.tolist()):
            expected, expected_mask = encoder(speech[row : row + 1, :length], mask[row : row + 1, :length])
            assert expected_mask.all() and int(hidden_mask[row].sum()) == expected.shape[1]
            difference = (hidden[row, : expected.shape[1]] - expected[0]).abs().max()
            assert difference < (1e-5 if dtype == torch.float32 else 0.1) * expected.abs().max()


def test_loudness_and_offset_do_not_matter():
    reference = tiny()
    model = reference.model()
    with torch.no_grad():
        expected = model(reference.speech, reference.mask).last_hidden_state
        louder = model(3 * reference.speech + 0.5, reference.mask).last_hidden_state
    frames = length_mask(model._get_feat_extract_output_lengths(reference.lengths))
    assert (expected - louder)[frames].abs().max() < 0.01


def test_bfloat16_is_close_to_float32():
    reference = tiny()
    with torch.no_grad():
        expected = reference.model()(reference.speech, reference.mask).last_hidden_state
        rough = reference.model().bfloat16()(reference.speech, reference.mask).last_hidden_state.float()
    frames = length_mask(
        output_length(reference.lengths, encoder_class(reference.config).length_rule(reference.config))
    )
    assert ((rough - expected)[frames].square().mean() / expected[frames].square().mean()).sqrt() < 0.05


def test_last_is_after_the_final_norm_and_minus_one_before():
    reference = tiny(espnet_exact=True)
    outputs = {}
    for layer in ("last", -1, 1):
        encoder = encoder_class(reference.config)(reference.config, layer)
        encoder.model.load_state_dict(reference.model().state_dict(), strict=False)
        assert len(encoder.model.layers) == (1 if layer == 1 else 2)
        with torch.no_grad():
            outputs[layer], _ = encoder.eval()(reference.speech, reference.mask)
    assert torch.allclose(outputs["last"], reference.tensors["output"], atol=1e-5)
    assert torch.allclose(outputs[-1], reference.tensors["hidden.1"], atol=1e-5)
    assert torch.allclose(outputs[1], reference.tensors["hidden.0"], atol=1e-5)
    with pytest.raises(ValueError, match="encoder_layer 3: .*3 hidden states"):
        encoder_class(reference.config)(reference.config, 3)


def test_gradient_checkpointing_changes_no_gradient():
    reference = tiny(hidden_dropout=0.0, attention_dropout=0.0)
    gradients = []
    for checkpointing in (False, True):
        model = reference.model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model(reference.speech, reference.mask).last_hidden_state.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_new_weights_are_initialised():
    torch.manual_seed(0)
    model = XeusModel(tiny().config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.layers[0].cgmlp.csgu.conv.bias.eq(1).all() and model.pos_conv.magnitude.min() > 0
    assert model(torch.randn(1, 1000)).last_hidden_state.std() > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv_dim": [8, 8]}, "2, 7 and 7 entries"),
        ({"num_attention_heads": 7}, "hidden_size 1024 is no multiple of num_attention_heads 7"),
        ({"merge_kernel_size": 30}, "merge_kernel_size must be odd"),
        ({"cgmlp_size": 33}, "cgmlp_size must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        XeusConfig(**changes)


# ---- ESPnet itself


@pytest.mark.slow
def test_espnet_makes_the_reference_again_also_at_full_width(tmp_path):
    """ESPnet from PyPI, in a temporary folder; two blocks of the released width (300 MB)."""
    command = [sys.executable, str(ROOT / "tools" / "make_xeus_reference.py")]
    command += ["--output", str(tmp_path / "again"), "--full-width", str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"PyPI does not give ESPnet: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    frozen, again = tiny(espnet_exact=True), Reference(tmp_path / "again" / "xeus_tiny.safetensors", espnet_exact=True)
    assert frozen.tensors.keys() == again.tensors.keys()
    assert all(torch.allclose(frozen.tensors[key], again.tensors[key], atol=1e-5) for key in frozen.tensors)
    assert json.loads((tmp_path / "again" / "xeus_keys.json").read_text()) == json.loads(
        (REFERENCE / "xeus_keys.json").read_text()
    )
    assert again.difference(again.model()) < 1e-5
    full = Reference(tmp_path / "full" / "xeus_full_width.safetensors", espnet_exact=True)
    assert full.config.hidden_size == 1024 and full.difference(full.model()) < 1e-5
