"""Losses of labelled tokens in parts: the same loss and gradients, and never more logits than a part's."""

import pytest
import torch

from modeling_audiophi import token_losses_audiophi
from tests.conftest import prompts
from tests.test_model import labelled

VOCABULARY = 400


@pytest.fixture
def case(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    model.add_lora("text", {"r": 2, "target_modules": "all-linear"})
    model.tune("text", "lora")
    inputs = prompts(processor, [[waveform(1.0)], [waveform(0.6, 1)], [waveform(0.8, 2)]], "right")
    return model, {**inputs, "labels": labelled(processor, inputs)}


def teacher_of(inputs, audio_token_id):
    """The last row without a teacher; elsewhere it reads the same, with a word in the place of the audio."""
    labels = inputs["labels"].clone()
    labels[-1] = -100
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == audio_token_id, 20)
    return {"teacher_input_ids": ids, "teacher_attention_mask": inputs["attention_mask"], "teacher_labels": labels}


def losses_and_gradients(model, inputs):
    """The outputs' losses, gradients by name, and the most values that the loss's graph keeps of the vocabulary."""
    most = [0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        # Some CPUs' kernels keep the table as (D, VOCABULARY): a view of a weight, no logits.
        logits = tensor.shape[-1:] == (VOCABULARY,) and tensor.untyped_storage().data_ptr() not in weights
        if logits and tensor.dim() == 2:
            most[0] = max(most[0], len(tensor))
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return (output.lm_loss, output.distill_loss), gradients, most[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distill", [False, True])
def test_parts_change_nothing(case, monkeypatch, weighted, distill):
    model, inputs = case
    inputs = {**inputs, **(teacher_of(inputs, model.config.audio_token_id) if distill else {})}
    if weighted:
        inputs["label_weights"] = torch.rand(inputs["labels"].shape)
    losses, gradients, most = losses_and_gradients(model, inputs)
    monkeypatch.setattr(token_losses_audiophi, "MOST_LOGITS", 4 * VOCABULARY + 1)
    in_parts, again, fewer = losses_and_gradients(model, inputs)
    for one, other in zip(losses, in_parts, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-5)
    assert gradients.keys() == again.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)
    assert most > 4 and fewer == 0  # a part's logits live while it is computed, no longer
    assert token_losses_audiophi.most_tokens(VOCABULARY) == 4
    assert token_losses_audiophi.most_tokens(10**12) == 1


def test_nothing_labelled_is_no_loss(case):
    model, inputs = case
    output = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    output.loss.backward()
    assert output.loss == 0
