"""What an encoder's blocks see: hidden states and attention weights, of any encoder whose blocks lie in `layers`."""

import torch
from torch import nn


class BlockRecorder:
    """Inside the `with` block notes what goes into each of `blocks` that runs, and out of the last one (`states`), and
    the weights (B, heads, T, T) of each block's first attention module that tells them (`weights`, a list of lists)."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __enter__(self):
        self.entered, self.left, self.weights, self.hooks = [], None, [[] for _ in self.blocks], []
        for block, found in zip(self.blocks, self.weights, strict=True):
            self.hooks.append(block.register_forward_pre_hook(self._enters, with_kwargs=True))
            self.hooks.append(block.register_forward_hook(self._leaves))
            for module in block.modules():
                if "Attention" in type(module).__name__:
                    self.hooks.append(module.register_forward_hook(self._attended(found)))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    @property
    def states(self):
        return [*self.entered, self.left]

    def _enters(self, block, args, kwargs):
        self.entered.append(args[0] if args else kwargs["hidden_states"])

    def _leaves(self, block, args, output):
        self.left = output if isinstance(output, torch.Tensor) else output[0]

    @staticmethod
    def _attended(found):
        def note(module, args, output):
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not found and isinstance(weights, torch.Tensor) and weights.dim() == 4:
                found.append(weights)

        return note


def run_recorded(tower, features, mask):
    """Run `tower`, an encoder, window by window, and note what its blocks see.

    Takes what the encoder takes. Returns (hidden, mask) as the encoder does; `states`, for each block (W, T, D) of what
    goes into it, and one more of what comes out of the last, before a final norm; `attentions`, for each block
    (W, heads, T, T). Rows are zero-padded to the longest. Attentions are None where a block tells none: only "eager"
    attention computes them, and XEUS never returns them.
    """
    blocks = next(m for n, m in tower.named_modules() if n.rpartition(".")[2] == "layers" and len(m) > 0)
    outputs, states, attentions = [], [], []
    for row in range(len(features)):
        with BlockRecorder(blocks) as seen:
            outputs.append(tower(features[row : row + 1], mask[row : row + 1]))
        states.append(seen.states)
        attentions.append([weights for found in seen.weights for weights in found])
    told = all(len(row) == len(seen.entered) for row in attentions)
    return (
        tuple(stack_padded(part) for part in zip(*outputs, strict=True)),
        tuple(stack_padded(block) for block in zip(*states, strict=True)),
        tuple(stack_padded(block) for block in zip(*attentions, strict=True)) if told else None,
    )


def stack_padded(tensors):
    """Tensors (1, ...) -> one (N, ...), zero-padded at the end of every axis to the longest."""
    sizes = torch.tensor([tensor.shape for tensor in tensors]).amax(0).tolist()
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes[1:], tensor.shape[1:], strict=True)]
        padded.append(nn.functional.pad(tensor, [end for size in reversed(missing) for end in (0, size)]))
    return torch.cat(padded)
