"""Chat templates with `{% generation %}` marks, so that training labels come from `return_assistant_tokens_mask`.

One template serves training, evaluation and inference. Each writes the same text as the LLM's own template does for the
same messages, except that no default system message is added (it would cost every clip some twenty positions) and that
message content may be a list of audio and text items. The end-of-turn token is inside the generation block: a model
that never sees it in its labels never learns to stop.
"""

AUDIO_PLACEHOLDER = "<|audio|>"

# A message's content: a plain string, or a list of audio and text items in the order in which they are heard and read.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'audio' %}{{ '<|audio|>' }}{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def _template(before: str, end_of_turn: str, after: str, prompt: str, first: str = "") -> str:
    """Assemble a template from Jinja expressions: text before and after each message, and the generation prompt."""
    return (
        f"{first}{{% for message in messages %}}{before}"
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{_CONTENT}{end_of_turn}{{% endgeneration %}}"
        f"{{% else %}}{_CONTENT}{end_of_turn}{{% endif %}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


CHATML = _template(  # SmolLM2, Qwen
    before="{{ '<|im_start|>' + message['role'] + '\\n' }}",
    end_of_turn="{{ '<|im_end|>' }}",
    after="{{ '\\n' }}",
    prompt="{{ '<|im_start|>assistant\\n' }}",
)

LLAMA3 = _template(
    first="{{ bos_token }}",
    before="{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}",
    end_of_turn="{{ '<|eot_id|>' }}",
    after="",
    prompt="{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
)

PLAIN = (  # base LLMs that have no chat format of their own
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:' }}"
    "{% generation %}{{ '' if message['content'] is string and message['content'].startswith(' ') else ' ' }}"
    + _CONTENT
    + "{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' }}" + _CONTENT + "{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Phi-2's question-answer format (its model card: "Instruct: <prompt>\nOutput:"); it has no chat template of its own.
# A turn ends with the end token (<|endoftext|>), which Phi-2 was not trained to write after an answer.
PHI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Output:' }}"
    "{% generation %}{{ '' if message['content'] is string and message['content'].startswith(' ') else ' ' }}"
    + _CONTENT
    + "{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ 'Instruct: ' if message['role'] == 'user' else '' }}" + _CONTENT + "{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"
)

# Names by which a recipe or `AudioPhiProcessor.from_components` asks for a template.
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN, "phi": PHI}
# Token that gives a chat format away → its template.
BY_TOKEN = {"<|im_start|>": CHATML, "<|start_header_id|>": LLAMA3}
# `model_type` of LLMs that come without a chat template → what their makers document.
BY_MODEL_TYPE = {"phi": PHI}


def named_template(template: str) -> str:
    """A name of `TEMPLATES` or a Jinja template → the template. ValueError for a text that is neither."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" not in template:
        raise ValueError(
            f"chat_template {template!r} is neither a name ({', '.join(TEMPLATES)}) nor a Jinja template "
            "with {% generation %} around the assistant's words."
        )
    return template


def training_template(tokenizer, audio_token: str = AUDIO_PLACEHOLDER, model_type: str | None = None) -> str:
    """The template with generation marks for a tokenizer's chat format, with `audio_token` as the placeholder.

    `model_type` of the LLM decides where the tokenizer has no chat template and the makers document a format.

    Raises ValueError for a tokenizer with a chat template of a format not known here: training on another format than
    the LLM was tuned with must be somebody's decision.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own and "generation %}" in own and AUDIO_PLACEHOLDER in own:
        return own.replace(AUDIO_PLACEHOLDER, audio_token)
    if not own and model_type in BY_MODEL_TYPE and tokenizer.eos_token is not None:
        return BY_MODEL_TYPE[model_type].replace(AUDIO_PLACEHOLDER, audio_token)
    vocabulary = tokenizer.get_vocab()
    for token, template in BY_TOKEN.items():
        if token in vocabulary and (own is None or token in own):
            return template.replace(AUDIO_PLACEHOLDER, audio_token)
    if own:
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat format is not known here (known by the tokens {', '.join(BY_TOKEN)}). "
            f"Pass chat_template= with {{% generation %}} around the assistant's words, {AUDIO_PLACEHOLDER} for audio."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: has no end-of-sequence token, so the model could not learn to stop."
        )
    return PLAIN.replace(AUDIO_PLACEHOLDER, audio_token)
