"""The full-size proof: XEUS or LanguageBind-Audio + mlp2x_gelu + Phi-2 build, train a step and generate.

    python benchmarks/full_size.py [--encoder xeus|languagebind] [--seconds 8] [--output results.json] [--scale tiny]

Random weights, bfloat16 (what is trained: float32, as bfloat16 would round its updates away), as `frozen_dtype:
bfloat16` keeps them, on the CPU; adapter,
readout, encoder layer and generation are those of recipes/phi2_*.yaml. Each encoder runs in a process of its own:
build, one `align` and one `lm` step of the adapter (encoder and LLM frozen), a few tokens. Printed and written: wall
seconds and peak resident memory (VmHWM, Linux only) of each phase, beside what audiophi/training/memory.py predicts
from the configs on top of the process's memory before the build. `--scale tiny` runs the same code in seconds.

Phi-2's tokenizer is not needed: a byte-level one is made here, whose ids are rows of Phi-2's table like any other.
Nothing is learned about quality: the words that come out are noise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from audiophi.data.alignment_text import AlignmentTokenizer  # noqa: E402
from audiophi.data.collator import AudioPhiCollator  # noqa: E402
from audiophi.tasks import TASKS  # noqa: E402
from audiophi.training.build import apply_tuning, set_generation  # noqa: E402
from audiophi.training.configs import recipe_config, skeleton  # noqa: E402
from audiophi.training.memory import Load, Memory, generation_memory, sizes, training_memory  # noqa: E402
from audiophi.training.plan import parameter_table  # noqa: E402
from audiophi.training.recipe import Alignment, Stage, load_recipe  # noqa: E402
from measuring import training_items  # noqa: E402
from modeling_audiophi import AudioPhiForConditionalGeneration, LanguageBindAudioConfig, XeusConfig  # noqa: E402
from modeling_audiophi.components_audiophi import is_own_key, text_generation_config  # noqa: E402
from modeling_audiophi.spelling_audiophi import spell  # noqa: E402
from processing import AudioPhiProcessor  # noqa: E402
from processing.feature_extraction_languagebind_audio import LanguageBindAudioFeatureExtractor  # noqa: E402

RECIPES = {"xeus": "phi2_xeus_librispeech", "languagebind": "phi2_languagebind_clotho"}
# Parameters of the released models. A build of another size is no proof of anything.
PARAMETERS = {"xeus": 574_121_600, "languagebind": 303_523_840, "phi": 2_779_683_840}
ALIGN_VOCAB = {"full": 20_000, "tiny": 480}
WORDS = "the quick brown fox jumps over the lazy dog and runs away from the hungry bear"
PHASES = ("build", "align", "lm", "generate")


def tiny_configs(encoder: str) -> dict:
    """The same kinds of model with a few thousand parameters."""
    text = PhiConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    if encoder == "xeus":
        audio = XeusConfig(
            **shape,
            num_hidden_layers=2,
            conv_dim=[16] * 7,
            cgmlp_size=64,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    else:
        audio = LanguageBindAudioConfig(**shape, num_hidden_layers=3, num_mel_bins=28, target_length=84)
    return {"audio_config": audio, "text_config": text}


def transcript(seconds: float) -> str:
    """As many words as speech of that length has: they must fit into the alignment's frames, or CTC has no loss."""
    words = WORDS.split()
    return " ".join(words[index % len(words)] for index in range(max(1, round(2.5 * seconds))))


def make_recipe(encoder: str):
    """The recipe; with an alignment head also where it has none (captions), so that both losses can be run."""
    recipe = load_recipe(ROOT / "recipes" / f"{RECIPES[encoder]}.yaml")
    recipe.alignment = recipe.alignment or Alignment()
    return recipe


def decoded_task(recipe) -> str:
    """The task whose decoding the recipe sets."""
    return next(name for name in recipe.generation if name in TASKS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE to which each of this script's own words is a token; Phi-2's end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" " + WORDS, "Instruct: Transcribe the speech.\nOutput:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_processor(config, recipe, folder: Path) -> AudioPhiProcessor:
    """A processor as from the components' own folders, written to `folder` without weights; config takes over its
    placeholder."""
    audio, text = config.audio_config, config.text_config
    if audio.model_type == "xeus":
        extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    else:
        extractor = LanguageBindAudioFeatureExtractor(
            feature_size=audio.num_mel_bins, target_length=audio.target_length
        )
    for name, parts in (("audio", (audio, extractor)), ("text", (text, make_tokenizer()))):
        for part in parts:
            part.save_pretrained(folder / name)
    processor = AudioPhiProcessor.from_components(
        str(folder / "audio"), str(folder / "text"), chat_template=recipe.components.chat_template
    )
    config.audio_token_id = processor.audio_token_id
    return processor.match_model(config)


def random_weights(config) -> dict[str, torch.Tensor]:
    """bfloat16 weights of encoder and LLM under the model's names: matrices uniform with standard deviation 0.02, norms
    one, biases zero. Made in place: there never is a float32 copy."""
    empty = skeleton(config)
    tied = set(empty.all_tied_weights_keys)
    state = {}
    for name, tensor in empty.state_dict().items():
        if name in tied or is_own_key(name, config):
            continue
        value = torch.empty(tensor.shape, dtype=torch.bfloat16)
        if tensor.dim() > 1:
            value.uniform_(-0.035, 0.035)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        state[name] = value
    return state


def build_model(config, recipe, align_ids: list[int], folder: Path) -> AudioPhiForConditionalGeneration:
    """The model: encoder and LLM in bfloat16, new parts in float32, generation as the recipe wants it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # new parts are meant to be missing
    model = AudioPhiForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=random_weights(config), dtype=torch.bfloat16
    )
    logging.set_verbosity(verbosity)
    for part in (model.model.multi_modal_projector, model.model.alignment, model.model.readout):
        part.float()
    spelling = config.align_spelling
    model.model.match_embeddings(align_ids, make_spellings(align_ids, spelling) if spelling else None)
    model.generation_config = text_generation_config(folder / "text", config.text_config, config.audio_token_id)
    set_generation(model, recipe, [decoded_task(recipe)])
    with torch.no_grad():
        # An untrained head may hear blanks only; the collapse then gives the LLM nothing, and the adapter no gradient.
        model.model.alignment.bias[0] = -10
    return model


def make_spellings(align_ids: list[int], sizes: dict) -> list[list[int]]:
    return [spell(f" word{index}", sizes["buckets"]) for index in align_ids]


def make_config(encoder: str, recipe, scale: str):
    """Config and the ids of its alignment head: as many as 960 hours of transcripts have tokens, roughly."""
    align_ids = list(range(ALIGN_VOCAB[scale]))
    config = recipe_config(recipe, len(align_ids), **(tiny_configs(encoder) if scale == "tiny" else {}))
    if config.align_spelling:
        config.align_spelling["entries"] = sum(map(len, make_spellings(align_ids, config.align_spelling)))
    return config, align_ids


def memory_of_process(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {what}")


def forget_peak() -> None:
    """Starts VmHWM again at the present size; where the kernel does not allow it, later phases repeat the highest."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"peaks are those since the start: {error}", file=sys.stderr)


def train_step(model, stage: Stage, batch: dict) -> float:
    """One AdamW step of what the stage trains -> loss. Raises RuntimeError when nothing was learned."""
    apply_tuning(model, stage)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The bottom of a recipe's warm-up: a first step of 1e-3 through 4,096 inputs turns every frame into a blank.
    # Without decay, which would change weights that get no gradient.
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6, weight_decay=0.0)
    watched = trained["model.multi_modal_projector.mlp.2.weight"]
    before = watched.detach().clone()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()
    if not torch.isfinite(loss) or torch.equal(before, watched):
        raise RuntimeError(f"{stage.name}: loss {loss.item()}, the adapter did not change")
    return loss.item()


def predictions(model, stages: dict[str, Stage], load: Load, new_tokens: int, beams: int) -> dict[str, Memory]:
    """What each phase should need. Building ends with the scale of the LLM's table, in two float32 copies."""
    steps = {}
    for name, stage in stages.items():
        apply_tuning(model, stage)
        steps[name] = training_memory(model, stage, load)
    generated = generation_memory(model, load, new_tokens, beams)
    table = model.get_input_embeddings().weight.numel()
    built = Memory(weights=generated.weights, llm=2 * 4 * table)
    return {"build": built, **steps, "generate": generated}


def prove(encoder: str, scale: str, seconds: float, new_tokens: int) -> dict:
    """All phases in this process -> what was measured, in seconds and bytes."""
    torch.manual_seed(0)
    recipe = make_recipe(encoder)
    config, align_ids = make_config(encoder, recipe, scale)
    found = {"encoder": encoder, "scale": scale, "audio_seconds": seconds, "phases": {}}
    with tempfile.TemporaryDirectory() as folder:
        processor = make_processor(config, recipe, Path(folder))
        wave = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
        items = training_items([(wave, transcript(seconds))], processor)
        tokenizer = AlignmentTokenizer(processor.tokenizer)
        batches = {m: AudioPhiCollator(processor, mode=m, align_tokenizer=tokenizer)(items) for m in ("align", "lm")}
        found["before"] = memory_of_process("VmRSS")

        def measured(phase, work):
            forget_peak()
            start = time.perf_counter()
            result = work()
            spent = time.perf_counter() - start
            found["phases"][phase] = {"seconds": spent, "peak": memory_of_process("VmHWM")}
            return result

        model = measured("build", lambda: build_model(config, recipe, align_ids, Path(folder)))
        found["parameters"] = {part: count for part, count, _ in parameter_table(model)}
        found["stored_bytes"] = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        if scale == "full":
            real = (found["parameters"]["encoder"], found["parameters"]["llm"])
            if real != (PARAMETERS[encoder], PARAMETERS["phi"]):
                raise RuntimeError(f"encoder and LLM have {real} parameters, not those of the released models")
        stages = {name: Stage(name=name, loss=name, steps=1, batch_size=1) for name in ("align", "lm")}
        for name, stage in stages.items():
            loss = measured(name, lambda stage=stage, name=name: train_step(model, stage, batches[name]))
            found["phases"][name]["loss"] = loss
        # The words to be labelled come last in the training prompt.
        labelled = int((batches["lm"]["labels"] != -100).sum())
        end = int((batches["lm"]["labels"] != -100).nonzero()[0, 1])
        prompt = {key: value for key, value in batches["lm"].items() if key != "labels"}
        prompt |= {key: prompt[key][:, :end] for key in ("input_ids", "attention_mask")}
        task = decoded_task(recipe)
        options = {"task": task, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        output = measured("generate", lambda: model.generate(**prompt, **options))
    found["generated_tokens"] = output.shape[1] - end
    # In the place of the placeholder, which is one of the prompt's tokens.
    audio_tokens = config.num_audio_tokens(processor.frame_counts(len(wave)))
    found["positions"] = batches["lm"]["input_ids"].shape[1] - 1 + audio_tokens
    beams = model.generation_config.tasks[task].get("num_beams", 1)
    load = Load(clips=1, seconds=seconds, words=labelled, prompt=0)
    load = Load(clips=1, seconds=seconds, words=labelled, prompt=found["positions"] - sizes(config, load).text)
    for phase, memory in predictions(model, stages, load, new_tokens, beams).items():
        found["phases"][phase]["predicted"] = found["before"] + memory.total
        found["phases"][phase]["predicted_parts"] = memory.gigabytes()
    return found


def table(results: list[dict]) -> str:
    """Markdown: a row per encoder and phase."""
    lines = [
        "| encoder | phase | wall seconds | peak memory, GiB | predicted | measured / predicted |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for phase in PHASES:
            row = result["phases"][phase]
            ratio = row["peak"] / row["predicted"]
            lines.append(
                f"| {result['encoder']} | {phase} | {row['seconds']:.1f} | {row['peak'] / 2**30:.2f} | "
                f"{row['predicted'] / 2**30:.2f} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=RECIPES, help="default: both, one after the other")
    parser.add_argument("--seconds", type=float, default=8.0, help="of audio (noise)")
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--scale", choices=ALIGN_VOCAB, default="full")
    parser.add_argument("--output", type=Path, help="JSON of what is printed and more")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        found = prove(options.encoder, options.scale, options.seconds, options.new_tokens)
        options.child.write_text(json.dumps(found))
        return 0
    results = []
    for encoder in [options.encoder] if options.encoder else RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--encoder", encoder, "--seconds", str(options.seconds)]
            command += ["--new_tokens", str(options.new_tokens), "--scale", options.scale]
            done = subprocess.run([*command, "--child", f"{folder}/found.json"])
            if done.returncode:
                # A process that the kernel ends for memory says nothing itself.
                print(f"{encoder}: the process ended with {done.returncode}", file=sys.stderr)
                return 1
            results.append(json.loads(Path(folder, "found.json").read_text()))
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        counts = ", ".join(f"{part} {count:,}" for part, count in result["parameters"].items())
        print(
            f"{result['encoder']}: {counts} parameters; {result['audio_seconds']:g} s of audio, "
            f"{result['positions']} positions; before the build {result['before'] / 2**30:.2f} GiB"
        )
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
