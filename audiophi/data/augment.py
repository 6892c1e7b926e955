"""Augmentation of features and waveforms, reproducible from a seed.

The random numbers of each example come from (seed, *key), the key naming epoch and example, and not from a running
generator: a resumed run, another batch order or another number of workers then augments every example in the same way.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from processing.audio_io import resample


@dataclass
class Augment:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779) without time warping, and Gaussian noise, on (frames, size).

    Args:
        time_masks: masked stretches per 100 frames (at least one per clip when above 0).
        time_width: their largest length in frames; never more than a fifth of the clip.
        feature_masks: masked bands of neighbouring features; for spectrograms.
        feature_width: their largest width in features.
        feature_dropout: probability that a feature is masked over the whole clip; for encoder states, without bands.
        noise: standard deviation of the noise, in standard deviations of each frame, so that it is also the noise's
            size after the adapter's LayerNorm.
        seed: of the run.
    """

    time_masks: float = 0.0
    time_width: int = 15
    feature_masks: int = 0
    feature_width: int = 20
    feature_dropout: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __call__(self, features: torch.Tensor, *key) -> torch.Tensor:
        """A changed copy of (frames, size); equal for equal seed and key."""
        generator = seeded_generator(self.seed, *key)
        frames, size = features.shape
        features = features.float().clone()
        if self.noise > 0:
            noise = torch.randn(features.shape, generator=generator)
            features += self.noise * features.std(-1, correction=0, keepdim=True) * noise
        # Masked values become the clip's mean: in log-mel spectrograms 0 is loud, and encoder states have a few huge
        # features that are nearly constant, without which the adapter's LayerNorm would scale all others up.
        fill = features.mean(0)
        if self.time_masks > 0:
            for _ in range(max(1, round(self.time_masks * frames / 100))):
                start, stop = _span(frames, min(self.time_width, frames // 5), generator)
                features[start:stop] = fill
        for _ in range(self.feature_masks):
            start, stop = _span(size, min(self.feature_width, size), generator)
            features[:, start:stop] = fill[start:stop]
        if self.feature_dropout > 0:
            features = torch.where(torch.rand(size, generator=generator) < self.feature_dropout, fill, features)
        return features


def seeded_generator(*key) -> torch.Generator:
    """A CPU generator seeded with a hash of the key's text (Python's own hash() differs between processes)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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


def _span(length: int, widest: int, generator: torch.Generator) -> tuple[int, int]:
    width = int(torch.randint(0, widest + 1, (), generator=generator))
    start = int(torch.randint(0, length - width + 1, (), generator=generator))
    return start, start + width
