"""Any speech recogniser of transformers (Whisper with its own decoder, a CTC model, ...) on the same clips: its words
themselves, or what an LLM answers that reads them."""

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, pipeline

from modeling_audiophi import resolve_component

from .conditions import as_text


class BaselineListener:
    """Transcripts of rows through transformers' `automatic-speech-recognition` pipeline.

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
    def words(self, clips: list) -> list[str]:
        """Waveforms at `sampling_rate` -> what is said in each."""
        if not clips:
            return []
        inputs = [{"raw": clip, "sampling_rate": self.sampling_rate} for clip in clips]
        too_long = max(len(clip) for clip in clips) > 30 * self.sampling_rate
        options = {"chunk_length_s": 30} if too_long else {}
        return [result["text"].strip() for result in self.pipe(inputs, batch_size=len(clips), **options)]

    def __call__(self, rows: list) -> list[dict]:
        said = iter(self.words([clip for _, clips in rows for clip in clips]))
        texts = [" ".join([next(said) for _ in clips]) for _, clips in rows]
        return [{"hypothesis": text, "hypothesis_align": None, "stopped": None} for text in texts]


class Cascade:
    """A recogniser's transcript, read by the model's LLM, which does not hear. `listener`: `loop.Listener`."""

    def __init__(self, recogniser: BaselineListener, listener):
        self.recogniser, self.listener = recogniser, listener
        self.sampling_rate = recogniser.sampling_rate

    def __call__(self, rows: list) -> list[dict]:
        heard = self.recogniser(rows)
        task = self.listener.task
        return self.listener(
            [
                (as_text(example, said["hypothesis"], task) if clips else example, [])
                for (example, clips), said in zip(rows, heard, strict=True)
            ]
        )
