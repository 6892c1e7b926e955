"""The language model's own prior, from a cache that follows the beams, against whole sequences without one."""

import torch

from modeling_audiophi.kv_cache_audiophi import CACHE_NAME
from modeling_audiophi.lm_prior_audiophi import LanguageModelPrior
from modeling_audiophi.lora_audiophi import without_lora
from tests.conftest import prompts

START, END = 7, 2


def prior_of(model, vocab_ids, weight=0.5):
    def predict(tokens, cache):
        hidden = model.model.language_model(input_ids=tokens, use_cache=True, **{CACHE_NAME: cache})
        return model.compute_logits(hidden.last_hidden_state)

    config = model.config.text_config
    return LanguageModelPrior(predict, config, vocab_ids, [END], torch.tensor([True, False]), START, 2, weight)


@torch.no_grad()
def test_it_follows_the_beams_and_equals_whole_sequences(make_tiny_model):
    model, _ = make_tiny_model()
    vocab_ids = torch.arange(10, 310)
    prior = prior_of(model, vocab_ids)
    # The second row wins, then the first; the last two rows belong to another prompt and have written the same.
    steps = [[[], [], [], []], [[20], [30], [30], [40]], [[30, 21], [30, 22], [30, 22], [40, 23]],
             [[30, 22, 50], [30, 21, 51], [30, 22, 52], [30, 22, 53]]]  # fmt: skip
    for written in steps:
        ids = torch.tensor([[1, 2, *row] for row in written])
        scores = torch.randn(4, model.config.text_config.vocab_size)
        fused = prior(ids, scores)
        whole = torch.tensor([[START, *row] for row in written])
        logits = model.compute_logits(model.model.language_model(input_ids=whole).last_hidden_state[:, -1])
        expected = scores.clone()
        others = logits - logits[:, vocab_ids].logsumexp(-1, keepdim=True)  # of other tokens on the same scale
        others[:, END] = 0
        expected[:2] += 0.5 * others[:2]  # the second prompt has no audio
        assert torch.allclose(fused, expected, atol=1e-4)


@torch.no_grad()
def test_lora_is_off_inside_and_as_before_outside(make_tiny_model, waveform):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(0.5)]])
    plain = model(**inputs).logits
    model.add_lora("text", {"r": 2, "target_modules": "all-linear"})
    model.tune("text", "lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    tuned = model(**inputs).logits
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with without_lora(model.model.language_model):
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
    assert torch.equal(model(**inputs).logits, tuned) and not torch.allclose(tuned, plain, atol=1e-2)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
