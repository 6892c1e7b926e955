"""CTC loss over a large vocabulary: the dense work is one logsumexp forward and one softmax backward.

torch's `ctc_loss` takes log-probabilities of all classes and gives a gradient for all of them, several passes over
frames x vocabulary in float32; with 23,000 classes they took three quarters of a training step on a CPU
(dev/LOG.md). But a transcript uses only a few classes: torch's loss is run on those, and the gradient of the others is
their softmax.
"""

import torch
from torch import nn


class CTCFromLogits(torch.autograd.Function):
    """Negative log likelihood of each transcript (Graves et al. 2006), from logits that are not normalised.

    `logits` (B, T, C), class 0 the blank; `classes` (B, S) targets, 0-padded; `lengths`, `target_lengths` (B,). Returns
    (B,) float32, 0 (and no gradient) for a transcript that does not fit into its frames.
    """

    @staticmethod
    def forward(ctx, logits, classes, lengths, target_lengths):
        index = torch.cat([torch.zeros_like(classes[:, :1]), classes], 1)[:, None].expand(-1, logits.shape[1], -1)
        normaliser = torch.stack([clip.float().logsumexp(-1) for clip in logits])
        picked = logits.gather(-1, index).float() - normaliser[..., None]
        # Columns 1... of `picked` are target positions; a class that comes twice is read from its first one.
        same = classes[:, :, None] == classes[:, None, :]
        columns = same.to(torch.int8).argmax(-1) + 1
        with torch.enable_grad():
            picked.requires_grad_()
            losses = nn.functional.ctc_loss(
                picked.transpose(0, 1), columns, lengths, target_lengths, reduction="none", zero_infinity=True
            )
            (gradient,) = torch.autograd.grad(losses.sum(), picked)
        # torch's gradient is made to go through log_softmax: softmax - posterior.
        posterior = picked.detach().exp() - gradient
        frames = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        frames &= (losses.detach() > 0)[:, None]
        ctx.save_for_backward(logits, normaliser, index, posterior, frames)
        return losses.detach()

    @staticmethod
    def backward(ctx, grad_losses):
        logits, normaliser, index, posterior, frames = ctx.saved_tensors
        scale = grad_losses[:, None] * frames
        gradient = torch.empty_like(logits)
        # A clip at a time: its softmax stays in the cache, and only one is in float32.
        for clip in range(len(logits)):
            dense = (logits[clip].float() - normaliser[clip, :, None]).exp_()
            dense.scatter_add_(-1, index[clip], -posterior[clip])
            gradient[clip] = dense.mul_(scale[clip, :, None])
        return gradient, None, None, None


def ctc_negative_log_likelihood(logits, classes, lengths, target_lengths):
    """See `CTCFromLogits`."""
    if not classes.shape[1]:  # no transcript has a word: one padded column keeps the shapes
        classes = classes.new_zeros(len(classes), 1)
    # What is longer than the frames costs nothing anyway; a text of ten thousand letters must not cost gigabytes.
    most = logits.shape[1] + 1
    classes, target_lengths = classes[:, :most], target_lengths.clamp(max=most)
    return CTCFromLogits.apply(logits, classes, lengths, target_lengths)
