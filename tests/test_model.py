"""The model as a whole: forward, generation, counts, invariance."""

import pytest
import torch


def prompt(processor, waveforms, texts=None, side="left"):
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": wave, "sampling_rate": 16_000}, {"type": "text", "text": "Write."}]}]
        for wave in waveforms
    ]
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", padding_side=side
    )


@pytest.mark.parametrize("readout", ["frames", "collapse"])
def test_forward_and_generate(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs = prompt(processor, [waveform(1.0), waveform(0.6, 1)])
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert (out[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all()
