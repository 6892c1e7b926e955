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

# Token that gives a chat format away → its template.
BY_TOKEN = {"<|im_start|>": CHATML, "<|start_header_id|>": LLAMA3}


def training_template(tokenizer, audio_token: str = AUDIO_PLACEHOLDER) -> str:
    """The template with generation marks for a tokenizer's chat format, with `audio_token` as the placeholder.

    Raises ValueError for a tokenizer with a chat template of a format not known here: training on another format than
    the LLM was tuned with must be somebody's decision.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own and "generation %}" in own and AUDIO_PLACEHOLDER in own:
        return own.replace(AUDIO_PLACEHOLDER, audio_token)
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
