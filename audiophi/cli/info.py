"""Say what is in a checkpoint and what it costs to run, without loading its weights."""

from pathlib import Path

BYTES = {"float32": 4, "bfloat16": 2}
SPEECH_TOKENS_PER_SECOND = 4  # that English read aloud makes: 2.5 to 3 words a second, 1.3 tokens a word
PROMPT_TOKENS = 20  # the chat's marks and the question


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", metavar="DIR_OR_ID", help="folder or Hub id")


def run(args) -> int:
    from huggingface_hub import snapshot_download

    folder = args.checkpoint
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, allow_patterns=["*.json", "*.jinja", "README.md"])
    for title, lines in describe(Path(folder)).items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:22}{value}")
    return 0


def describe(folder: Path) -> dict[str, dict[str, str]]:
    """{title: {what: value}} for a checkpoint in `folder`. OSError, ValueError for a folder that holds none."""
    from audiophi.publishing.architecture import millions, parameters_by_part, read_config

    config = read_config(folder)
    parts = parameters_by_part(config)
    return {
        f"{folder}: {'slim, holds only what was trained' if config.slim else 'full, holds all weights'}": {
            part: f"{millions(count):>10}  {what_is(config, part)}" for part, count in parts.items()
        }
        | {"all": f"{millions(sum(parts.values())):>10}"}
        | files_of(folder),
        "Licences": licences(config, folder),
        "Audio": audio_of(config),
        "Costs": costs(config, parts),
    }


def what_is(config, part: str) -> str:
    """What a part is, by name."""
    base = {"encoder": "audio", "language model": "text"}.get(part)
    if base:
        source = config.base_components.get(base, {})
        kind = (config.audio_config if base == "audio" else config.text_config).model_type
        return f"{source.get('id') or 'of unknown origin'} ({kind}, {config.tuned[base]})"
    if part == "adapter":
        return f"{config.adapter_config.type}, readout {config.readout}"
    if part == "alignment":
        return f"CTC over {config.align_vocab_size:,} of the language model's tokens"
    if part == "clip tokens":
        return f"{config.clip_tokens} of each clip as a whole"
    return f"in {' and '.join(name for name, lora in config.lora.items() if lora)}"


def files_of(folder: Path) -> dict[str, str]:
    """Size of the weights on disk, where they are."""
    files = list(folder.glob("*.safetensors"))
    return {"weights on disk": f"{sum(file.stat().st_size for file in files) / 1e6:9.1f} MB"} if files else {}


def licences(config, folder: Path) -> dict[str, str]:
    """What is known of the licences of the checkpoint and its parts."""
    from audiophi.publishing.licences import component_licence, folder_licence, parse_licence

    stated = folder_licence(folder)
    known = {"checkpoint": str(parse_licence(stated)) if stated else "not stated: it has no model card that says it"}
    for part, name in (("audio", "encoder"), ("text", "language model")):
        base = config.base_components.get(part)
        known[name] = str(component_licence(base["id"], base["revision"])) if base else "not known: no id is recorded"
    return known


def audio_of(config) -> dict[str, str]:
    from modeling_audiophi.encoders import encoder_class

    window = config.window_frames / encoder_class(config.audio_config).feature_rate(config.audio_config)
    context = getattr(config.text_config, "max_position_embeddings", None)
    rate = config.audio_tokens_per_second
    fewer = "" if config.readout == "frames" else " at most: fewer after the collapse"
    whole = f", and {config.clip_tokens} of every clip as a whole" if config.clip_tokens else ""
    lines = {"tokens per second": f"{rate:.2f}{fewer}{whole}", "encoder window": f"{window:.1f} s"}
    if context:
        room = context - PROMPT_TOKENS - config.clip_tokens
        lines["context"] = f"{context:,} tokens, {max(0, room) / rate:.0f} s of audio"
    return lines


def costs(config, parts: dict[str, int]) -> dict[str, str]:
    """Estimates: memory to hold weights and one window's cache; two operations per weight and position."""
    from modeling_audiophi.encoders import encoder_class
    from modeling_audiophi.lengths_audiophi import output_length

    encoder, text = encoder_class(config.audio_config), config.text_config
    feature_rate = encoder.feature_rate(config.audio_config)
    frames = output_length(1000 * feature_rate, encoder.length_rule(config.audio_config)) / 1000
    tokens = config.audio_tokens_per_second
    table = text.vocab_size * text.hidden_size
    # Looking a token up costs nothing; a tied table is the output layer too, which runs for written tokens only.
    layers = parts["language model"] + parts.get("LoRA", 0) - table * (1 if config.tie_word_embeddings else 2)
    align = config.align_vocab_size * text.hidden_size
    # The clip tokens' MLP, which runs for them only, is counted as if it read every frame, too.
    listening = parts["encoder"] + parts.get("clip tokens", 0)
    hearing = 2 * (listening * frames + (parts.get("adapter", 0) + align) * tokens)
    reading, writing = 2 * layers * tokens, 2 * (layers + table)
    window = config.window_frames / feature_rate
    lines = {}
    positions = PROMPT_TOKENS + config.clip_tokens + window * (tokens + SPEECH_TOKENS_PER_SECOND)
    for dtype, size in BYTES.items():
        weights, cached = sum(parts.values()) * size, cache_bytes(text, size) * positions
        lines[f"memory in {dtype}"] = f"{weights / 1e9:.2f} GB weights + {cached / 1e9:.2f} GB cache per beam"
    lines["hearing 1 s"] = f"{hearing / 1e9:.2f} GFLOP (encoder, adapter, alignment)"
    fewer = "" if config.readout == "frames" else ", at most"
    lines["reading 1 s"] = f"{reading / 1e9:.2f} GFLOP (language model{fewer})"
    lines["writing 1 token"] = f"{writing / 1e9:.2f} GFLOP per beam"
    total = hearing + reading + SPEECH_TOKENS_PER_SECOND * writing
    lines["transcribing 1 s"] = f"about {total / 1e9:.1f} GFLOP with one beam"
    lines["not counted"] = "attention between positions, activations, the libraries themselves (about 1 GB)"
    return lines


def cache_bytes(text, size: int) -> int:
    """Bytes of keys and values per token."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * size
