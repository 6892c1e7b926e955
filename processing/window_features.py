"""What each family of feature extractors makes of a window of audio, behind one interface.

Families differ in how many samples a frame advances, which frames they count, and whether they fill a fixed window up.
Here each one says it once; the processor only cuts, counts and pads. Encoders of a fixed window (AST, CLAP,
LanguageBind) get whole windows, filled up as their makers did, and a mask that says which frames are real: filling
makes no token.
"""

import math

import numpy as np
import torch


class WindowFeatures:
    """Spectrograms of any length, frames before bins (w2v-BERT 2.0); also the base of the other families.

    `time_axis` is the axis of time in a batch of features, `grain` the frames that windows are a multiple of, and
    `overlap` the samples that a window reads beyond its share so that its last frames are complete.
    """

    time_axis = 1
    grain = 1
    overlap = 0

    def __init__(self, extractor):
        self.extractor = extractor
        self.key = extractor.model_input_names[0]

    @property
    def samples_per_frame(self) -> int:
        return getattr(self.extractor, "hop_length", 160) * getattr(self.extractor, "stride", 1)

    def num_frames(self, num_samples: int) -> int:
        """Real feature frames of a window of `num_samples` samples."""
        if hasattr(self.extractor, "num_frames"):  # extractors of this project state it
            return self.extractor.num_frames(num_samples)
        # Whole frames of 25 ms, as many as `stride` stacked, without a rest.
        stride, length = getattr(self.extractor, "stride", 1), self.extractor.sampling_rate // 40
        return max(0, (num_samples - length) // (self.samples_per_frame // stride) + 1) // stride

    def shortest_window(self, frames: int) -> int:
        """Samples below which a window is zero-padded, so that it has at least `frames` frames."""
        # A spectrogram frame is at most 25 ms long, and per-bin normalisation needs two of them.
        return (frames + 1) * self.samples_per_frame + self.extractor.sampling_rate // 40

    def extract(self, window: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One window (samples,), alone so that it does not depend on a batch → (features, mask (frames,) bool)."""
        output = self._call(window, padding=True, return_attention_mask=True)
        features, mask = output[self.key][0].float(), output.get("attention_mask")
        return features, torch.ones(len(features), dtype=torch.bool) if mask is None else mask[0].bool()

    def _call(self, window, **options):
        return self.extractor(window, sampling_rate=self.extractor.sampling_rate, return_tensors="pt", **options)


class WaveformFeatures(WindowFeatures):
    """The samples themselves (wav2vec 2.0 and its relatives)."""

    samples_per_frame = 1

    def num_frames(self, num_samples):
        return self.extractor.num_frames(num_samples) if hasattr(self.extractor, "num_frames") else num_samples

    def shortest_window(self, frames):
        return frames


class WhisperFeatures(WindowFeatures):
    """Whisper's centred spectrogram, bins before time, without its padding to 30 s.

    Its second convolution halves the frames, so windows are padded to an even number of them.
    """

    time_axis = -1
    grain = 2

    def num_frames(self, num_samples):
        return num_samples // self.extractor.hop_length

    def shortest_window(self, frames):
        return math.ceil(frames / 2) * 2 * self.samples_per_frame

    def extract(self, window):
        features = self._call(window, padding="do_not_pad", truncation=False)[self.key][0].float()
        return features, torch.ones(features.shape[-1], dtype=torch.bool)


class KaldiWindows(WindowFeatures):
    """Kaldi filterbanks, 25 ms every 10 ms, filled up to a fixed window (AST, LanguageBind).

    Only whole frames count. As a frame reads 15 ms beyond its share, windows overlap by that much, and together they
    are exactly the frames of the whole clip.
    """

    @property
    def samples_per_frame(self):
        return self.extractor.sampling_rate // 100

    @property
    def overlap(self):
        return self.extractor.sampling_rate // 40 - self.samples_per_frame

    def num_frames(self, num_samples):
        return max(0, (num_samples - self.overlap) // self.samples_per_frame)

    def shortest_window(self, frames):
        return frames * self.samples_per_frame + self.overlap

    def extract(self, window):
        features = self._call(window)[self.key][0].float()
        return features, torch.arange(len(features)) < self.num_frames(len(window))


class ClapWindows(WindowFeatures):
    """CLAP: 48 kHz, a frame every 10 ms, clips repeated and zero-padded to 10 s.

    Of the four spectrograms of a fused checkpoint the first is taken: the others are crops of what is longer than a
    window, which does not occur here.
    """

    def num_frames(self, num_samples):
        return math.ceil(num_samples / self.samples_per_frame)

    def shortest_window(self, frames):
        return frames * self.samples_per_frame

    def extract(self, window):
        features = self._call(window)[self.key][0, 0].float()
        return features, torch.arange(len(features)) < self.num_frames(len(window))


BY_NAME = {
    "WhisperFeatureExtractor": WhisperFeatures,
    "ASTFeatureExtractor": KaldiWindows,
    "LanguageBindAudioFeatureExtractor": KaldiWindows,
    "ClapFeatureExtractor": ClapWindows,
}


def window_features(extractor) -> WindowFeatures:
    """The family of a feature extractor, by its class's name or by what it returns."""
    default = WaveformFeatures if extractor.model_input_names[0] == "input_values" else WindowFeatures
    return BY_NAME.get(type(extractor).__name__, default)(extractor)


def window_lengths(features: WindowFeatures, num_samples: int, window_frames: int | None, shortest: int) -> list[int]:
    """Samples per window of a clip, padding and overlap included.

    Long clips are cut into windows of equal length, at most `window_frames` frames (None: no limit), not into full
    ones and a rest: a rest of a few frames has no context. No window is shorter than `shortest` samples.
    """
    step, overlap = features.samples_per_frame, features.overlap
    grain = step * features.grain
    # Of overlapping frames only whole ones count, so what is left over opens no further window.
    own = max(step, (num_samples - overlap) // step * step) if overlap else num_samples
    limit = own if window_frames is None else max(window_frames * step // grain, 1) * grain
    length = math.ceil(own / math.ceil(own / limit) / grain) * grain
    lengths = [min(length, own - start) for start in range(0, own, length)]
    if features.grain > 1:
        lengths = [math.ceil(samples / grain) * grain for samples in lengths]
    return [max(samples + overlap, shortest) for samples in lengths]
