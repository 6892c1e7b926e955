"""How many tokens a stretch of audio makes, as data.

A *length rule* is a list of steps `[kernel, stride, padding, multiply]` with `padding` the total of both sides; each
step maps a length L to `max(0, (L + padding - kernel) // stride + 1) * multiply`. Every encoder and adapter states
its rule; the model config stores their concatenation (feature frames -> audio tokens).
"""

import math

import torch


def output_length(length, rule):
    """Length after `rule`; `length` is an int or an integer tensor (any shape), the result has the same type."""
    for kernel, stride, padding, multiply in rule:
        length = (length + padding - kernel) // stride + 1
        length = length.clamp(min=0) if isinstance(length, torch.Tensor) else max(0, length)
        length = length * multiply
    return length


def shortest_input(rule):
    """Smallest input length for which `rule` gives at least one output."""
    length = 1
    for kernel, stride, padding, multiply in reversed(rule):
        length = max(1, (math.ceil(length / multiply) - 1) * stride + kernel - padding)
    return length


def length_mask(lengths, size=None):
    """(B,) lengths -> (B, size) bool, True on the first `lengths[b]` positions; `size` defaults to the longest."""
    size = int(lengths.max()) if size is None else size
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def sum_windows(lengths, num_windows):
    """`lengths` (W,) of windows, `num_windows` (C,) how many each clip has, one at least -> (C,) lengths of clips.

    Raises ValueError when the counts do not add up to W.
    """
    if len(num_windows) == len(lengths):  # one each: nothing to compute, and nothing to wait for
        return lengths.to(num_windows.dtype)
    if int(num_windows.sum()) != len(lengths):
        raise ValueError(
            f"audio_num_windows adds up to {int(num_windows.sum())} windows, but the audio input has {len(lengths)} "
            "rows"
        )
    clip_of_window = torch.repeat_interleave(torch.arange(len(num_windows), device=lengths.device), num_windows)
    return torch.zeros_like(num_windows).index_add(0, clip_of_window, lengths.to(num_windows.dtype))


def join_windows(tokens, mask, num_windows=None):
    """Put the windows of a clip one after the other.

    `tokens` (W, T, D) and `mask` (W, T) bool hold one row per encoder window, in clip order, valid tokens first;
    `num_windows` (C,) says how many rows each clip has, one at least (None: one each). Returns tokens (C, T', D) and
    mask (C, T') with each clip's valid tokens first. Raises ValueError when the counts do not add up to W.
    """
    lengths = mask.sum(1)
    if num_windows is not None:
        lengths = sum_windows(lengths, num_windows.to(tokens.device))
    clip_mask = length_mask(lengths, max(1, int(lengths.max()) if len(lengths) else 1))
    if len(lengths) == len(tokens):
        return tokens[:, : clip_mask.shape[1]] * clip_mask[..., None], clip_mask
    joined = tokens.new_zeros(*clip_mask.shape, tokens.shape[-1])
    joined[clip_mask] = tokens[mask]
    return joined, clip_mask
