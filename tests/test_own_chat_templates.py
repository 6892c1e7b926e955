"""Prompts and labels with the chat templates of real LLMs: fixtures/chat_templates/, which write what the LLMs' own
templates write for chats without tools."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from processing import AudioPhiProcessor
from processing.chat_templates import CHATML, PLAIN

TEMPLATES = {path.stem: path.read_text() for path in Path(__file__).parent.glob("fixtures/chat_templates/*.jinja")}
END = dict.fromkeys(("mistral_v0_3", "zephyr", "olmo2", "deepseek_llm"), "</s>")
END |= dict.fromkeys(("smollm2", "smollm3", "qwen2_5", "qwen3", "phi4", "phi4_first", "lfm2"), "<|im_end|>")
END |= dict.fromkeys(("llama3", "llama3_2"), "<|eot_id|>") | dict.fromkeys(("gemma2", "gemma3"), "<end_of_turn>")
END |= {"phi3": "<|end|>", "granite3": "<|end_of_text|>"}
STRIPS = ("qwen3", "smollm3")  # line breaks before an answer
TRIM = ("llama3", "llama3_2", "gemma2", "gemma3", "mistral_v0_3")
LEAD = dict.fromkeys(("mistral_v0_3", "deepseek_llm"), " ")  # between the prompt and the words
SYSTEM = {"role": "system", "content": "Be brief."}

every_template = pytest.mark.parametrize("name", sorted(TEMPLATES))


def tokenizer_for(template, bos="<s>", **options):
    """Every byte is a token, and so is every control token that the template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token="</s>", **options)
    control = re.findall(r"<\|\w+\|>|<\w+_of_\w+>|</?think>|\[/?INST\]", template or "")
    tokenizer.add_special_tokens({"extra_special_tokens": sorted({"<|audio|>", *control})})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def processor_for(tiny_whisper_dir):
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_whisper_dir)
    return lambda template, **options: AudioPhiProcessor(extractor, tokenizer_for(template, **options))


@pytest.fixture
def processor(processor_for, name):
    return processor_for(TEMPLATES[name])


@pytest.fixture
def user(waveform):
    def make(text, clips=1):
        return {"role": "user", "content": [*[{"type": "audio", "audio": (waveform(0.1), 16_000)}] * clips,
                                            {"type": "text", "text": text}]}  # fmt: skip

    return make


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(processor, chats, **options):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def labels(processor, batch, row=0):
    """Texts of what is labelled, one for each stretch."""
    stretches, before = [], False
    for token, labelled in zip(batch["input_ids"][row].tolist(), batch["assistant_masks"][row].tolist(), strict=True):
        if labelled and not before:
            stretches.append([])
        if labelled:
            stretches[-1].append(token)
        before = labelled
    return [processor.tokenizer.decode(stretch) for stretch in stretches]


@every_template
def test_labels_are_the_answers_and_their_end_tokens(processor, user, name):
    chats = [
        [user("yes"), assistant("the fox")],
        [SYSTEM, user("yes"), assistant("yes"), user("yes", 2), assistant("  {1}\n\n<|im_end|> and </think>\n")],
        [user("a"), assistant("b\nc"), user("d", 0), assistant("e"), user("f"), assistant("b\nc")],
    ]
    batch = encode(processor, chats, return_assistant_tokens_mask=True)
    for row, chat in enumerate(chats):
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        if name in TRIM:
            answers = [answer.strip() for answer in answers]
        lead = LEAD.get(name, "")
        assert labels(processor, batch, row) == [lead + answer + END[name] for answer in answers]
    assert processor.tokenizer.decode(processor.end_token_id) == END[name]


@every_template
@pytest.mark.parametrize("answer", ["the fox", " two  spaces ", "\n\nlines\n"])
def test_a_chat_that_is_over_is_the_prompt_and_the_answer(processor, user, name, answer):
    for before in ([user("a")], [SYSTEM, user("a")], [SYSTEM, user("a"), assistant("b"), user("c", 2)]):
        whole = encode(processor, [*before, assistant(answer)], return_assistant_tokens_mask=True)
        prompt = encode(processor, before, add_generation_prompt=True)["input_ids"][0]
        assert torch.equal(whole["input_ids"][0][: len(prompt)], prompt)
        assert whole["assistant_masks"][0][len(prompt)] == 1 and whole["assistant_masks"][0][len(prompt) - 1] == 0
        text = processor.apply_chat_template([*before, assistant(answer)], continue_final_message=True)
        begun = processor.apply_chat_template(before, add_generation_prompt=True) + LEAD.get(name, "")
        assert text == begun + (answer.strip() if name in TRIM else answer.lstrip("\n") if name in STRIPS else answer)


@every_template
def test_system_messages_are_never_lost(processor, user, name):
    for chat in (
        [SYSTEM, user("a")],
        [SYSTEM, user("a"), assistant("b")],
        [SYSTEM, user("a"), assistant("b"), user("c")],
    ):
        text = processor.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] == "user")
        assert text.count("Be brief.") == 1
        assert text.count("<|audio|>") == sum(message["role"] == "user" for message in chat)


@every_template
def test_the_llms_own_template_is_taken_as_it_is(processor, name):
    """What users of the LLM alone send it, and what it answers well."""
    assert processor.chat_template == TEMPLATES[name]
    chat = [{"role": "user", "content": "who are you"}]
    own = processor.tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, enable_thinking=False
    )
    assert encode(processor, chat, add_generation_prompt=True)["input_ids"][0].tolist() == own["input_ids"]


@pytest.mark.parametrize("name", ["gemma2"])
def test_a_system_message_that_is_refused_goes_into_the_first_turn(processor, user, name):
    text = processor.apply_chat_template([SYSTEM, user("Hear.")], add_generation_prompt=True)
    assert text == ("<s><start_of_turn>user\nBe brief.\n\n<|audio|>Hear.<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_an_empty_thought_belongs_to_the_prompt(processor, user, name):
    whole = encode(processor, [user("a"), assistant("b")], return_assistant_tokens_mask=True)
    assert "<think>\n\n</think>\n" in processor.tokenizer.decode(whole["input_ids"][0])
    assert labels(processor, whole) == ["b<|im_end|>"]
    thinking = processor.apply_chat_template([user("a")], add_generation_prompt=True, enable_thinking=True)
    assert "<think>" not in thinking


def test_what_a_template_leaves_out_is_said(processor_for, user):
    chat = [user("a"), assistant("fox")]
    for template, said in {
        "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}": "leaves out or rewrites",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "leaves out or rewrites",
        "{{ raise_exception('no chats') }}": "does not take this chat .no chats",
        "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}": "does not take this chat",
    }.items():
        with pytest.raises(ValueError, match=f"the chat template of .* {said}"):
            encode(processor_for(template), chat, return_assistant_tokens_mask=True)


def test_turns_that_nothing_ends_get_the_end_token(processor_for, user):
    processor = processor_for("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
                              "{{ '<|assistant|>' if add_generation_prompt else '' }}")  # fmt: skip
    batch = encode(processor, [user("a"), assistant("fox")], return_assistant_tokens_mask=True)
    assert labels(processor, batch) == ["fox</s>"]
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends the assistant's turn with no token"):
        encode(processor, [user("a"), assistant("fox")], return_assistant_tokens_mask=True)


def test_noncharacters_in_an_answer_are_kept(processor_for, user):
    processor = processor_for(CHATML)
    answer = "a\ufdd1b\ufdd2c\ufdd1"
    batch = encode(processor, [user("a"), assistant(answer)], return_assistant_tokens_mask=True)
    assert labels(processor, batch) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("begins", [False, True])
def test_a_plain_prompt_begins_as_the_tokenizer_begins(processor_for, user, begins):
    from tokenizers.processors import TemplateProcessing

    processor = processor_for(None)
    tokenizer = tokenizer_for(None)
    if begins:
        special = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    processor = AudioPhiProcessor(processor.feature_extractor, tokenizer)
    assert processor.chat_template == ("{{ bos_token }}" if begins else "") + PLAIN
    ids = encode(processor, [user("a")], add_generation_prompt=True)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == ("<s>" if begins else "") + "User: <|audio|>a\nAssistant:"
    text = processor.apply_chat_template([user("a")], add_generation_prompt=True)
    assert torch.equal(processor(text=text, audio=user("a")["content"][:1])["input_ids"][0], ids)


MARKED = CHATML.replace(
    "{{ message['content'] }}{{ '<|im_end|>\\n' }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
)
WORDS = st.text(st.sampled_from("ab \n|im_end>.é你"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), WORDS), min_size=1, max_size=6)
)
def test_masks_are_those_of_generation_marks(processor_for, turns):
    """As transformers finds them itself, where the template says what the assistant writes."""
    processor = processor_for(CHATML)
    assert MARKED != CHATML
    chat = [{"role": role, "content": words} for role, words in turns]
    ours = encode(processor, chat, return_assistant_tokens_mask=True)
    theirs = processor.tokenizer.apply_chat_template(
        chat, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours["input_ids"][0].tolist() == theirs["input_ids"]
    assert ours["assistant_masks"][0].tolist() == theirs["assistant_masks"]
