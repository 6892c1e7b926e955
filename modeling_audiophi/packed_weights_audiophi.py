"""Matrices of a slim checkpoint in 8 bits, each row with a scale of its own: half of the size in float16."""

import torch

SUFFIX = ".int8_scale"
SMALLEST = 4096  # numbers; what has fewer is no weight in the size of a file


def pack(state):
    """`state` (name: tensor) with every matrix as int8 and, beside it, what each of its rows is to be multiplied by."""
    packed = {}
    for name, value in state.items():
        if not (value.is_floating_point() and value.dim() > 1 and value.numel() >= SMALLEST):
            packed[name] = value
            continue
        rows = value.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
        packed[name + SUFFIX] = scale
    return packed


def unpack(state):
    """`state` of a file, of `pack` or not, with its matrices as float32 where they were packed."""
    return {
        name: value.float() * state[name + SUFFIX].view(-1, *[1] * (value.dim() - 1))
        if name + SUFFIX in state
        else value
        for name, value in state.items()
        if not name.endswith(SUFFIX)
    }
