"""Say what is in a checkpoint and what it costs to run, without loading its weights."""

import json
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
    from modeling_audiophi import AudioPhiConfig

    config = checked_config(folder, AudioPhiConfig)
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


def checked_config(folder: Path, config_class):
    """The folder's config. Read as JSON first: the class would turn any model's into an AudioPhi of default parts."""
    path = folder / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if kind != "audiophi":
        raise ValueError(f"{folder}: is no AudioPhi checkpoint but {kind or 'of no model type'}")
    return config_class.from_pretrained(folder)


def parameters_by_part(config) -> dict[str, int]:
    """Numbers of parameters, shared ones counted once; built on the meta device, so nothing is loaded."""
    import torch

    from modeling_audiophi import AudioPhiForConditionalGeneration
    from modeling_audiophi.lora_audiophi import is_lora_key

    with torch.device("meta"):
        model = AudioPhiForConditionalGeneration(config)
    tied = config.tie_word_embeddings
    counts = dict.fromkeys(("encoder", "adapter", "alignment", "language model", "LoRA"), 0)
    prefixes = {
        "model.audio_tower.": "encoder",
        "model.multi_modal_projector.": "adapter",
        "model.readout.": "adapter",
        "model.alignment.": "alignment",
        "model.language_model.": "language model",
        "lm_head.": "language model",
    }
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        part = next(part for prefix, part in prefixes.items() if name.startswith(prefix))
        counts["LoRA" if is_lora_key(name) else part] += parameter.numel()
    return {part: count for part, count in counts.items() if count or part in ("encoder", "language model")}


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
    return f"in {' and '.join(name for name, lora in config.lora.items() if lora)}"


def files_of(folder: Path) -> dict[str, str]:
    """Size of the weights on disk, where they are."""
    files = list(folder.glob("*.safetensors"))
    return {"weights on disk": f"{sum(file.stat().st_size for file in files) / 1e6:9.1f} MB"} if files else {}


def licences(config, folder: Path) -> dict[str, str]:
    """What is known of the parts' licences: from their model cards, for an encoder also from its family's own note."""
    from modeling_audiophi.encoders import encoder_class

    known = {"checkpoint": card_licence(folder)}
    for part, name in (("audio", "encoder"), ("text", "language model")):
        known[name] = component_licence(config.base_components.get(part))
    known["encoder"] = getattr(encoder_class(config.audio_config), "weights_licence", None) or known["encoder"]
    return {name: licence or "not known here: see its model card" for name, licence in known.items()}


def component_licence(base: dict | None) -> str | None:
    """Licence of a base component, by its folder's model card or the Hub's, where that answers."""
    from huggingface_hub import HfApi

    if base is None or Path(base["id"]).is_dir():
        return base and card_licence(Path(base["id"]))
    try:
        card = HfApi().model_info(base["id"], revision=base["revision"], timeout=5).card_data
    except Exception:  # the Hub client's errors come from several libraries and share no base class
        return None
    return card and card.license


def card_licence(folder: Path) -> str | None:
    """`license` of the model card in a folder."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    data = ModelCard.load(card).data
    return getattr(data, "license_name", None) or data.license


def audio_of(config) -> dict[str, str]:
    from modeling_audiophi.encoders import encoder_class

    window = config.window_frames / encoder_class(config.audio_config).feature_rate(config.audio_config)
    context = getattr(config.text_config, "max_position_embeddings", None)
    rate = config.audio_tokens_per_second
    fewer = "" if config.readout == "frames" else " at most: fewer after the collapse"
    lines = {"tokens per second": f"{rate:.2f}{fewer}", "encoder window": f"{window:.1f} s"}
    if context:
        lines["context"] = f"{context:,} tokens, {max(0, context - PROMPT_TOKENS) / rate:.0f} s of audio"
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
    hearing = 2 * (parts["encoder"] * frames + (parts.get("adapter", 0) + align) * tokens)
    reading, writing = 2 * layers * tokens, 2 * (layers + table)
    window = config.window_frames / feature_rate
    lines = {}
    positions = PROMPT_TOKENS + window * (tokens + SPEECH_TOKENS_PER_SECOND)
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


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
