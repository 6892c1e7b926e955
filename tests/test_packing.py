"""Several prompts in one row of what the language model reads: nothing is lost, and no prompt sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from modeling_audiophi import packing_audiophi
from modeling_audiophi.packing_audiophi import can_pack, cost, fill, pack_rows

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "llama": SIZES,
    "phi": {**SIZES, "num_key_value_heads": 4},
    "qwen3": {**SIZES, "head_dim": 8},
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def tiny(name):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(name, **FAMILIES[name])).train()


def mask_of(lengths, side="right"):
    places = torch.arange(max(lengths))
    mask = places < torch.tensor(lengths)[:, None]
    return (mask if side == "right" else mask.flip(1)).long()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from(["left", "right"]), st.integers(8, 2000))
def test_every_token_is_read_once_at_its_own_position(lengths, side, attention):
    language_model = tiny_llama()
    packing_audiophi.ATTENTION, before = attention, packing_audiophi.ATTENTION
    try:
        mask = mask_of(lengths, side)
        packed = pack_rows(mask, language_model)
        spared = packed is None or cost(*packed.source.shape) <= 0.9 * cost(*mask.shape)
    finally:
        packing_audiophi.ATTENTION = before
    if packed is None:
        return
    assert spared and max(lengths) <= packed.source.shape[1] <= 4 * max(lengths)
    values = torch.arange(mask.numel()).view(*mask.shape, 1)
    there = packed.pack(values)
    assert torch.equal(packed.unpack(there)[mask.bool()], values[mask.bool()])
    position = (mask.cumsum(1) - 1)[..., None]
    assert torch.equal(packed.unpack(packed.position_ids[..., None])[mask.bool()], position[mask.bool()])
    # Each prompt lies in one piece, begins at 0, and so does what is left over.
    begins = int((packed.position_ids == 0).sum())
    left_over = int((packed.source.shape[1] > packed_lengths(packed, mask)).sum())
    assert begins == len(lengths) + left_over


def packed_lengths(packed, mask):
    """How many real tokens each row holds."""
    rows = packed.place[mask.bool()] // packed.source.shape[1]
    return torch.bincount(rows, minlength=len(packed.source))


def tiny_llama(made=[]):  # noqa: B006
    if not made:
        made.append(tiny("llama"))
    return made[0]


def test_rows_are_as_long_as_costs_the_least():
    """Eight chats of a training step: of rows of 512 tokens a quarter is left over, and attention sees half more."""
    lengths = [60, 90, 110, 130, 150, 170, 200, 260]
    packed = pack_rows(mask_of(lengths), tiny_llama())
    assert packed.source.shape == (5, 260)
    assert cost(5, 260) < 0.75 * cost(3, fill(lengths, 512)[1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_a_row_do_not_see_each_other(name, implementation):
    language_model = tiny(name)
    language_model.set_attn_implementation(implementation)
    mask = mask_of([40, 7, 9, 11, 5])
    assert can_pack(language_model)
    packed = pack_rows(mask, language_model)
    assert packed.source.shape == (1, 72)
    embeds = language_model.get_input_embeddings()(torch.randint(0, 99, mask.shape))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    rows = language_model(inputs_embeds=packed.pack(embeds), position_ids=packed.position_ids, use_cache=False)
    found = packed.unpack(rows.last_hidden_state)[mask.bool()]
    torch.testing.assert_close(found, whole.last_hidden_state[mask.bool()], atol=2e-5, rtol=1e-4)


def test_families_with_a_state_are_not_packed():
    sizes = {**SIZES, "layer_types": ["conv", "full_attention"]}
    assert not can_pack(AutoModel.from_config(AutoConfig.for_model("lfm2", **sizes)))


def test_training_packs_and_evaluation_does_not(make_tiny_model, waveform, monkeypatch):
    """And losses and gradients are those of the padded batch."""
    model, processor = make_tiny_model()
    words = ["A", "A long instruction of many words, which makes the batch much wider than its other rows are. " * 2]
    chats = []
    for number in range(5):
        clip = {"type": "audio", "audio": (waveform(0.4 + 0.1 * number, number), 16_000)}
        asked = [clip, {"type": "text", "text": words[number == 3]}]
        chats.append([{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}])
    right = {"padding_side": "right"}
    batch = dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True, processor_kwargs=right))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    read, language_model = [], model.model.language_model
    language_model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # the adapter's dropout
        loss = model.train()(**batch).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, found = gradients()
    monkeypatch.setattr(packing_audiophi, "WORTH", 2.0)
    padded_loss, expected = gradients()
    torch.testing.assert_close(loss, padded_loss, atol=1e-6, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3, msg=name)
    monkeypatch.undo()
    model.eval()(**batch)
    (packed, padded, evaluated) = read
    assert packed.numel() < 0.9 * padded.numel() and evaluated == padded and padded[0] == 5
