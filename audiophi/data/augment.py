"""Augmentation of encoder states and waveforms, reproducible from a seed.

The random numbers of each example come from (seed, *key), the key naming epoch and example, and not from a running
generator: a resumed run, another batch order or another number of workers then augments every example in the same way.
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from processing.audio_io import resample


@dataclass
class Augment:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779) without time warping, and Gaussian noise, on encoder states, on
    the device where they are and without looking at single clips.

    Args:
        time_masks: masked stretches per 100 frames (at least one per window when above 0).
        time_width: their largest length in frames; never more than a fifth of the window.
        feature_dropout: probability that a feature is masked over the whole window.
        noise: standard deviation of the noise, in standard deviations of each frame, so that it is also the noise's
            size after the adapter's LayerNorm.
    """

    time_masks: float = 0.0
    time_width: int = 15
    feature_dropout: float = 0.0
    noise: float = 0.0

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """States (W, T, D) of windows, `mask` (W, T) bool which frames are real, a seed (W,) int64 of each, see
        `seed_of` -> the states changed; a window's change depends on its seed and length alone."""
        (_, frames, size), real = hidden.shape, mask[..., None]
        lengths = mask.sum(1)[:, None]
        changed = hidden.float()
        if self.noise > 0:
            drawn = normal_numbers(seeds, frames, size)
            changed = changed + self.noise * changed.std(-1, correction=0, keepdim=True) * drawn
        # Masked values become the window's mean: encoder states have a few huge features that are nearly constant,
        # without which the adapter's LayerNorm would scale all others up.
        fill = (changed * real).sum(1, keepdim=True) / lengths[..., None].clamp(min=1)
        masked = torch.zeros_like(real)
        if self.time_masks > 0:
            most = max(1, round(self.time_masks * frames / 100))
            number = torch.arange(most, device=hidden.device)
            wanted = number < (self.time_masks * lengths / 100).round().clamp(min=1)
            widths, places = uniform_numbers(seeds + 1, most, 2).unbind(-1)
            widths = (widths * ((lengths // 5).clamp(max=self.time_width) + 1)).long() * wanted
            starts = (places * (lengths - widths + 1)).long()
            frame = torch.arange(frames, device=hidden.device)[:, None]
            inside = (frame >= starts[:, None]) & (frame < (starts + widths)[:, None])
            masked = masked | inside.any(-1, keepdim=True)
        if self.feature_dropout > 0:
            masked = masked | (uniform_numbers(seeds + 2, 1, size) < self.feature_dropout)
        return torch.where(real, torch.where(masked, fill, changed), hidden).to(hidden.dtype)


def seed_of(*key) -> int:
    """A seed from a key's text (Python's own hash() differs between processes)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seeded_generator(*key) -> torch.Generator:
    """A CPU generator seeded by a key."""
    return torch.Generator().manual_seed(seed_of(*key))


def random_bits(seeds: torch.Tensor, *shape: int) -> torch.Tensor:
    """int64 (W, *shape) of random bits. Counted, not drawn one after the other as a generator does (SplitMix64, Steele
    et al. 2014, https://doi.org/10.1145/2660193.2660195): a row depends on its seed alone, and all are made at once."""
    count = torch.arange(1, math.prod(shape) + 1, device=seeds.device).view(1, *shape)
    # int64 overflows as uint64 does; its constants are those of SplitMix64 less 2 ** 64.
    bits = seeds.view(-1, *[1] * len(shape)) * -0x3B314601E57A13AD + count * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def uniform_numbers(seeds: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 (W, *shape) above 0 and below 1."""
    return ((random_bits(seeds, *shape) & 0x7FFFFF).float() + 0.5) / 0x800000


def normal_numbers(seeds: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 (W, *shape) of mean 0 and variance 1 (Box and Muller 1958)."""
    bits = random_bits(seeds, *shape)
    first, second = (((part & 0x7FFFFF).float() + 0.5) / 0x800000 for part in (bits, bits >> 32))
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


def speed_perturb(waveform: np.ndarray, factor: float, sampling_rate: int = 16000) -> np.ndarray:
    """Play (samples,) `factor` times faster, tempo and pitch together (Ko et al. 2015)."""
    if not 0.25 <= factor <= 4:
        raise ValueError(f"speed factor {factor} is not between 0.25 and 4.")
    ratio = Fraction(factor).limit_denominator(100)
    return resample(waveform, sampling_rate * ratio.numerator, sampling_rate * ratio.denominator)


def stretch_time(states: torch.Tensor, widest: float, *key) -> torch.Tensor:
    """(frames, size) -> (frames', size): tempo changed by a factor drawn from 1 - widest to 1 + widest, interpolated.

    Tempo perturbation (Ko et al. 2015) for encoder outputs that were cached once: every epoch speaks at another rate
    without running the encoder again. Equal for equal key.
    """
    factor = 1 + widest * (2 * torch.rand((), generator=seeded_generator("stretch", *key)).item() - 1)
    frames = max(1, round(len(states) * factor))
    return torch.nn.functional.interpolate(states.float().T[None], size=frames, mode="linear")[0].T
