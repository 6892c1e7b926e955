"""What transformers' generation tests (tests/generation/test_utils.py) ask of a model, with audio in the prompt."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria

from modeling_audiophi.kv_cache_audiophi import CACHE_NAME
from tests.conformance.cases import SETTINGS, batch_of, every_case, every_pair, expanded
from tests.conftest import message, prompts


def new_words(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :]


# ---- the same words, whatever the way


@every_case
def test_every_cache_gives_the_same_words(build, waveform, name):
    """With a cache, without one, and with a static one, whose shapes never change."""
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    expected = model.generate(**inputs, **SETTINGS)
    assert torch.equal(expected[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(model.generate(**inputs, **SETTINGS, use_cache=False), expected)
    static = model.generate(**inputs, **SETTINGS, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(static.sequences, expected) and type(static[CACHE_NAME]).__name__ == "StaticCache"


@every_case
def test_alone_and_padded_on_the_left(build, waveform, name):
    """Several clips, one clip and text alone in one batch."""
    model, processor = build(name)
    conversations = [[waveform(0.8), waveform(0.4, 1)], [waveform(0.5, 2)], []]
    inputs = prompts(processor, conversations)
    assert processor.tokenizer.padding_side == "left" and inputs["attention_mask"].min() == 0
    words = new_words(model.generate(**inputs, **SETTINGS), inputs)
    for row, waves in enumerate(conversations):
        single = prompts(processor, [waves])
        assert torch.equal(new_words(model.generate(**single, **SETTINGS), single)[0], words[row])


@every_pair
def test_text_only_equals_the_language_model_alone(build, folders, name):
    model, processor = build(name)
    llm = AutoModelForCausalLM.from_pretrained(folders(name)[1]).eval()
    inputs = processor.apply_chat_template(
        [message([], "the quick fox"), message([])], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    del inputs["asked"]
    settings = {**SETTINGS, "pad_token_id": model.generation_config.pad_token_id}
    expected = llm.generate(**inputs, **settings, suppress_tokens=model.generation_config.suppress_tokens)
    assert torch.equal(model.generate(**inputs, **SETTINGS), expected)


@every_pair
def test_prompt_lookup_and_an_assistant_give_greedy_words(build, waveform, name):
    model, processor = build(name)
    inputs = prompts(processor, [[waveform(0.9), waveform(0.4, 1)]])
    settings = {**SETTINGS, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, prompt_lookup_num_tokens=3), expected)
    assistant = copy.deepcopy(model)
    del assistant.model.language_model.layers[1:]  # a hastier model that hears the same
    assistant.generation_config.num_assistant_tokens = 3
    calls = []
    hook = assistant.model.language_model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(**inputs, **settings, assistant_model=assistant), expected) and calls
    hook.remove()


@every_pair
def test_continuing_from_the_cache(build, waveform, name):
    model, processor = build(name)
    inputs = prompts(processor, [[waveform(0.8)]])
    settings = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings, max_new_tokens=6, min_new_tokens=6)
    first = model.generate(**inputs, **settings, max_new_tokens=3, min_new_tokens=3)
    inputs["attention_mask"] = torch.ones_like(first.sequences)
    inputs["input_ids"] = first.sequences
    second = model.generate(
        **inputs, **settings, max_new_tokens=3, min_new_tokens=3, **{CACHE_NAME: first[CACHE_NAME]}
    )
    assert torch.equal(second.sequences, expected.sequences)


@every_pair
def test_embeddings_with_the_audio_in_them(build, waveform, name):
    """The user fills in the audio: `inputs_embeds` gives the words that ids and audio give."""
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    with torch.no_grad():
        prompt, audio = expanded(model, inputs)
        embeds = model.get_input_embeddings()(prompt.input_ids)
        embeds[prompt.input_ids == processor.audio_token_id] = audio
    expected = new_words(model.generate(**inputs, **SETTINGS), inputs)
    given = {"inputs_embeds": embeds, "attention_mask": prompt.attention_mask}
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**given, **SETTINGS, **cache), expected)
    with pytest.raises(ValueError, match="inputs_embeds, not both"):
        model.generate(**inputs, inputs_embeds=embeds)


# ---- ways to search


@every_pair
def test_beams_and_samples(build, waveform, name):
    model, processor = build(name)
    inputs = batch_of(processor, waveform)
    beams = {**SETTINGS, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(**inputs, **beams)
    assert expected.shape == (4, inputs["input_ids"].shape[1] + 5)
    assert torch.equal(model.generate(**inputs, **beams, use_cache=False), expected)
    for row in range(2):
        single = prompts(processor, [[[waveform(1.3)]], [[waveform(0.5, 1), waveform(0.31, 2)]]][row])
        alone = new_words(model.generate(**single, **beams), single)
        assert torch.equal(alone, new_words(expected, inputs)[2 * row : 2 * row + 2])
    sampling = {**SETTINGS, "do_sample": True, "num_return_sequences": 3}
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **sampling))
    assert torch.equal(*results) and results[0].shape[0] == 6
    assert len({tuple(row) for row in new_words(results[0], inputs).tolist()}) > 1
    torch.manual_seed(0)
    assert model.generate(**inputs, **{**sampling, "num_beams": 4}).shape[0] == 6


class StopsAtThree(StoppingCriteria):
    def __init__(self, prompt_length):
        self.end = prompt_length + 3

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.end)


@every_pair
def test_everything_that_generate_can_return(build, waveform, name):
    model, processor = build(name, fresh=True)
    model.set_attn_implementation("eager")
    inputs = batch_of(processor, waveform)
    length = inputs["input_ids"].shape[1]
    wanted = ("scores", "logits", "hidden_states", "attentions")
    output = model.generate(
        **inputs, **SETTINGS, return_dict_in_generate=True, **{f"output_{kind}": True for kind in wanted}
    )
    assert output.sequences.shape == (2, length + 5) and isinstance(output[CACHE_NAME], DynamicCache)
    text = model.config.text_config
    for kind in wanted:
        assert len(getattr(output, kind)) == 5
    assert [step.shape for step in output.logits] == [(2, text.vocab_size)] * 5
    assert torch.equal(torch.stack([step.argmax(-1) for step in output.scores], 1), output.sequences[:, length:])
    read = output.attentions[0][0].shape[-1]
    assert read == expanded(model, inputs)[0].input_ids.shape[1] > length
    assert output[CACHE_NAME].get_seq_length() == read + 4
    for step, (states, attentions) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        rows = read if step == 0 else 1
        assert [state.shape for state in states] == [(2, rows, text.hidden_size)] * 3
        assert [weights.shape for weights in attentions] == [(2, 4, rows, read + step)] * 2
    stopped = StopsAtThree(read)
    assert model.generate(**inputs, **SETTINGS, stopping_criteria=[stopped]).shape[1] == length + 3


# ---- compiled


@pytest.mark.parametrize("name", ["whisper-llama-frames", "whisper-phi-collapse"])
def test_compiled_language_model(build, waveform, name):
    """In one piece (`fullgraph`): a graph break would be an error. The backend runs what it is given to compile, so
    that no C++ compiler is needed."""
    model, processor = build(name, fresh=True)
    language_model, compiled = model.model.language_model, []
    del language_model.layers[1:]
    language_model.config.num_hidden_layers = 1
    inputs = batch_of(processor, waveform)
    settings = {**SETTINGS, "cache_implementation": "static"}
    words = model.generate(**inputs, **settings)

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    language_model.compile(backend=backend, fullgraph=True)
    try:
        assert torch.equal(model.generate(**inputs, **settings), words)
        assert len(compiled) == 2  # the prompt, and one token; no third one
    finally:
        torch.compiler.reset()
