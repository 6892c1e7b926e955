"""FSDP2: the LLM's and the encoder's parameters, gradients and optimiser state shared between the processes.

accelerate's settings (configs/accelerate/fsdp2.yaml) are followed, the sharding itself is done here, with
torch.distributed.fsdp.fully_shard, because accelerate (1.15) does it on GPUs only and puts the LLM's embeddings into a
unit that is gathered when they are called, whereas the alignment reads their table without calling them.

What is sharded is a copy. The plain model stays beside it, on the CPU, and gets the trained values whenever it is
needed: to evaluate (each process then generates for itself, as long as its clips take), to be saved, and for the next
stage. Adapter, alignment, readout and clip tokens are small and used in part only by many a batch, so every process
keeps them whole and their gradients are averaged (`average_gradients`).
"""

import copy
import os

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .build import part_of
from .recipe import Recipe, RecipeError

SETTINGS = "accelerate's fsdp_config (configs/accelerate/fsdp2.yaml)"
TAKEN_OVER = "AUDIOPHI_USE_FSDP2"


def take_over() -> bool:
    """Whether accelerate's settings ask for FSDP2; then accelerate itself is told not to shard.

    Raises RecipeError for what is not supported: FSDP1, offloading, FSDP's activation checkpointing.
    """
    if PartialState().num_processes > 1 and is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError(f"{SETTINGS}: fsdp_version is {os.environ.get('FSDP_VERSION', '1')}, only 2 is supported")
        for name, instead in (
            ("FSDP_OFFLOAD_PARAMS", "use more processes, or LoRA instead of full tuning"),
            ("FSDP_ACTIVATION_CHECKPOINTING", "set gradient_checkpointing in the recipe's stage"),
        ):
            if is_set(name):
                raise RecipeError(f"{SETTINGS}: {name.lower()} is not supported; {instead}")
        del os.environ["ACCELERATE_USE_FSDP"]
        os.environ[TAKEN_OVER] = "true"
    return is_set(TAKEN_OVER)


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for what FSDP2 cannot train."""
    if recipe.components.quantize_text != "none":
        raise RecipeError("components.quantize_text: FSDP2 cannot share 4-bit weights; use DDP, or set it to none")
    for number, stage in enumerate(recipe.stages):
        if stage.optimizer != "adamw":
            raise RecipeError(f"stages.{number}.optimizer: bitsandbytes cannot share its states; FSDP2 needs adamw")
        if stage.precision == "fp16":
            raise RecipeError(f"stages.{number}.precision: FSDP2 has no loss scaling for fp16; use bf16 or fp32")


def sharded_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU whose LLM and encoder are sharded over all processes; its parameters keep their
    names. A device holds one whole layer at a time, beside its part of the others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    state = PartialState()
    sharded = copy.deepcopy(model)
    replicated = {p for name, p in sharded.named_parameters() if part_of(name) == "adapter"}
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    options = {"mesh": mesh, "ignored_params": replicated}
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    names = layer_names(sharded)
    for module in reversed(list(sharded.modules())):  # inner ones first
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=reshard, **options)
    # What is left (embeddings, head, norms) stays gathered from forward to backward: the alignment reads the table.
    fully_shard(sharded, reshard_after_forward=False, **options)
    return sharded.to(state.device)  # what is not shared


def layer_names(model: nn.Module) -> set[str]:
    """Class names of the layers that are sharded one by one."""
    if wanted := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        names = {name.strip() for name in wanted.split(",")}
        present = {type(module).__name__ for module in model.modules()}
        if missing := sorted(names - present):
            raise RecipeError(f"{SETTINGS}: transformer_layer_cls_to_wrap: the model has no {', '.join(missing)}")
        return names
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def describe_sharding(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    shared = [p for p in model.parameters() if isinstance(p, DTensor)]
    here = sum(p.to_local().numel() for p in shared)
    return (
        f"FSDP2: {sum(p.numel() for p in shared):,} of {total:,} parameters are shared between "
        f"{PartialState().num_processes} processes, {here:,} of them lie in the first one"
    )


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of trained parameters that every process keeps whole, in one exchange.

    A parameter that only some processes' batches used counts as zero in the others; one that none used keeps no
    gradient, so that the optimiser leaves it alone.
    """
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not whole:
        return
    device = whole[0].device
    used = torch.tensor([float(p.grad is not None) for p in whole], device=device)
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in whole]
    told = torch.cat([used, *flat])
    torch.distributed.all_reduce(told)
    used, values = told[: len(whole)].tolist(), told[len(whole) :] / PartialState().num_processes
    for parameter, count, mean in zip(whole, used, values.split([p.numel() for p in whole]), strict=True):
        if count:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)


@torch.no_grad()
def collect(sharded: nn.Module, plain: nn.Module) -> None:
    """Copies what training changes from the sharded model into the plain one; every process takes part."""
    there = dict(plain.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            there[name].copy_(whole_tensor(parameter))
    buffers = dict(plain.named_buffers())
    for name, buffer in sharded.named_buffers():
        buffers[name].copy_(buffer)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a sharded one (every process takes part)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """`value`, the same whole tensor in every process, sharded as `example` is."""
    if not isinstance(example, DTensor):
        return value
    value = value.to(example.device)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def whole_optimizer_state(state: dict) -> dict:
    """An optimiser's state_dict() as one process would have it; every process takes part."""
    values = {
        index: {key: whole_tensor(v).cpu() if isinstance(v, torch.Tensor) else v for key, v in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": values}


def shard_optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The reverse: for `load_state_dict` of an optimiser of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {
        index: {
            key: like(v, parameters[index]) if isinstance(v, torch.Tensor) and v.shape == parameters[index].shape else v
            for key, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": values}
