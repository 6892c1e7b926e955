"""What the benchmarks share: speech of a wanted length, models of one size, interleaved timing, a results file.

Every script of this folder that `make bench` runs is a function `measure(options, save)`, which calls `save(section)`
whenever there is something new to keep, and a function `table(section)`; `script` makes a command of them.
"""

import argparse
import copy
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHECKPOINT = ROOT / "checkpoints" / "audiophi-tiny"
SPEECH = ROOT / "data" / "synthetic_speech"
RATE = 16_000
PAUSE = 0.3  # seconds between joined clips
WEIGHTS = ("auto", "checkpoint", "random", "tiny")
# Embeddings per second of speech that checkpoints/audiophi-tiny hands to the LLM: `kept_per_second` of 24 clips (200 s)
# of two LibriSpeech dev-clean speakers that it was not trained on.
KEPT_PER_SECOND = 2.9
VOCAB_IDS, NGRAMS, STARTS = (f"model.alignment.{name}" for name in ("vocab_ids", "spelling.ngrams", "spelling.starts"))


# ---- audio ---------------------------------------------------------------------------------------------------------


@functools.cache
def spoken_clips() -> list[tuple[np.ndarray, str]]:
    """The development clips of this repository's synthetic speech: (waveform at 16 kHz, normalised transcript)."""
    from audiophi.data.alignment_text import normalise_transcript
    from audiophi.data.datasets import load_examples

    rows = load_examples({"path": str(SPEECH), "split": "dev"})
    return [(row.clips[0].read(row.id, RATE), normalise_transcript(row.reference)) for row in rows]


def joined_speech(count: int, seconds: float) -> list[tuple[np.ndarray, str]]:
    """`count` clips of exactly `seconds`, each of other sentences joined by short pauses, and their words. Of a
    sentence that is cut, as large a part of the words is kept as of its samples."""
    samples, spoken, made, number = round(seconds * RATE), spoken_clips(), [], 0
    for _ in range(count):
        parts, words, length = [], [], 0
        while length < samples:
            wave, text = spoken[number % len(spoken)]
            number += 1
            share = min(1.0, (samples - length) / len(wave))
            said = text.split()
            words += said[: max(1, round(share * len(said)))]
            parts += [wave, np.zeros(round(PAUSE * RATE), np.float32)]
            length += len(wave) + round(PAUSE * RATE)
        made.append((np.concatenate(parts)[:samples].astype(np.float32), " ".join(words)))
    return made


def training_items(clips, processor) -> list[dict]:
    """Clips (waveform, words) as the collator takes them, each with the request for its words."""
    from audiophi.data.collator import training_item
    from audiophi.data.example import Clip, Example
    from audiophi.tasks import default_task

    task, items = default_task(), []
    for number, (wave, words) in enumerate(clips):
        clip = Clip({"array": wave, "sampling_rate": RATE}, transcript=words)
        example = Example(task.name, number, str(number), "benchmark", clips=(clip,), references=(words,))
        items.append(training_item(example, [processor.encode_audio(wave, RATE)], wordings=task.wordings))
    return items


# ---- models --------------------------------------------------------------------------------------------------------


def components_are_here() -> bool:
    """Whether the checkpoint's base components lie on this machine; nothing is downloaded for a benchmark."""
    from audiophi.components.cache import components_dir

    bases = json.loads((CHECKPOINT / "config.json").read_text())["base_components"]
    return all((components_dir() / base["id"].replace("/", "--")).is_dir() for base in bases.values())


def chosen_weights(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "checkpoint" if components_are_here() else "random"


def make_model(weights: str):
    """(model in eval mode, processor): checkpoints/audiophi-tiny with its LoRA merged ("checkpoint"), a model of its
    sizes with random weights ("random"), or one with a hundredth of them ("tiny").

    With random weights, the collapse would keep an arbitrary number of embeddings: `keep_steadily` makes it
    KEPT_PER_SECOND.
    """
    import torch

    from modeling_audiophi import AudioPhiConfig, AudioPhiForConditionalGeneration
    from modeling_audiophi.lora_audiophi import merged_state_dict
    from processing import AudioPhiProcessor

    processor = AudioPhiProcessor.from_pretrained(CHECKPOINT)
    config = AudioPhiConfig.from_pretrained(CHECKPOINT)
    state = None
    if weights == "checkpoint":
        trained = AudioPhiForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
        state = merged_state_dict(trained)
    config.hear_with = "alignment"  # the other ear is measured by transcribe_folder.py
    config.lora = {"audio": None, "text": None}
    config.use_cache = True
    if weights == "tiny":
        shrink(config)
    torch.manual_seed(0)
    model = AudioPhiForConditionalGeneration(config)
    if state is not None:
        model.load_state_dict(state)
        model.generation_config = copy.deepcopy(trained.generation_config)
    else:
        take_alignment_vocabulary(model)
        with torch.no_grad():
            model.model.readout.start_at(model.get_input_embeddings().weight.square().mean().sqrt())
        model.generation_config = type(model.generation_config).from_pretrained(CHECKPOINT)
        keep_steadily(model, KEPT_PER_SECOND, config.num_audio_tokens(processor.frame_counts(10 * RATE)) / 10)
    return model.eval(), processor


def shrink(config) -> None:
    """The checkpoint's config with fewer and narrower layers, and fewer classes in the alignment. As before, 375
    Voxtral tokens make 30 s."""
    classes = 3000
    config.align_vocab_size, config.align_spelling["entries"] = classes, int(checkpoint_tensor(STARTS)[classes])
    for name, value in {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 2,
    }.items():
        setattr(config.audio_config, name, value)
    for name, value in {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
                        "num_attention_heads": 2, "num_key_value_heads": 1}.items():  # fmt: skip
        setattr(config.text_config, name, value)
    config.adapter_config.hidden_size, config.adapter_config.num_heads = 32, 2


def take_alignment_vocabulary(model) -> None:
    """The classes of the checkpoint's alignment head, which do not depend on the model's width, or the first of
    them."""
    import torch

    with torch.no_grad():
        for name in (VOCAB_IDS, NGRAMS, STARTS):
            buffer = model.get_buffer(name)
            buffer.copy_(checkpoint_tensor(name)[: len(buffer)])


def checkpoint_tensor(name: str):
    from safetensors import safe_open

    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def keep_steadily(model, per_second: float, tokens_per_second: float) -> None:
    """Lets an untrained alignment hear `per_second` words, evenly spread: everywhere else the blank wins. What is
    computed is the same as ever."""
    import torch

    share, logits = per_second / tokens_per_second, model.model.alignment.logits

    def steady(tokens, *table):
        scores = logits(tokens, *table)
        place = torch.arange(1, scores.shape[1] + 1)
        word = torch.floor(place * share) > torch.floor((place - 1) * share)
        with torch.no_grad():  # the loss lm has no gradient for the blank's score
            scores.detach()[..., 0] = torch.where(word, -1e4, 1e4)
        return scores

    model.model.alignment.logits = steady


def kept_per_second(model, processor, clips) -> float:
    """Embeddings per second that the collapse leaves of clips (waveform, words)."""
    import torch

    batch = processor.pad_audio([processor.encode_audio(wave, RATE) for wave, _ in clips])
    with torch.inference_mode():
        audio = model.get_audio_features(**batch)
    return int(audio.keep.sum()) / sum(len(wave) / RATE for wave, _ in clips)


# ---- time ----------------------------------------------------------------------------------------------------------


class Budget:
    """Seconds that a script may take; what no longer fits is left out, and said so."""

    def __init__(self, seconds: float):
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self._start)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(contestants: dict[str, Callable], repetitions: int, seconds: float) -> dict[str, list[float]]:
    """Times of every contestant: once each as a warm-up, which is not counted, then in rounds, so that whatever slows
    the machine slows all of them. At least one round, at most `repetitions`, no further one that would go beyond
    `seconds`."""
    budget = Budget(seconds)
    for work in contestants.values():
        work()
    times = {name: [] for name in contestants}
    for _ in range(repetitions):
        last_round = [values[-1] for values in times.values() if values]
        if last_round and sum(last_round) > budget.left:
            break
        for name, work in contestants.items():
            times[name].append(seconds_of(work))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


# ---- results -------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """What the figures depend on."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # above 0.5 at the start, something else was running
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, name: str, section: dict) -> None:
    """Replaces a script's section of the results file, and its headline figures beside it; whoever is stopped leaves
    the last whole file."""
    results = read_results(path)
    for figure in results.get(name, {}).get("headline", {}):
        results.pop(figure, None)
    results |= {**section.get("headline", {}), name: section}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def script(name: str, doc: str, measure, table, minutes: float, arguments: list[str], more=None) -> int:
    """A benchmark as a command. `minutes`: its share of `make bench`; `more(parser)` adds options of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes, help="after which nothing new is begun")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: does it run?")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto",
                        help="auto: checkpoints/audiophi-tiny where its base components are, else random")  # fmt: skip
    parser.add_argument("--output", type=Path, help=f"JSON file whose key {name!r} gets the results as they come")
    if more is not None:
        more(parser)
    options = parser.parse_args(arguments)
    options.weights = chosen_weights(options.weights)
    options.budget = Budget(60 * options.minutes)
    about = {"machine": machine(), "weights": options.weights, "quick": options.quick, "minutes": options.minutes}
    start, latest = time.perf_counter(), {}

    def save(section: dict, complete: bool = False) -> None:
        latest.clear()
        latest.update({**about, "complete": complete, "seconds": round(time.perf_counter() - start, 1), **section})
        if options.output:
            write_results(options.output, name, latest)

    save(measure(options, save), complete=True)
    print("\n" + table(latest))
    return 0


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
