"""Reference tensors for XEUS, computed by ESPnet's own modules with random weights.

    python tools/make_xeus_reference.py                     remakes what lies in tests/reference
    python tools/make_xeus_reference.py --full-width DIR    the released widths with two blocks (about 300 MB)

ESPnet 202511 comes from PyPI's source distribution, with typeguard and humanfriendly, into a temporary folder (or
`--espnet DIR`, kept for the next call); nothing is installed and none of it is needed otherwise.

`xeus_tiny.safetensors` holds `weights.<ESPnet's name>`, a padded batch of clips of different lengths (`speech`,
`lengths`), what ESPnet makes of it (`hidden.<block>` before `after_norm`, `output` after it, `output_lengths`), and
in its metadata the sizes under XeusConfig's names. `xeus_keys.json` lists the released model's tensors and shapes.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ESPNET = "202511"
REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "reference"

RELEASED = {
    "conv_dim": [512] * 7,
    "hidden_size": 1024,
    "num_hidden_layers": 19,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "cgmlp_size": 4096,
}
TINY = {
    "conv_dim": [8] * 7,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "cgmlp_size": 32,
}
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


class EspnetUnavailable(RuntimeError):
    """PyPI does not give ESPnet."""


def get_espnet(folder):
    """Paths for sys.path with ESPnet and what its modules import; downloads into `folder` what is not there.

    Raises EspnetUnavailable with pip's last words.
    """
    folder = Path(folder)
    source, extras = folder / f"espnet-{ESPNET}", folder / "extras"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    steps = [
        (extras, [*pip, "install", "--no-deps", "--target", str(extras), "typeguard", "humanfriendly"]),
        (
            source,
            [*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"espnet=={ESPNET}"],
        ),
    ]
    for made, command in steps:
        if made.is_dir():
            continue
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EspnetUnavailable(f"pip could not get espnet=={ESPNET} from PyPI: {done.stderr.strip()[-400:]}")
        if made == source:
            with tarfile.open(folder / f"espnet-{ESPNET}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
    return [str(source), str(extras)]


class Reference(torch.nn.Module):
    """ESPnet's frontend, preencoder and encoder, put together as its SSL task does, with XEUS's settings."""

    def __init__(self, sizes):
        from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
        from espnet2.asr.frontend.cnn import CNNFrontend
        from espnet2.asr.preencoder.linear import LinearProjection

        super().__init__()
        hidden = sizes["hidden_size"]
        self.frontend = CNNFrontend(
            norm_mode="layer_norm",
            conv_mode="standard",
            bias=True,
            shapes=list(zip(sizes["conv_dim"], KERNELS, STRIDES, strict=True)),
            normalize_audio=True,
        )
        self.preencoder = LinearProjection(sizes["conv_dim"][-1], hidden)
        self.encoder = EBranchformerEncoder(
            hidden,
            output_size=hidden,
            attention_heads=sizes["num_attention_heads"],
            attention_layer_type="selfattn",
            pos_enc_layer_type="conv",
            cgmlp_linear_units=sizes["cgmlp_size"],
            cgmlp_conv_kernel=31,
            num_blocks=sizes["num_hidden_layers"],
            dropout_rate=0.1,
            positional_dropout_rate=0.1,
            attention_dropout_rate=0.1,
            input_layer=None,
            use_ffn=True,
            macaron_ffn=True,
            linear_units=sizes["intermediate_size"],
            merge_conv_kernel=31,
            use_flash_attn=False,
        )

    @torch.no_grad()
    def forward(self, speech, lengths):
        features, lengths = self.frontend(speech, lengths)
        features, lengths = self.preencoder(features, lengths)
        (output, states), lengths, _ = self.encoder(features, lengths, return_all_hs=True)
        return output, states, lengths


@torch.no_grad()
def randomize(model, seed=0):
    """Weights of a trained model's scale, norms and biases included, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("original0"):
            parameter.copy_(2 + noise.abs())
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(noise * 1.5 / fan_in**0.5)


def random_speech(lengths, seed=1):
    """(B, S) float32: noise of another loudness and offset per clip, zero beyond each clip's length."""
    generator = torch.Generator().manual_seed(seed)
    speech = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        speech[row, :length] = 0.1 * (row + 1) * torch.randn(length, generator=generator) + 0.02 * row
    return speech


def write_reference(path, sizes, lengths):
    """Write the safetensors described above for clips of `lengths` samples."""
    # With more threads the weight norm's long sums are taken in another order, which shows at 2e-5.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Reference(sizes).eval()
    randomize(model)
    lengths = torch.tensor(lengths)
    speech = random_speech(lengths.tolist())
    output, states, output_lengths = model(speech, lengths)
    tensors = {f"weights.{name}": value.contiguous() for name, value in model.state_dict().items()}
    tensors |= {f"hidden.{index}": state.contiguous() for index, state in enumerate(states)}
    tensors |= {"speech": speech, "lengths": lengths, "output": output, "output_lengths": output_lengths}
    metadata = {"espnet": ESPNET, "sizes": json.dumps(sizes), "torch": torch.__version__}
    save_file(tensors, path, metadata)


def write_keys(path):
    """Write the names and shapes of the released model's tensors, one a line."""
    with torch.device("meta"):
        state = Reference(RELEASED).state_dict()
    lines = [f"{json.dumps(name)}: {json.dumps(list(tensor.shape))}" for name, tensor in state.items()]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REFERENCE)
    parser.add_argument("--full-width", type=Path, metavar="DIR", help="also DIR/xeus_full_width.safetensors")
    parser.add_argument("--espnet", type=Path, metavar="DIR", help="folder that keeps ESPnet for the next call")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            sys.path[:0] = get_espnet(args.espnet or scratch)
        except EspnetUnavailable as error:
            print(f"make_xeus_reference.py: {error}", file=sys.stderr)
            return 3
        args.output.mkdir(parents=True, exist_ok=True)
        write_reference(args.output / "xeus_tiny.safetensors", TINY, [6400, 4111, 2500])
        write_keys(args.output / "xeus_keys.json")
        if args.full_width:
            args.full_width.mkdir(parents=True, exist_ok=True)
            sizes = {**RELEASED, "num_hidden_layers": 2}
            write_reference(args.full_width / "xeus_full_width.safetensors", sizes, [6400, 4111, 2500])
    return 0


if __name__ == "__main__":
    sys.exit(main())
