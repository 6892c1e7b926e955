"""Norms and clipping of gradients, whole or shared between processes (FSDP2)."""

import math

import torch
from torch.distributed.tensor import DTensor

from .build import PARTS, part_of


def gradient_squares(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Sum of squared gradients per part that has any, over all processes where parameters are shared."""
    own, shared = {}, {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            squares, grad = (shared, grad.to_local()) if isinstance(grad, DTensor) else (own, grad)
            squares[part_of(name)] = squares.get(part_of(name), 0) + grad.detach().float().square().sum()
    if shared:
        told = torch.stack(list(shared.values()))
        torch.distributed.all_reduce(told)
        shared = dict(zip(shared, told, strict=True))
    return {part: own.get(part, 0) + shared.get(part, 0) for part in PARTS if part in own or part in shared}


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradients (before clipping) per part that has any."""
    return {part: math.sqrt(float(square)) for part, square in gradient_squares(model).items()}


def clip_gradients(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which cannot add up sharded and whole gradients; returns the norm."""
    norm = torch.stack(list(gradient_squares(model).values())).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
    return norm
