"""Any speech recogniser of transformers (Whisper with its own decoder, a CTC model, ...) on the same clips."""

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, pipeline

from modeling_audiophi import resolve_component


class BaselineTranscriber:
    """Transcripts of a batch of waveforms through transformers' `automatic-speech-recognition` pipeline.

    `model` is a Hub id or folder. `stopped` is unknown (None): the pipeline does not say. Clips longer than 30 s are
    read in chunks of 30 s.
    """

    def __init__(self, model: str, device: str, dtype: torch.dtype = torch.float32):
        folder = resolve_component(model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:  # without one the pipeline refuses batches, although it pads no text
            tokenizer.pad_token = tokenizer.eos_token
        self.pipe = pipeline(
            "automatic-speech-recognition",
            model=folder,
            feature_extractor=AutoFeatureExtractor.from_pretrained(folder),
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
        )
        self.sampling_rate = self.pipe.feature_extractor.sampling_rate

    @torch.inference_mode()
    def __call__(self, clips: list) -> list[dict]:
        inputs = [{"raw": clip, "sampling_rate": self.sampling_rate} for clip in clips]
        too_long = max(len(clip) for clip in clips) > 30 * self.sampling_rate
        options = {"chunk_length_s": 30} if too_long else {}
        results = self.pipe(inputs, batch_size=len(clips), **options)
        return [{"hypothesis": result["text"].strip(), "hypothesis_align": None, "stopped": None} for result in results]
