"""Memory of a training step and of generation, computed from the configs.

What is exact: weights, buffers, gradients, Adam's states (tests compare them with real models). What is modelled: what
autograd keeps of the language model for the gradient that goes through it to the adapter, counted operation by
operation (tests compare it with what autograd saves); the encoder's largest intermediate values; logits. What is not
counted: the CUDA context (about 0.5 GB) and the allocator's fragmentation. Attention is taken to be fused, so that it
keeps nothing of size T x T.
"""

from dataclasses import dataclass, fields, replace

import torch

from modeling_audiophi.clip_tokens import BOTTLENECK, HEADS
from modeling_audiophi.encoders import encoder_class
from modeling_audiophi.lengths_audiophi import output_length
from modeling_audiophi.token_losses_audiophi import most_tokens

from .recipe import Stage

TRAINED_BYTES = 4  # what is trained is in float32
# AdamW's two states of a trained value; bitsandbytes keeps those of small parameters in 32 bits, which is not counted.
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
# float32 copies of (labelled positions x vocabulary): for the loss, its log-softmax, and their gradient.
LM_LOGIT_COPIES = 3
# The same of distill: both sides over the temperature, and their log-softmax; the divergences, and their gradient.
DISTILL_LOGIT_COPIES = 6
# (audio tokens x alignment classes): before and after the blank is put beside them, the gradient of both.
ALIGN_LOGIT_COPIES = 4
# A waveform convolution's output, its transposed copy for the LayerNorm, and that one's output.
FRONTEND_COPIES = 3


@dataclass(frozen=True)
class Load:
    """What goes through the model at once: `clips` of `seconds` each.

    `prompt`: text positions per clip beside audio and words; `words`: labelled tokens per clip; `kept`: share of the
    audio tokens that reach the LLM (below 1 when the readout collapses).
    """

    clips: int
    seconds: float
    prompt: int = 16
    words: int = 30
    kept: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """Positions of one clip: `inner` in the encoder's blocks (filled up to whole windows where it reads pictures),
    `frames` out of it, `audio` tokens out of the adapter, `text` in the LLM (audio included). `window` is the longest
    stretch of `inner` that attends to itself; `samples` the encoder's input length, in feature frames."""

    inner: int
    frames: int
    audio: int
    text: int
    window: int
    samples: int


def sizes(config, load: Load) -> Sizes:
    """Counts for an `AudioPhiConfig`, of audio in several windows to a token each.

    Raises ValueError for an encoder of pictures other than LanguageBind's, whose patches are not known here.
    """
    encoder, audio = encoder_class(config.audio_config), config.audio_config
    if getattr(encoder, "fixed_window", False) and not hasattr(audio, "grid"):
        raise ValueError(f"the cost of the {audio.model_type} encoder is not computed")
    samples = round(load.seconds * encoder.feature_rate(audio))
    whole, rest = divmod(samples, config.window_frames)
    windows = [config.window_frames] * whole + [rest] * bool(rest)
    frames = [output_length(window, encoder.length_rule(audio)) for window in windows]
    inner = frames
    if hasattr(audio, "grid"):  # a picture is read whole, with a class token
        inner = [audio.grid[0] * audio.grid[1] + 1] * len(windows)
    tokens = sum(output_length(window, config.audio_length_rule) for window in windows)
    text = round(tokens * load.kept) + config.clip_tokens + load.prompt + load.words
    return Sizes(sum(inner), sum(frames), tokens, text, max(inner), max(windows))


@dataclass(frozen=True)
class Memory:
    """Bytes. The encoder's intermediate values are gone before the others are made; all else is there at once."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    encoder: int = 0
    adapter: int = 0
    alignment: int = 0
    llm: int = 0
    logits: int = 0
    cache: int = 0

    @property
    def activations(self) -> int:
        return max(self.encoder, self.adapter + self.alignment + self.llm + self.logits + self.cache)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def gigabytes(self) -> dict[str, float]:
        """Parts and total in units of 2^30 bytes."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}
        return {name: round(value / 2**30, 3) for name, value in parts.items()}


def fixed_memory(model, optimizer: str = "adamw") -> Memory:
    """Weights (buffers included), gradients and the optimiser's states of a model whose dtypes and `requires_grad` are
    set. `model` may be a skeleton. Nothing of it is an estimate."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Memory(weights=weights, gradients=trained * TRAINED_BYTES, optimizer=trained * STATE_BYTES[optimizer])


def encoder_values(config, load: Load, value_bytes: int) -> int:
    """Bytes of a frozen encoder's largest moment, in which nothing is kept for a gradient."""
    audio, size = config.audio_config, sizes(config, load)
    width = getattr(audio, "hidden_size", None) or audio.d_model
    layers = audio.num_hidden_layers
    inner = max(getattr(audio, name, 0) for name in ("intermediate_size", "cgmlp_size", "encoder_ffn_dim"))
    # Another layer than the last: all of them are returned, and chosen from afterwards.
    states = layers + 1 if config.encoder_layer != "last" or hasattr(audio, "grid") else 2
    blocks = size.inner * (states * width + 2 * inner + 6 * width)
    frontend = 0
    if hasattr(audio, "conv_dim"):
        length, convolutions = size.samples, zip(audio.conv_dim, audio.conv_kernel, audio.conv_stride, strict=True)
        for channels, kernel, stride in convolutions:
            length = (length - kernel) // stride + 1
            frontend = max(frontend, FRONTEND_COPIES * channels * length)
    return load.clips * max(blocks, frontend) * value_bytes


def saved_by_layer(text_config, value_bytes: int, norm_bytes: int) -> int:
    """Bytes that autograd keeps per position and layer of a frozen decoder: the inputs of what is not linear.

    `norm_bytes`: of the values that enter the norms.
    """
    width, inner = text_config.hidden_size, text_config.intermediate_size
    heads = text_config.num_attention_heads
    head_size = getattr(text_config, "head_dim", None) or width // heads
    attention = 4 * heads * head_size  # queries, keys and values as the fused attention takes them, and its output
    if text_config.model_type == "phi":  # attention and MLP side by side behind one LayerNorm
        # gelu_new is written out: its input, the tanh, and both factors of the last product.
        return (attention + 4 * inner) * value_bytes + width * norm_bytes
    # Gate, its activation, the product's other factor; norms in float32.
    return (attention + 3 * inner) * value_bytes + 2 * width * max(4, norm_bytes)


def lora_values(model, value_bytes: int) -> int:
    """Bytes per position of the inputs that LoRA's weights need for their gradients, with their dropout's masks."""
    return sum(
        module.in_features * (value_bytes + 1)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "in_features")
    )


def linear_parameters(module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def training_memory(model, stage: Stage, load: Load, value_bytes: int = 2) -> Memory:
    """Memory of an optimiser step of `stage` on one device.

    `model`: of an AudioPhiConfig, tuned for the stage (`apply_tuning`), frozen parts in their dtype
    (`set_frozen_dtype`); a skeleton will do. `value_bytes`: of what is computed with them. Where that is less than the
    LLM's weights take, autocast makes copies of these, which are part of the graph: those of the whole LLM unless
    gradients are checkpointed.

    Raises ValueError for a stage that tunes the encoder or the LLM in full, whose activations are not modelled.
    """
    if stage.tune.encoder != "frozen" or stage.tune.llm == "full":
        raise ValueError(f"stage {stage.name}: memory is computed for a frozen encoder and a frozen or LoRA LLM only")
    config, size, clips = model.config, sizes(model.config, load), load.clips
    text, frozen_bytes = config.text_config, model.get_input_embeddings().weight.element_size()
    autocast = frozen_bytes > value_bytes
    norm_bytes = frozen_bytes if autocast else value_bytes
    projector = model.model.multi_modal_projector
    through_adapter = sum(m.in_features + m.out_features for m in projector.modules() if type(m) is torch.nn.Linear)
    width = encoder_class(config.audio_config).hidden_size(config.audio_config)
    adapter = clips * (size.frames * 2 * width + size.audio * (through_adapter + 4 * text.hidden_size)) * TRAINED_BYTES
    parts = replace(
        fixed_memory(model, stage.optimizer),
        encoder=encoder_values(config, load, norm_bytes),
        adapter=adapter,
    )
    classes = config.align_vocab_size + 1
    if stage.aligns or config.readout != "frames":
        # The table's rows, gathered and in the head's float32; the logits.
        table = classes * text.hidden_size * (frozen_bytes + (TRAINED_BYTES if frozen_bytes < TRAINED_BYTES else 0))
        logits = clips * size.audio * classes * TRAINED_BYTES * ALIGN_LOGIT_COPIES
        parts = replace(parts, alignment=table + logits)
    if stage.loss == "align":
        return parts
    if config.clip_tokens:  # the states and their norm; keys, values, both factors of their squares; scores and weights
        values = 2 * width + 4 * BOTTLENECK + 3 * HEADS * config.clip_tokens
        parts = replace(parts, adapter=adapter + clips * size.frames * values * TRAINED_BYTES)
    language_model, positions = model.model.language_model, clips * size.text
    saved = saved_by_layer(text, value_bytes, norm_bytes)
    copies = linear_parameters(language_model) // text.num_hidden_layers * value_bytes if autocast else 0
    per_layer = positions * (saved + lora_values(language_model, value_bytes) // text.num_hidden_layers) + copies
    if stage.gradient_checkpointing:  # every layer's input, and one layer made again
        llm = text.num_hidden_layers * positions * text.hidden_size * norm_bytes + per_layer
    else:
        llm = text.num_hidden_layers * per_layer
    logits = 2 * value_bytes + LM_LOGIT_COPIES * 4 * (stage.loss != "distill")
    if stage.distills:  # the teacher's logits; of both its float32 copies
        logits += value_bytes + DISTILL_LOGIT_COPIES * 4
    logits *= min(clips * load.words, most_tokens(text.vocab_size)) * text.vocab_size
    return replace(parts, llm=llm, logits=logits)


def generation_memory(model, load: Load, new_tokens: int, beams: int = 1, value_bytes: int = 2) -> Memory:
    """Memory of generating `new_tokens` per clip: weights, the KV cache, the logits of a step, and the prompt's way
    through one layer."""
    config, size = model.config, sizes(model.config, load)
    text, rows = config.text_config, load.clips * beams
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * value_bytes
    positions = size.text - load.words
    return Memory(
        weights=fixed_memory(model).weights,
        encoder=encoder_values(config, load, value_bytes),
        llm=rows * positions * saved_by_layer(text, value_bytes, value_bytes),
        logits=rows * text.vocab_size * (value_bytes + 4 * LM_LOGIT_COPIES),
        cache=rows * (positions + new_tokens) * kept * 2,  # a growing cache is copied
    )
