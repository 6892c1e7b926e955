"""Losses of labelled tokens, some at a time: of 2,000 tokens a vocabulary of 262,000 words makes 2 GB of logits, and
twice as much again for their gradients."""

from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26  # held at a time: 256 MB in float32


def most_tokens(vocab_size):
    """How many tokens are scored at a time."""
    return max(1, MOST_LOGITS // vocab_size)


def sum_of_tokens(loss, vocab_size, *tokens):
    """The sum of `loss(*tokens)`, itself a sum over tokens, over parts of `tokens`, each (tokens, ...). Logits of no
    more than a part are held at a time: the backward pass computes them again (Chen et al. 2016, "Training Deep Nets
    with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174; in a kernel, cut cross-entropy does so,
    https://arxiv.org/abs/2411.09009)."""
    most = most_tokens(vocab_size)
    if len(tokens[0]) <= most:
        return loss(*tokens)
    parts = zip(*(values.split(most) for values in tokens), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)
