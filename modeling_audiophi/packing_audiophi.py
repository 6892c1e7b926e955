"""Packing: several short prompts in one row of what the language model reads, so that it computes no padding.

Chats differ in length, and a batch is as long as its longest: with several questions a row much of it is padding.
Positions that begin anew within a row tell transformers where one prompt ends and the next begins, for every attention
implementation (`transformers.masking_utils.find_packed_sequence_indices`; FlashAttention wants one row). After Krell et
al. 2021, "Efficient Sequence Packing without Cross-contamination" (https://arxiv.org/abs/2107.02027).
"""

from dataclasses import dataclass

import numpy as np
import torch

# Rows as long as the longest prompt, or so many times, are tried: longer ones have less left over, but attention's cost
# grows with the square.
ROOMS = (1, 1.25, 1.5, 2, 3, 4)
# In rows of this many tokens attention costs as much as the rest (SmolLM2-135M, forward and backward, bf16 on a CPU).
ATTENTION = 1350
# Packing has to spare at least this share of a batch's cost to be worth its copies.
WORTH = 0.1


@dataclass
class Packed:
    """A packed batch: `source` (R, S) which of the batch's B * L places each packed one is, `position_ids` (R, S),
    `place` (B, L) where in the R * S places each one of the batch went (0 for padding)."""

    source: torch.Tensor
    position_ids: torch.Tensor
    place: torch.Tensor

    def pack(self, values):
        """(B, L, D) -> (R, S, D)."""
        return values.flatten(0, 1)[self.source]

    def unpack(self, values):
        """(R, S, D) -> (B, L, D); padding holds anything."""
        return values.flatten(0, 1)[self.place]


def can_pack(language_model) -> bool:
    """Whether the family's layers look at other positions through attention alone, whose masks transformers makes."""
    kinds = set(getattr(language_model.config, "layer_types", None) or ())
    stateful = getattr(language_model, "_is_stateful", False)
    by_attention = all(kind.endswith("attention") and not kind.startswith("linear") for kind in kinds)
    return bool(getattr(language_model, "_supports_attention_backend", False)) and not stateful and by_attention


def pack_rows(attention_mask, language_model):
    """`Packed` of a batch by its mask (B, L), in rows of the length that costs the least; None where it is not worth
    it, or `language_model` cannot tell prompts of a row apart."""
    if not can_pack(language_model):
        return None
    one_row = "flash" in (language_model.config._attn_implementation or "")  # as it wants it
    mask = attention_mask.bool().cpu().numpy()  # waits for the device once
    lengths, (batch, width) = mask.sum(1).tolist(), mask.shape
    rooms = {sum(lengths)} if one_row else {min(sum(lengths), int(max(lengths) * times)) for times in ROOMS}
    rows, size = min((fill(lengths, room) for room in sorted(rooms)), key=lambda found: cost(len(found[0]), found[1]))
    if cost(len(rows), size) > (1 - WORTH) * cost(batch, width):
        return None
    columns = [np.flatnonzero(real) + number * width for number, real in enumerate(mask)]
    source, positions = np.zeros((len(rows), size), np.int64), np.zeros((len(rows), size), np.int64)
    place = np.zeros(batch * width, np.int64)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            end = start + lengths[number]
            source[row, start:end], positions[row, start:end] = columns[number], np.arange(lengths[number])
            place[columns[number]] = np.arange(row * size + start, row * size + end)
            start = end
        # What is left over is a prompt of its own, which nobody reads.
        positions[row, start:] = np.arange(size - start)
    made = (source, positions, place.reshape(batch, width))
    return Packed(*(torch.from_numpy(values).to(attention_mask.device) for values in made))


def fill(lengths, room):
    """Prompts of `lengths` in rows of `room` tokens at most, the longest first into the first row that has room
    (first-fit decreasing): the numbers of each row's prompts, and the longest row's tokens."""
    rows, free = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = next((row for row, left in enumerate(free) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows, room - min(free, default=0)


def cost(rows, size):
    """What `rows` of `size` tokens cost, in tokens that attend to nothing else, times `ATTENTION`."""
    return rows * size * (ATTENTION + size)
