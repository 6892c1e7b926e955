"""Joint decoding: prefix scores against enumeration of all paths, and what they do to `generate`."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_audiophi.ctc_scoring_audiophi import CTCPrefixScorer, alignment_per_prompt, recurrence
from processing.chat_templates import AUDIO_PLACEHOLDER, TEMPLATES
from tests.conftest import message, prompts

VOCAB_IDS = torch.tensor([3, 7, 8])
END = 1


def random_log_probs(frames, seed):
    return torch.randn(1, frames, 4, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def transcripts(log_probs):
    """Probability of every transcript (tuple of LLM ids), by enumeration of all paths of one clip."""
    total = {}
    for path in itertools.product(range(4), repeat=log_probs.shape[1]):
        ids = tuple(int(VOCAB_IDS[symbol - 1]) for symbol, _ in itertools.groupby(path) if symbol)
        total[ids] = total.get(ids, 0.0) + math.exp(sum(float(log_probs[0, t, s]) for t, s in enumerate(path)))
    return total


def run_scorer(scorer, prefix, prompt=(5, 6)):
    """Scores after every token of `prefix`, as `generate` asks for them: one more token at each call."""
    for size in range(len(prefix) + 1):
        scores = scorer(torch.tensor([[*prompt, *prefix[:size]]]), torch.zeros(1, 10))
    return scores[0]


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 5),
    seed=st.integers(0, 1000),
    prefix=st.lists(st.sampled_from(VOCAB_IDS.tolist()), max_size=3),
    padding=st.integers(0, 3),
)
def test_scores_are_the_conditional_probabilities_of_all_paths(frames, seed, prefix, padding):
    log_probs = random_log_probs(frames, seed)
    total = transcripts(log_probs)
    begins = {ids: sum(p for other, p in total.items() if other[: len(ids)] == ids) for ids in _prefixes(total)}
    prefix = tuple(prefix)
    if prefix not in begins:
        return
    padded = torch.nn.functional.pad(log_probs, (0, 0, 0, padding), value=-5.0)
    scorer = CTCPrefixScorer(padded, torch.tensor([frames]), VOCAB_IDS, [END], 2, weight=1.0)
    scores = run_scorer(scorer, prefix)
    for token in VOCAB_IDS.tolist():
        expected = begins.get((*prefix, token), 0.0) / begins[prefix]
        assert math.isclose(math.exp(scores[token]), expected, rel_tol=1e-3, abs_tol=1e-5)
    assert math.isclose(math.exp(scores[END]), total.get(prefix, 0.0) / begins[prefix], rel_tol=1e-3, abs_tol=1e-5)
    assert bool(torch.isneginf(scores[[0, 2, 4, 5, 6, 9]]).all())


def _prefixes(total):
    return {ids[:size] for ids in total for size in range(len(ids) + 1)}


def test_weight_mixes_both_and_zero_length_rows_are_left_alone():
    log_probs = torch.cat([random_log_probs(4, 0), torch.zeros(1, 4, 4)])
    scores = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6], [5, 6]])
    lengths = torch.tensor([4, 0])
    ctc = CTCPrefixScorer(log_probs, lengths, VOCAB_IDS, [END], 2, 1.0)(ids, scores)
    mixed = CTCPrefixScorer(log_probs, lengths, VOCAB_IDS, [END], 2, 0.25)(ids, scores)
    lm = scores.log_softmax(-1)
    known = [END, *VOCAB_IDS.tolist()]
    assert torch.allclose(mixed[0, known], 0.75 * lm[0, known] + 0.25 * ctc[0, known], atol=1e-5)
    assert torch.equal(mixed[1], scores[1])


def test_beams_find_their_parents_after_reordering():
    log_probs = random_log_probs(5, 3)
    together = CTCPrefixScorer(log_probs, torch.tensor([5]), VOCAB_IDS, [END], 0, 1.0)
    together(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 10))
    together(torch.tensor([[3], [7]]), torch.zeros(2, 10))
    scores = together(torch.tensor([[7, 8], [7, 7]]), torch.zeros(2, 10))  # both continue the second beam
    for row, prefix in enumerate([[7, 8], [7, 7]]):
        alone = CTCPrefixScorer(log_probs, torch.tensor([5]), VOCAB_IDS, [END], 0, 1.0)
        assert torch.allclose(scores[row], run_scorer(alone, prefix, prompt=()), atol=1e-4)


def test_clips_of_one_prompt_are_read_one_after_the_other():
    logits = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    ids = torch.tensor([[9] * 6 + [1, 1], [1] * 8, [9, 9, 9] + [1] * 5])
    log_probs, lengths = alignment_per_prompt(logits, mask, ids, 9)
    assert lengths.tolist() == [6, 0, 3]
    assert torch.allclose(log_probs[0], torch.cat([logits[0], logits[1, :2]]).log_softmax(-1))
    assert torch.allclose(log_probs[2, :3], logits[2, :3].log_softmax(-1))


@pytest.mark.parametrize("readout", ["frames", "collapse"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prior", [0.0, 0.4])
def test_joint_decoding_does_not_depend_on_the_batch(make_tiny_model, waveform, readout, num_beams, prior):
    model, processor = make_tiny_model(readout=readout)
    clips = [[waveform(0.9), waveform(0.4, 1)], [waveform(0.5, 2)], []]
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "ctc_weight": 0.5}
    settings |= {"ctc_temperature": 1.5, "lm_prior_weight": prior}
    inputs = prompts(processor, clips)
    length = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, **settings)[:, length:]
    for row, conversation in enumerate(clips):
        single = prompts(processor, [conversation])
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(alone)], alone)
    plain = model.generate(**inputs, **{**settings, "ctc_weight": 0.0})[:, length:]
    assert not torch.equal(plain[0], together[0])


def test_full_weight_writes_what_the_alignment_hears(make_tiny_model, waveform):
    """An alignment that is sure of its path leaves no choice, whatever the language model prefers."""
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(0.9)]])
    head = model.model.alignment
    scale, head.scale.data = head.scale.data.clone(), torch.tensor(300.0)
    try:
        audio = {name: value for name, value in inputs.items() if name.startswith(("input_feat", "audio_"))}
        heard = model.transcribe_alignment(**audio)[0]
        out = model.generate(**inputs, max_new_tokens=len(heard) + 3, do_sample=False, ctc_weight=1.0)
    finally:
        head.scale.data = scale
    written = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert heard and written[: len(heard)] == heard
    assert written[len(heard)] in (model.generation_config.eos_token_id, processor.end_token_id)


@pytest.mark.parametrize(
    ("align", "settings", "message"),
    [
        (True, {"ctc_weight": 1.5}, "ctc_weight=1.5 is not between 0 and 1"),
        (True, {"ctc_weight": 0.5, "ctc_temperature": 0.0}, "ctc_temperature=0.0"),
        (True, {"ctc_weight": 0.5, "lm_prior_weight": -1.0}, "lm_prior_weight=-1.0"),
        (False, {"ctc_weight": 0.5}, "alignment head"),
    ],
)
def test_impossible_settings_are_refused(make_tiny_model, waveform, align, settings, message):
    model, processor = make_tiny_model(align=align)
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(processor, [[waveform(0.5)]]), max_new_tokens=1, **settings)


def test_the_weight_is_saved_with_the_generation_config(make_tiny_model, waveform, tmp_path):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(0.9)]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings, ctc_weight=0.5)
    model.generation_config.ctc_weight = 0.5
    try:
        model.save_pretrained(tmp_path)
    finally:
        del model.generation_config.ctc_weight
    again = type(model).from_pretrained(tmp_path)
    assert again.generation_config.ctc_weight == 0.5
    assert torch.equal(again.generate(**inputs, **settings), expected)


def test_only_prompts_that_ask_for_a_transcript_are_decoded_with_the_alignment(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    clip, asked = waveform(0.9), ("Transcribe the speech.", "Describe the sound.")
    messages = [message([clip], text) for text in asked]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    joint = model.generate(**inputs, **settings, ctc_weight=0.9)
    plain = model.generate(**inputs, **settings, ctc_weight=0.0)
    assert not torch.equal(joint[0], plain[0]) and not torch.equal(joint[1], plain[1])
    model.config.transcribe_endings = [processor.prompt_ending(text) for text in ("Write it.", asked[0])]
    try:
        gated = model.generate(**inputs, **settings, ctc_weight=0.9)
        assert torch.equal(gated[0], joint[0]) and torch.equal(gated[1], plain[1])
    finally:
        model.config.transcribe_endings = None


@pytest.mark.parametrize("template", ["chatml", "plain", "phi", "llama3"])
def test_a_prompt_ends_as_the_processor_says(make_tiny_model, waveform, template):
    _, processor = make_tiny_model()
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.add_special_tokens({"bos_token": processor.tokenizer.eos_token})
    processor.chat_template = TEMPLATES[template].replace(AUDIO_PLACEHOLDER, processor.audio_token)
    prompt = processor.apply_chat_template(
        message([waveform(0.4)], "What is said?"), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0].tolist()
    ending = processor.prompt_ending("What is said?")
    assert prompt[-len(ending) :] == ending and prompt[-len(ending) - 1] == processor.audio_token_id


@given(
    frames=st.integers(1, 60),
    seed=st.integers(0, 1000),
    sharpness=st.sampled_from([1.0, 30.0]),
    impossible=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_recurrence_equals_a_loop_over_frames(frames, seed, sharpness, impossible):
    random = torch.Generator().manual_seed(seed)
    into, stay = -sharpness * torch.rand(2, 3, frames, generator=random)
    into[torch.rand(into.shape, generator=random) < impossible] = -torch.inf
    x, expected = torch.full((3,), -torch.inf), []
    for t in range(frames):
        x = torch.logaddexp(x, into[:, t]) + stay[:, t]
        expected.append(x)
    assert torch.allclose(recurrence(into, stay), torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


def test_a_token_that_no_frame_can_be_stays_impossible():
    found = recurrence(torch.zeros(1, 3), torch.tensor([[-torch.inf, -1.0, -torch.inf]]))
    assert found[0, 0] < -900 and found[0, 2] < -900 and torch.isfinite(found[0, 1])


def test_words_may_be_taken_back():
    """As drafts are: `remember` calls ago."""
    log_probs = random_log_probs(6, 4)
    scorer = CTCPrefixScorer(log_probs, torch.tensor([6]), VOCAB_IDS, [END], 0, 1.0, remember=4)
    run_scorer(scorer, [3, 7, 8], prompt=())
    for prefix in ([3, 8], [3, 8, 7]):
        again = scorer(torch.tensor([prefix]), torch.zeros(1, 10))[0]
        alone = CTCPrefixScorer(log_probs, torch.tensor([6]), VOCAB_IDS, [END], 0, 1.0)
        assert torch.allclose(again, run_scorer(alone, prefix, prompt=()), atol=1e-4)
