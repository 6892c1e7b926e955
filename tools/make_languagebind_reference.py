"""Make tests/reference/languagebind_audio.safetensors: what upstream's own LanguageBind modules compute.

    python tools/make_languagebind_reference.py [--output FILE] [--environment DIR]

The modules are in PyPI's `languagebind` wheel, which pins transformers<5. They are installed with an old transformers
in a folder of their own (DIR, default: a temporary one) that precedes the present environment in a child process;
nothing is installed here. Weights are small random numbers (ViT of 3 layers of width 32, windows of 28 mel bins x 84
frames), stored beside the outputs, as upstream names them. Also stored: a waveform, and upstream's spectrograms of its
beginning (shorter than a window: tiled; a whole window) at the released sizes, every 12th value.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference" / "languagebind_audio.safetensors"
# Versions that work together; from 4.46 on transformers refuses pictures that are not square, as the spectrograms are.
PACKAGES = ["languagebind==0.1.0", "transformers==4.45.2", "tokenizers==0.20.3", "huggingface_hub==0.36.2", "einops"]

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"patch_size": 14, "hidden_act": "gelu", "num_mel_bins": 28, "target_length": 84, "lora_r": 0}
RELEASED = {"num_mel_bins": 112, "target_length": 1036}
NORMALISATION = {"audio_mean": -4.2677393, "audio_std": 4.5689974, "audio_sample_rate": 16_000}
SHORT, WHOLE, SAMPLED = 20_000, 166_000, 12  # samples of the clips; every 12th value of the spectrograms is kept


def install(folder: Path) -> None:
    """The old packages into `folder`. RuntimeError with pip's last words."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(PACKAGES)}: {done.stderr.strip()[-600:]}")


def compute(environment: Path, output: Path) -> None:
    """In a process of its own: upstream's outputs, with `environment` before everything else on the path."""
    sys.path.insert(0, str(environment))
    import importlib.machinery
    import types
    import warnings

    # Imported by the wheel, used by its picture and video parts only.
    for name in ("cv2", "torchvision", "torchvision.transforms"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    package = types.ModuleType("languagebind")  # its own __init__ imports the video part, which needs decord
    package.__path__ = [str(environment / "languagebind")]
    sys.modules["languagebind"] = package

    import torch
    from safetensors.torch import save_file
    from transformers import __version__

    if not __version__.startswith("4."):
        raise RuntimeError(f"transformers {__version__} was imported, not the one in {environment}")
    warnings.simplefilter("ignore")
    from languagebind.audio.configuration_audio import CLIPVisionConfig, LanguageBindAudioConfig
    from languagebind.audio.modeling_audio import LanguageBindAudio
    from languagebind.audio.processing_audio import AudioTransform

    torch.manual_seed(0)
    vision = {**SIZES, **NORMALISATION, "image_size": 224, "add_time_attn": False}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20, "max_position_embeddings": 8}
    config = LanguageBindAudioConfig(text_config=text, vision_config=vision, projection_dim=8)
    config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = LanguageBindAudio(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, SIZES["num_mel_bins"], SIZES["target_length"], generator=generator)
    with torch.no_grad():
        states = model.vision_model(features[:, None].expand(-1, 3, -1, -1), output_hidden_states=True).hidden_states
    tensors = {f"weights.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"states.{index}": state for index, state in enumerate(states)}
    tensors["features"] = features.transpose(1, 2)

    time = torch.arange(WHOLE) / 16_000
    waveform = 0.3 * torch.sin(2 * torch.pi * 220 * time * (1 + 0.2 * time)) + 0.05
    waveform += 0.1 * torch.randn(WHOLE, generator=generator) * torch.sin(3 * time).abs()
    waveform = (waveform * 128).round().clamp(-128, 127) / 128  # 8 bits are enough, and the file stays small
    transform = AudioTransform(CLIPVisionConfig(**vision | RELEASED))
    for name, samples in (("short", SHORT), ("whole", WHOLE)):
        picture = transform((waveform[None, :samples].clone(), 16_000))
        if not (torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])):
            raise RuntimeError("upstream's channels differ: the clip is longer than a window")
        tensors[f"spectrogram.{name}"] = picture[0].T.flatten()[::SAMPLED]
    tensors["waveform"] = (waveform * 128).to(torch.int8)
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, output, {"made_by": " ".join(PACKAGES)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REFERENCE)
    parser.add_argument("--environment", type=Path, help="folder for the old packages; installed there if it is empty")
    parser.add_argument("--compute", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compute:
        compute(args.environment, args.output)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = (args.environment or Path(scratch)).resolve()
        if not (environment / "languagebind").is_dir():
            try:
                install(environment)
            except RuntimeError as error:
                print(f"make_languagebind_reference.py: {error}", file=sys.stderr)
                return 1
        command = [sys.executable, __file__, "--compute", "--environment", str(environment), "--output"]
        return subprocess.run([*command, str(args.output.resolve())]).returncode


if __name__ == "__main__":
    sys.exit(main())
