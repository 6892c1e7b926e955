"""Transcribe audio files.

    python transcribe.py FILE.wav [FILE ...] [--model checkpoints/audiophi-tiny] [--ask "What is said?"]

or in Python:

    from transcribe import load
    transcribe = load("checkpoints/audiophi-tiny")
    print(transcribe("speech.wav"))
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.scoring import AudioPhiTranscriber
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from processing.prompts import TRANSCRIBE, TRANSCRIBE_PARAPHRASES

DEFAULT_MODEL = str(Path(__file__).resolve().parent / "checkpoints" / "audiophi-tiny")


def load(
    model: str = DEFAULT_MODEL, instruction: str = TRANSCRIBE, max_new_tokens: int = 512, device: str | None = None
) -> Callable[..., str]:
    """A function from audio to text.

    The function takes a path, URL, bytes, or an array with its rate as second argument, and raises AudioError (a
    ValueError) for audio that cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AudioPhiProcessor.from_pretrained(model)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(model, dtype=torch.float32).to(device)
    # The alignment head knows transcripts only: it has no say in an answer to another question.
    ctc_weight = None if instruction in TRANSCRIBE_PARAPHRASES else 0.0
    read = AudioPhiTranscriber(loaded, processor, instruction, max_new_tokens, ctc_weight, with_alignment=False)

    def transcribe(audio, sampling_rate: int | None = None) -> str:
        return read([processor.load_audio(audio, sampling_rate)])[0]["hypothesis"]

    return transcribe


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint: folder or Hub id")
    parser.add_argument("--ask", default=TRANSCRIBE, help=f"instruction; default: {TRANSCRIBE!r}")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    try:
        transcribe = load(args.model, args.ask, args.max_new_tokens, args.device)
    except (ValueError, OSError) as error:
        print(f"transcribe.py: {error}", file=sys.stderr)
        return 1
    failed = False
    for file in args.files:
        try:
            text = transcribe(file)
        except ValueError as error:
            print(f"transcribe.py: {error}", file=sys.stderr)
            failed = True
            continue
        print(text if len(args.files) == 1 else f"{file}: {text}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
