"""LanguageBind-Audio's spectrograms: Kaldi filterbanks by torchaudio, tiled to windows of 10.36 s, no random crops.

Upstream (https://github.com/PKU-YuanGroup/LanguageBind, languagebind/audio/processing_audio.py, MIT) takes three random
crops of a clip longer than a window, one per colour channel. Here a long clip is cut into windows of equal length, in
order and the same every time; the model copies a window to its three channels.
"""

import numpy as np
import torch
from torchaudio.compliance.kaldi import fbank
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING


class LanguageBindAudioFeatureExtractor(FeatureExtractionMixin):
    """Waveform -> windows of normalised log-mel filterbanks, 25 ms every 10 ms.

    Args:
        feature_size: mel bins.
        target_length: frames of a window; shorter ones repeat themselves up to it.
        sampling_rate: Hz.
        mean, std: the features are `(x - mean) / (2 * std)`.
    """

    model_input_names = ["input_features", "attention_mask"]
    _auto_class = "AutoFeatureExtractor"  # its file is saved with it

    def __init__(
        self,
        feature_size=112,
        target_length=1036,
        sampling_rate=16_000,
        mean=-4.2677393,
        std=4.5689974,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.feature_size, self.target_length, self.sampling_rate = feature_size, target_length, sampling_rate
        self.mean, self.std = mean, std

    def filterbanks(self, waveform: np.ndarray) -> torch.Tensor:
        """(samples,) -> (frames, feature_size), before normalisation. ValueError for less than one frame (25 ms)."""
        shortest = self.sampling_rate // 40
        if waveform.ndim != 1 or len(waveform) < shortest:
            raise ValueError(
                f"LanguageBind-Audio takes mono audio of at least {shortest} samples (25 ms), got an array of shape "
                f"{waveform.shape}: mix it down, or pad it with zeros"
            )
        waveform = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))[None]
        return fbank(
            waveform - waveform.mean(),
            htk_compat=True,
            sample_frequency=self.sampling_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.feature_size,
            dither=0.0,
            frame_length=25,
            frame_shift=10,
        )

    def __call__(self, raw_speech, sampling_rate=None, return_tensors="pt", **kwargs) -> BatchFeature:
        """One clip (samples,) or a list of clips.

        Returns `input_features` (windows, target_length, feature_size), `attention_mask` (windows, target_length), 1
        where a frame is not a repetition, and `num_windows` (clips,): how many rows each clip has. Clips longer than a
        window are cut into windows of equal length. Raises ValueError for another sampling rate or too little audio.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"LanguageBind-Audio takes audio at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample it first "
                "(AudioPhiProcessor does)"
            )
        several = isinstance(raw_speech, (list, tuple)) and len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        rows, masks, counts = [], [], []
        for clip in raw_speech if several else [raw_speech]:
            mel = self.filterbanks(np.asarray(clip, dtype=np.float32))
            count = -(-len(mel) // self.target_length)
            counts.append(count)
            for window in mel.split(-(-len(mel) // count)):
                repeats = self.target_length // len(window) + 1
                rows.append((window.repeat(repeats, 1)[: self.target_length] - self.mean) / (2 * self.std))
                masks.append(torch.arange(self.target_length) < len(window))
        data = {
            "input_features": torch.stack(rows),
            "attention_mask": torch.stack(masks).long(),
            "num_windows": torch.tensor(counts),
        }
        return BatchFeature({key: value.numpy() for key, value in data.items()}, tensor_type=return_tensors)


# transformers finds extractors of its own by name and others among what is registered; the model's config cannot be
# the key, as it ships in another folder.
FEATURE_EXTRACTOR_MAPPING.register(LanguageBindAudioFeatureExtractor, LanguageBindAudioFeatureExtractor, exist_ok=True)
