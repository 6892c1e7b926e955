"""Makes tests/fixtures/hub_repo_v1: a slim repository as it is saved today, which must load forever.

    python tools/make_hub_fixture.py tests/fixtures/hub_repo_v1

writes that folder, the tiny components it names beside it (`..._components`), and what it said about a fixed clip
(`....json`). Almost all of it is the code that ships: weights are as few as they can be, and the vocabulary is bytes. A
later format gets a fixture of its own; this one stays.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_audiophi import AudioPhiForConditionalGeneration  # noqa: E402
from processing import AudioPhiProcessor  # noqa: E402
from tests.conftest import (  # noqa: E402
    GENERATION_TASKS,
    PROCESSOR_TASKS,
    prompts,
    random_like_trained,
    tiny_tokenizer,
)

SECONDS = 1.1
WIDTH, HEADS = 8, 2
BYTES = 262  # as vocabulary: all bytes and the special tokens, nothing merged


def clip():
    """The `waveform` fixture of tests/conftest.py with seed 0."""
    time = np.arange(int(SECONDS * 16_000)) / 16_000
    noise = np.random.default_rng(0).normal(size=len(time))
    return (0.1 * noise + 0.3 * np.sin(2 * np.pi * 200 * time * (1 + time))).astype(np.float32)


def make_components(folder):
    tokenizer = tiny_tokenizer(BYTES)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    text = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **sizes, **special
    )
    random_like_trained(LlamaForCausalLM(text)).save_pretrained(folder / "acme--tiny-llm")
    tokenizer.save_pretrained(folder / "acme--tiny-llm")
    audio = WhisperConfig(
        vocab_size=8, num_mel_bins=WIDTH, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH,
        max_source_positions=100, max_target_positions=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    random_like_trained(WhisperForConditionalGeneration(audio)).save_pretrained(folder / "acme--tiny-whisper")
    WhisperFeatureExtractor(feature_size=WIDTH, chunk_length=2).save_pretrained(folder / "acme--tiny-whisper")


def make_repository(folder):
    """Every kind of tensor that a slim checkpoint holds: adapter, alignment with spelling, readout, LoRA."""
    processor = AudioPhiProcessor.from_components("acme/tiny-whisper", "acme/tiny-llm")
    torch.manual_seed(0)
    model = AudioPhiForConditionalGeneration.from_components(
        "acme/tiny-whisper",
        "acme/tiny-llm",
        adapter={"type": "transformer", "hidden_size": WIDTH, "kernel_size": 3, "num_layers": 1, "num_heads": HEADS},
        audio_token_id=processor.audio_token_id,
        readout="mixed",
        encoder_layer="mix",
        align_vocab_ids=range(10, 60),
        align_spelling={"texts": [f"word{number}" for number in range(50)], "buckets": 16, "size": 4},
        lora={"text": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}},
    ).eval()
    processor.match_model(model.config)
    processor.tasks, model.generation_config.tasks = PROCESSOR_TASKS, GENERATION_TASKS
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.slim_state_dict():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = prompts(processor, [[clip()]])
    with torch.no_grad():
        # A tiny random model would say the same token again and again.
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, no_repeat_ngram_size=1)
        logits = model(**inputs).logits[0, -1, :8]
    return {"seconds": SECONDS, "ids": output[0, inputs["input_ids"].shape[1] :].tolist(), "logits": logits.tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist")
    folder = parser.parse_args().folder
    components = folder.with_name(folder.name + "_components")
    if folder.exists():
        parser.error(f"{folder} exists: a frozen repository is not made again")
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(AUDIOPHI_COMPONENTS=str(components), HOME=home)
        make_components(components)
        expected = make_repository(folder)
    folder.with_name(folder.name + ".json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
