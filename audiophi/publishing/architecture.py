"""What a checkpoint is made of, from its config and the headers of its weights: nothing is loaded."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .licences import short_name


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's files hold."""

    numbers: int
    bytes: int


def read_config(folder: Path):
    """The checkpoint's config; ValueError for a folder that holds another model's, OSError for one without.

    Read as JSON first: the class would turn any model's into an AudioPhi of default parts.
    """
    from modeling_audiophi import AudioPhiConfig

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "audiophi":
        raise ValueError(f"{folder}: is no AudioPhi checkpoint but {kind or 'of no model type'}")
    return AudioPhiConfig.from_pretrained(folder)


def parameters_by_part(config) -> dict[str, int]:
    """Numbers of parameters, shared ones counted once; built on the meta device, so nothing is loaded."""
    import torch

    from modeling_audiophi import AudioPhiForConditionalGeneration
    from modeling_audiophi.lora_audiophi import is_lora_key

    with torch.device("meta"):
        model = AudioPhiForConditionalGeneration(config)
    tied = config.tie_word_embeddings
    counts = dict.fromkeys(("encoder", "adapter", "alignment", "clip tokens", "language model", "LoRA"), 0)
    prefixes = {
        "model.audio_tower.": "encoder",
        "model.multi_modal_projector.": "adapter",
        "model.readout.": "adapter",
        "model.alignment.": "alignment",
        "model.clip_tokens.": "clip tokens",
        "model.language_model.": "language model",
        "lm_head.": "language model",
    }
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        part = next(part for prefix, part in prefixes.items() if name.startswith(prefix))
        counts["LoRA" if is_lora_key(name) else part] += parameter.numel()
    return {part: count for part, count in counts.items() if count or part in ("encoder", "language model")}


def stored(folder: Path) -> Stored:
    """What the weights' files in `folder` hold. FileNotFoundError where there are none."""
    from safetensors import safe_open

    from modeling_audiophi.packed_weights_audiophi import SUFFIX

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no *.safetensors, so there is no model to write a card for")
    numbers = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            own = [name for name in weights.keys() if not name.endswith(SUFFIX)]  # scales are no parameters
            numbers += sum(prod(weights.get_slice(name).get_shape()) for name in own)
    return Stored(numbers, sum(file.stat().st_size for file in files))


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def describe_parts(config) -> list[tuple[str, str, str]]:
    """(part, what it is, parameters) of every part, in the order in which a clip passes through them."""
    counts = parameters_by_part(config)
    layer = {"last": "its last output", "mix": "a learned mix of its layers"}.get(
        config.encoder_layer, f"hidden states {config.encoder_layer}"
    )
    rows = [
        ("encoder", f"{component(config, 'audio')}, {layer}, {tuning(config, 'audio')}", millions(counts["encoder"])),
        ("adapter", adapter(config.adapter_config), millions(counts.get("adapter", 0))),
    ]
    if config.align_vocab_size:
        spelling = config.align_spelling
        spells = f", spelling vectors of {spelling['size']} of {spelling['buckets']:,} n-grams" if spelling else ""
        what = f"CTC over {config.align_vocab_size:,} of the LLM's own token embeddings and a blank{spells}"
        rows.append(("alignment head", what, millions(counts.get("alignment", 0))))
    rows.append(("readout", READOUTS.get(config.readout, config.readout), "with the adapter's"))
    if config.clip_tokens:
        what = f"{config.clip_tokens} of each clip as a whole, attentive statistics of the encoder's outputs"
        rows.append(("clip tokens", what, millions(counts.get("clip tokens", 0))))
    rows.append(
        ("language model", f"{component(config, 'text')}, {tuning(config, 'text')}", millions(counts["language model"]))
    )
    if any(config.lora.values()):
        rows.append(("LoRA", lora(config), millions(counts.get("LoRA", 0))))
    return rows


READOUTS = {
    "frames": "`frames`: every adapter output goes to the LLM",
    "collapse": "`collapse`: blanks dropped, repeats merged, so that the LLM reads a few embeddings per second",
    "mixed": "`mixed`: collapsed words, and one token per second without words",
}


def component(config, part: str) -> str:
    """Id of a base component and what model it is."""
    base = config.base_components.get(part)
    kind = (config.audio_config if part == "audio" else config.text_config).model_type
    return f"{short_name(base['id']) if base else 'of unknown origin'} ({kind})"


def tuning(config, part: str) -> str:
    return {"frozen": "frozen", "lora": "with LoRA", "full": "trained in full"}[config.tuned[part]]


# Settings that shape the adapter of a type; the config has all of them for every type.
ADAPTER_SETTINGS = {
    "linear": ("stack",),
    "mlp": ("stack", "hidden_size"),
    "mlp2x_gelu": ("stack", "hidden_size"),
    "conv_mlp": ("stack", "hidden_size", "kernel_size", "num_layers"),
    "transformer": ("stack", "hidden_size", "kernel_size", "num_layers", "num_heads"),
    "qformer": ("window", "queries", "num_layers", "num_heads"),
    "resampler": ("window", "queries", "num_layers", "num_heads"),
    "identity": (),
}


def adapter(config) -> str:
    """Type and settings of the adapter."""
    names = ADAPTER_SETTINGS.get(
        config.type, ("stack", "hidden_size", "kernel_size", "num_layers", "num_heads", "window", "queries")
    )
    return ", ".join([f"`{config.type}`", *(f"{name} {getattr(config, name)}" for name in names)])


def lora(config) -> str:
    """Ranks and targets of the LoRA layers."""
    found = []
    for part, name in (("text", "language model"), ("audio", "encoder")):
        settings = config.lora[part]
        if settings:
            targets = settings.get("target_modules") or "peft's usual layers"
            targets = targets if isinstance(targets, str) else ", ".join(targets)
            found.append(f"{name}: r {settings.get('r', 8)}, alpha {settings.get('lora_alpha', 8)}, on {targets}")
    return "; ".join(found)
