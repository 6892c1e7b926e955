"""Chat templates for LLMs that bring none, and which template a processor takes.

An LLM that was tuned on chats says itself how it wants them written, and is best asked that way. These are for the
others, and for whoever asks for one by name. They need no `{% generation %}` marks: what the assistant said is found in
the text (see chat_audiophi.py). Contents are strings here, with a placeholder for each clip.
"""

AUDIO_PLACEHOLDER = "<|audio|>"


def _template(before: str, after: str, prompt: str, first: str = "") -> str:
    """Assemble a template from Jinja expressions: text before and after each message, and the generation prompt."""
    return (
        f"{first}{{% for message in messages %}}{before}{{{{ message['content'] }}}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


# SmolLM2, Qwen; without a default system message, which would cost every clip some twenty positions.
CHATML = _template(
    before="{{ '<|im_start|>' + message['role'] + '\\n' }}",
    after="{{ '<|im_end|>\\n' }}",
    prompt="{{ '<|im_start|>assistant\\n' }}",
)

LLAMA3 = _template(
    first="{{ bos_token }}",
    before="{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}",
    after="{{ '<|eot_id|>' }}",
    prompt="{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
)

_ANSWER = (  # after the colon a space, and one only
    "{{ '' if message['content'].startswith(' ') else ' ' }}{{ message['content'] }}{{ eos_token }}{{ '\\n' }}"
)
PLAIN = (  # base LLMs that have no chat format of their own
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:' }}" + _ANSWER + "{% else %}"
    "{{ message['role'] | capitalize + ': ' }}{{ message['content'] }}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Phi-2's question-answer format (its model card: "Instruct: <prompt>\nOutput:"); it has no chat template of its own.
# A turn ends with the end token (<|endoftext|>), which Phi-2 was not trained to write after an answer.
PHI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Output:' }}" + _ANSWER + "{% else %}"
    "{{ 'Instruct: ' if message['role'] == 'user' else '' }}{{ message['content'] }}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"
)

# Names by which a recipe or `AudioPhiProcessor.from_components` asks for a template.
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN, "phi": PHI}
# Token that gives a chat format away → its template.
BY_TOKEN = {"<|im_start|>": CHATML, "<|start_header_id|>": LLAMA3}
# `model_type` of LLMs that come without a chat template → what their makers document.
BY_MODEL_TYPE = {"phi": PHI}


def named_template(template: str, tokenizer) -> str:
    """A name of `TEMPLATES` or a Jinja template → the template. ValueError for a text that is neither."""
    if template in TEMPLATES:
        return _with_first_token(TEMPLATES[template], tokenizer)
    if "{" not in template:
        raise ValueError(f"chat_template {template!r} is neither a name ({', '.join(TEMPLATES)}) nor a Jinja template.")
    return template


def default_template(tokenizer, model_type: str | None = None) -> str:
    """The LLM's own template; where it has none, one by its `model_type` or by its control tokens, else the plain one.

    Raises ValueError for an LLM without a template and without an end token.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return own
    if tokenizer.eos_token is not None and model_type in BY_MODEL_TYPE:
        return _with_first_token(BY_MODEL_TYPE[model_type], tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token, template in BY_TOKEN.items():
        if token in vocabulary:
            return _with_first_token(template, tokenizer)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: has no end-of-sequence token, so the model could not learn to stop."
        )
    return _with_first_token(PLAIN, tokenizer)


def _with_first_token(template: str, tokenizer) -> str:
    """A template of this file, with the token that the tokenizer puts before any text: rendered chats are tokenised as
    they are."""
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + template if begins and "bos_token" not in template else template
