"""From a grid of spectrogram patches to tokens in time."""

POOLINGS = ("mean", "concat")


def check_pooling(pooling):
    """ValueError for a frequency_pooling that does not exist."""
    if pooling not in POOLINGS:
        raise ValueError(f"frequency_pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")


def pool_frequency(patches, pooling):
    """`patches` (B, F, T, D) -> (B, T, D) by "mean", or (B, T, F * D) by "concat", lowest frequency first.

    The mean is small; side by side the adapter still knows what was high and what was low.
    """
    check_pooling(pooling)
    if pooling == "mean":
        return patches.mean(1)
    return patches.transpose(1, 2).flatten(2)


def pooled_size(size, bands, pooling):
    """Width of a pooled token of `bands` patches of width `size`."""
    check_pooling(pooling)
    return size if pooling == "mean" else size * bands
