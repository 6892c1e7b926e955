"""Floating-point operations of a training step, computed from the configs, and the hours they take.

A product of matrices counts two operations per multiplication and addition; norms and activations, well below one per
cent, are not counted. Tests compare the counts with torch's own counter.
"""

import torch

from modeling_audiophi.encoders import encoder_class

from .memory import Load, linear_parameters, sizes
from .recipe import Stage


def dense_parameters(module) -> int:
    """Parameters that every position is multiplied with: all but embeddings, biases and norms."""
    embeddings = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Embedding))
    return sum(p.numel() for p in module.parameters() if p.dim() > 1) - embeddings


def encoder_flops(model, load: Load) -> int:
    """The frozen encoder's forward pass over a batch."""
    config = model.config
    audio, size = config.audio_config, sizes(config, load)
    tower = model.model.audio_tower
    width = encoder_class(audio).hidden_size(audio) if not hasattr(audio, "grid") else audio.hidden_size
    frontend = frontend_parameters = 0
    if hasattr(audio, "conv_dim"):
        length, channels = size.samples, 1
        for output, kernel, stride in zip(audio.conv_dim, audio.conv_kernel, audio.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
            frontend += 2 * kernel * channels * output * length
            frontend_parameters += kernel * channels * output
            channels = output
    layers, blocks = audio.num_hidden_layers, dense_parameters(tower) - frontend_parameters
    if hasattr(audio, "grid"):  # the penultimate layer's output is taken, the last one is not run
        blocks -= dense_parameters(tower.model.encoder.layers[-1])
        layers -= 1
    attention = 4 * layers * width * size.inner * size.window
    return load.clips * (frontend + 2 * blocks * size.inner + attention)


def stage_flops(model, stage: Stage, load: Load) -> int:
    """Forward and backward of one micro-batch. `model`: tuned for the stage (`apply_tuning`), a skeleton will do.

    Backward through a frozen weight costs as much as forward (the gradient of its input), through a trained one twice
    as much; gradient checkpointing makes each forward of the LLM twice.
    """
    config, size, clips = model.config, sizes(model.config, load), load.clips
    text = config.text_config
    adapter = 3 * 2 * linear_parameters(model.model.multi_modal_projector) * clips * size.audio
    total = encoder_flops(model, load) + adapter
    collapsed = stage.loss != "align" and config.readout != "frames"
    if stage.aligns or collapsed:
        # Scores, and where the LLM reads their mean embeddings those; forward and backward.
        table = (2 + 2 * collapsed) * text.hidden_size
        spelling = 3 * config.align_spelling["size"] if config.align_spelling else 0
        total += 2 * clips * size.audio * config.align_vocab_size * (table + spelling)
    if stage.loss == "align":
        return total
    if config.clip_tokens:
        part = model.model.clip_tokens
        frames = clips * size.frames * (linear_parameters(part.keys) + linear_parameters(part.values))
        total += 3 * 2 * (frames + clips * config.clip_tokens * linear_parameters(part.made))
    language_model, positions = model.model.language_model, clips * size.text
    trained = sum(p.numel() for p in language_model.parameters() if p.requires_grad)
    passes = 3 if stage.gradient_checkpointing else 2
    total += positions * (passes * 2 * dense_parameters(language_model) + 2 * trained)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_size
    # Two products forward; backward makes the first again, and four of gradients.
    attention = 4 * text.num_hidden_layers * width * positions * size.text
    total += attention * (passes - 1) + attention * 5 // 2
    if stage.distills:  # the teacher reads, once; its prompt is taken to be as long without the audio
        read = clips * (load.prompt + load.words)
        total += 2 * read * dense_parameters(language_model) + 4 * text.num_hidden_layers * width * read * read // clips
        total += 2 * clips * load.words * text.hidden_size * text.vocab_size
    return total + 2 * 2 * clips * load.words * text.hidden_size * text.vocab_size


def hours(flops: float, teraflops: float, utilisation: float, devices: int = 1) -> float:
    """Hours for `flops` on `devices` of `teraflops` (peak, 1e12 per second) that keep `utilisation` (share) busy."""
    return flops / (teraflops * 1e12 * utilisation * devices) / 3600
