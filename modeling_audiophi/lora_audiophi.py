"""LoRA (https://arxiv.org/abs/2106.09685) inside the model, through peft: no wrapper, so names and `generate` stay
the same."""

import contextlib
import copy
import math

import torch
from torch import nn
from transformers.utils import is_peft_available

PARTS = {"audio": "audio_tower", "text": "language_model"}


def inject_lora(model, part, arguments):
    """Add LoRA layers to `model`'s audio tower (part "audio") or language model ("text"); None does nothing.

    `arguments` are those of `peft.LoraConfig`. Raises ValueError for an unknown part, ImportError without peft.
    """
    if arguments is None:
        return
    if part not in PARTS:
        raise ValueError(f"lora part {part!r}: expected one of {', '.join(PARTS)}")
    if not is_peft_available():
        raise ImportError("LoRA needs peft: pip install peft")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("the installed peft cannot be imported") from error

    module = getattr(model, PARTS[part])
    inject_adapter_in_model(LoraConfig(**arguments), module)
    for name, parameter in module.named_parameters():
        if is_lora_key(name):
            # peft has initialised them (B = 0: no effect at first); transformers would do it again, at random.
            parameter._is_hf_initialized = True


def widened(present, arguments):
    """Arguments of LoRA layers that were made with `present` and shall have `arguments`, which may leave some open.

    Raises ValueError for a lower rank, or other layers: what was learned would be lost.
    """
    present = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **present}  # what peft takes where nothing is said
    arguments = {**present, **arguments}
    if arguments["r"] < present["r"]:
        raise ValueError(f"LoRA layers of rank {present['r']} cannot become some of rank {arguments['r']}")
    fixed = arguments.keys() - {"r", "lora_alpha", "lora_dropout"}
    if other := sorted(name for name in fixed if present.get(name) != arguments[name]):
        raise ValueError(f"LoRA layers are there already, made with another {', '.join(other)}")
    return arguments


@torch.no_grad()
def widen_lora(model, part, present, arguments):
    """Give the LoRA layers of `model`'s part a higher rank, or another dropout, without a change of what they compute:
    their rows stay, and new ones start without effect. Takes and returns arguments as `widened`."""
    arguments = widened(present, arguments)
    module, rank, alpha = getattr(model, PARTS[part]), arguments["r"], arguments["lora_alpha"]
    scaling = alpha / (math.sqrt(rank) if arguments.get("use_rslora") else rank)
    for layer in lora_layers(module):
        for name, down in layer.lora_A.items():
            up = layer.lora_B[name]
            rows = nn.Linear(down.in_features, rank, bias=False).to(down.weight)  # starts as peft's
            rows.weight[: len(down.weight)] = down.weight
            columns = up.weight.new_zeros(up.out_features, rank)
            columns[:, : up.in_features] = up.weight * (layer.scaling[name] / scaling)
            down.weight, up.weight = nn.Parameter(rows.weight.data), nn.Parameter(columns)
            down.weight._is_hf_initialized = up.weight._is_hf_initialized = True  # as in `inject_lora`
            down.out_features = up.in_features = layer.r[name] = rank
            layer.lora_alpha[name], layer.scaling[name] = alpha, scaling
            dropout = arguments["lora_dropout"]
            layer.lora_dropout[name] = (nn.Dropout(dropout) if dropout else nn.Identity()).train(layer.training)
    return arguments


def lora_layers(module):
    """The LoRA layers inside `module`."""
    return [layer for layer in module.modules() if hasattr(layer, "lora_A") and hasattr(layer, "_disable_adapters")]


@contextlib.contextmanager
def without_lora(module):
    """LoRA layers of `module` do nothing inside the `with` block. Unlike peft's own switch, this leaves
    `requires_grad` alone, so that it may be used in the middle of training."""
    layers = lora_layers(module)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@torch.no_grad()
def merged_state_dict(model):
    """State dict of `model` with the LoRA layers added into the weights that they change, under the names of a model
    without LoRA. Added in float32, whatever the weights are stored in."""
    state = {
        key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if not is_lora_key(key)
    }
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            layer = copy.deepcopy(module).float()
            layer.merge()
            for key, value in layer.get_base_layer().state_dict().items():
                state[f"{name}.{key}"] = value.to(state[f"{name}.{key}"].dtype)
    return state


def is_lora_key(key):
    """Whether a state-dict key belongs to a LoRA layer."""
    return ".lora_" in key


def with_base_layers(state_dict, model_keys):
    """Rename plain weights (`q_proj.weight`) to where a LoRA layer keeps them (`q_proj.base_layer.weight`)."""
    renamed = {}
    for key, value in state_dict.items():
        wrapped = ".base_layer.".join(key.rsplit(".", 1))
        renamed[wrapped if key not in model_keys and wrapped in model_keys else key] = value
    return renamed
