"""Joint decoding: prefix scores against enumeration of all paths, and what they do to `generate`."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

from modeling_audiophi.ctc_scoring_audiophi import CTCPrefixScorer, alignment_per_prompt, last_clips, recurrence
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
    others = scores[[0, 2, 4, 5, 6, 9]]
    assert torch.equal(others, others[:1].expand(6))


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


def test_a_token_that_is_no_class_can_be_written_by_an_llm_that_is_sure():
    log_probs = torch.full((1, 3, 4), -10.0)
    for frame, symbol in enumerate((1, 0, 2)):  # heard: 3, then 7
        log_probs[0, frame, symbol] = 0.0
    log_probs = log_probs.log_softmax(-1)
    scorer = CTCPrefixScorer(log_probs, torch.tensor([3]), VOCAB_IDS, [END], 0, 0.5)
    unsure = scorer(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 10))
    assert int(unsure.argmax()) == 3 and bool(torch.isfinite(unsure).all())
    scores = torch.zeros(1, 10)
    scores[0, 5] = 12.0
    for written in ([], [3]):
        assert int(scorer(torch.tensor([written], dtype=torch.long), scores).argmax()) == 5
    # It has taken the frame of what was heard there: nothing is left but the end.
    assert int(scorer(torch.tensor([[3, 5]]), torch.zeros(1, 10)).argmax()) == END


def test_beams_find_their_parents_after_reordering():
    log_probs = random_log_probs(5, 3)
    together = CTCPrefixScorer(log_probs, torch.tensor([5]), VOCAB_IDS, [END], 0, 1.0)
    together(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 10))
    together(torch.tensor([[3], [7]]), torch.zeros(2, 10))
    scores = together(torch.tensor([[7, 8], [7, 7]]), torch.zeros(2, 10))  # both continue the second beam
    for row, prefix in enumerate([[7, 8], [7, 7]]):
        alone = CTCPrefixScorer(log_probs, torch.tensor([5]), VOCAB_IDS, [END], 0, 1.0)
        assert torch.allclose(scores[row], run_scorer(alone, prefix, prompt=()), atol=1e-4)


def test_clips_that_a_prompt_is_about_are_read_one_after_the_other():
    logits = torch.randn(4, 4, 5)
    logits[..., 1] += 5  # a word is heard everywhere
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    log_probs, lengths = alignment_per_prompt(logits, mask, [range(0, 2), range(0), range(3, 4)])
    assert lengths.tolist() == [6, 0, 1]
    assert torch.allclose(log_probs[0], torch.cat([logits[0], logits[1, :2]]).log_softmax(-1))
    assert torch.allclose(log_probs[2, :1], logits[3, :1].log_softmax(-1))
    cooler, _ = alignment_per_prompt(logits, mask, [range(2, 3)], temperature=2.0)
    assert torch.allclose(cooler[0], (logits[2, :3] / 2).log_softmax(-1))
    nothing, lengths = alignment_per_prompt(logits, mask, [range(0), range(0)])
    assert nothing.shape == (2, 0, 5) and lengths.tolist() == [0, 0]


def test_a_prompt_is_about_the_clips_of_its_last_turn():
    ids = torch.tensor([[9, 1, 9, 9], [1, 1, 1, 1], [1, 9, 1, 1]])
    found = [list(clips) for clips in last_clips(ids, 9)]
    assert found == [[2], [], [3]]
    asked = torch.tensor([[5, 2], [0, 0], [0, 0]])
    assert [list(clips) for clips in last_clips(ids, 9, asked)] == [[1, 2], [], []]


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
        heard = model.read_alignment(**audio)[0]
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


def test_settings_are_saved_with_the_generation_config(make_tiny_model, waveform, tmp_path):
    model, processor = make_tiny_model()
    inputs = prompts(processor, [[waveform(0.9)]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings, ctc_weight=0.5)
    model.generation_config.tasks["transcribe"] = {"ctc_weight": 0.5}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.generation_config.tasks == model.generation_config.tasks
    assert torch.equal(again.generate(**inputs, **settings, task="transcribe"), expected)
    model.generation_config.ctc_weight = 0.5  # for whatever is asked
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.generation_config.ctc_weight == 0.5
    assert torch.equal(again.generate(**inputs, **settings), expected)


# ---- what is asked for decides


@pytest.fixture
def sure(make_tiny_model):
    """A model whose alignment leaves no choice where it takes part, which is in transcripts; processor."""
    model, processor = make_tiny_model(readout="collapse")
    model.model.alignment.scale.data = torch.tensor(300.0)
    model.generation_config.tasks["transcribe"] = {"ctc_weight": 1.0, "no_repeat_ngram_size": 0}
    return model, processor


def ask(processor, *chats):
    return processor.apply_chat_template(list(chats), add_generation_prompt=True, tokenize=True, return_dict=True)


def written(model, inputs, row=0, **settings):
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    ids = model.generate(**inputs, **settings)[row, inputs["input_ids"].shape[1] :].tolist()
    return ids[: next((place for place, token in enumerate(ids) if token in ENDS), None)]


ENDS = (1, 2)


def heard(model, processor, clip):
    audio = {name: value for name, value in prompts(processor, [[clip]]).items() if name.startswith(("input_f", "aud"))}
    return model.read_alignment(**audio)[0][:12]


@pytest.mark.parametrize("explicit", [True, False])
def test_with_several_turns_and_clips_the_last_ones_words_are_written(sure, waveform, explicit):
    model, processor = sure
    first, second = waveform(0.9), waveform(0.5, 1)
    words = {index: heard(model, processor, clip) for index, clip in enumerate((first, second))}
    assert words[0] != words[1] and words[0] and words[1]
    text = "Transcribe the speech."
    turns = [*message([first], text), {"role": "assistant", "content": "the quick"}, *message([second], text)]
    inputs = ask(processor, turns, message([first, second], text))
    settings = {"ctc_weight": 1.0} if explicit else {}
    assert written(model, inputs, **settings) == words[1]
    assert written(model, inputs, row=1, **settings)[: len(words[0])] == words[0]  # one turn: both clips, in order
    # Without the processor's word on it: the last clip.
    alone = {**ask(processor, message([first, second], text)), "asked": None}
    assert written(model, alone, ctc_weight=1.0) == words[1]


def test_a_question_about_earlier_clips_is_answered_plainly(sure, waveform):
    model, processor = sure
    turns = [*message([waveform(0.9)], "Transcribe the speech."), {"role": "assistant", "content": "the quick"}]
    question = {"role": "user", "content": "What does that mean?"}
    inputs = ask(processor, [*turns, question])
    for how in ({}, {"ctc_weight": 1.0}, {"task": "transcribe"}):
        assert written(model, inputs, **how) == written(model, inputs, ctc_weight=0.0)
    again = ask(processor, [*turns, {"role": "user", "content": "Transcribe the speech."}])
    assert written(model, again) == written(model, again, ctc_weight=0.0)


def test_a_task_is_recognised_however_it_is_written(sure, waveform):
    model, processor = sure
    clip = waveform(0.9)
    words = heard(model, processor, clip)
    for text in (
        "Transcribe the speech.",
        "Transcribe the speech",
        "TRANSCRIBE THE SPEECH!",
        "  transcribe the\nspeech ",
    ):
        assert written(model, ask(processor, message([clip], text))) == words, text
    turned = message([clip], "write down what is said")
    turned[0]["content"].reverse()
    assert written(model, ask(processor, turned)) == words
    assert written(model, ask(processor, message([clip], "Schreib es auf!"))) != words
    assert written(model, ask(processor, message([clip], "Schreib es auf!")), task="transcribe") == words


def test_a_free_question_gets_nothing_of_a_tasks_decoding(make_tiny_model, waveform, monkeypatch):
    model, processor = make_tiny_model(readout="collapse")
    model.generation_config.tasks["transcribe"] = {
        "ctc_weight": 0.5, "lm_prior_weight": 0.2, "draft_tokens": 4, "no_repeat_ngram_size": 1, "num_beams": 3,
        "max_new_tokens": 3, "length_penalty": 2.0,
    }  # fmt: skip
    seen, clip = [], waveform(0.9)
    beneath = GenerationMixin.generate

    def spied(self, inputs, generation_config, **kwargs):
        seen.append({**kwargs, "generation_config": generation_config})
        return beneath(self, inputs, generation_config, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spied)
    question = ask(processor, message([clip], "Is it a man?"))
    plain = model.generate(**question, max_new_tokens=8, do_sample=False)
    assert {*seen[0]} <= {"attention_mask", "audio_embeds", "max_new_tokens", "do_sample", "generation_config"}
    assert seen[0]["generation_config"] is None and plain.shape[1] > question["input_ids"].shape[1] + 3
    transcript = ask(processor, message([clip], "Transcribe the speech"))
    out = model.generate(**transcript, do_sample=False)
    assert seen[1]["num_beams"] == 3 and len(seen[1]["logits_processor"]) == 2 and seen[1]["no_repeat_ngram_size"] == 1
    assert out.shape[1] <= transcript["input_ids"].shape[1] + 3
    model.generate(**transcript, do_sample=False, num_beams=1, max_length=transcript["input_ids"].shape[1] + 5)
    assert seen[2]["num_beams"] == 1 and "max_new_tokens" not in seen[2]  # the caller says how long
    both = ask(processor, message([clip], "Transcribe the speech"), message([clip], "Is it a man?"))
    model.generate(**both, max_new_tokens=2)
    assert "num_beams" not in seen[3] and "logits_processor" not in seen[3]
    with pytest.raises(ValueError, match="unknown task 'translate'; this model knows: transcribe, caption"):
        model.generate(**question, task="translate")


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


def test_a_long_silence_weighs_no_more_than_a_short_one():
    """Beside a word that is heard; what a temperature leaves to words would add up over its frames."""
    word = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    blank = torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    for count in (1, 40):
        logits = torch.cat([word, *[blank] * count, word, *[blank] * count])[None]
        mask = torch.ones(logits.shape[:2], dtype=torch.bool)
        log_probs, lengths = alignment_per_prompt(logits, mask, [range(1)], temperature=3.0)
        assert lengths.tolist() == [4] and log_probs.shape == (1, 4, 4)
        assert log_probs[0].argmax(-1).tolist() == [1, 0, 1, 0]


def test_where_no_word_is_heard_none_can_be_written():
    logits = torch.tensor([[[0.6, 0.5, 0.4, 0.0]] * 5])
    log_probs, lengths = alignment_per_prompt(logits, torch.ones(1, 5, dtype=torch.bool), [range(1)], temperature=2.0)
    scorer = CTCPrefixScorer(log_probs, lengths, torch.tensor([3, 5, 8]), [9], prompt_length=1, weight=0.3)
    scores = torch.zeros(1, 10)
    scores[0, 3] = 30.0  # the LLM is sure that something is said
    assert scorer(torch.tensor([[2]]), scores).argmax(-1).tolist() == [9]
