"""Where time goes in a training step and in a call of the pipeline.

    python benchmarks/profile_step.py [--quick] [--minutes 4] [--output benchmarks/results.json]

Training: one optimiser step of the adapter on clips of 7 s (encoder and LLM frozen), with loss `align` and with loss
`lm`, from waveforms to new weights. A step from the feature cache has no features and no encoder. The backward pass is
split where a gradient arrives. Pipeline: clips of 7 s, decoded as the checkpoint does (greedily, the alignment and the
LLM without audio vote), several together and one alone, which is drafted. Medians over repetitions, and each part's
share.
"""

import sys

import torch

from audiophi.data.alignment_text import AlignmentTokenizer
from audiophi.data.augment import Augment
from audiophi.data.collator import AudioPhiCollator
from audiophi.training.build import apply_tuning
from audiophi.training.recipe import Stage, load_recipe
from measuring import RATE, ROOT, joined_speech, make_model, markdown, median, script, training_items
from modeling_audiophi.ctc_scoring_audiophi import CTCPrefixScorer
from modeling_audiophi.kv_cache_audiophi import CACHE_NAME
from modeling_audiophi.lm_prior_audiophi import LanguageModelPrior
from stopwatch import Stopwatch

SECONDS = 7.0


def watch_model(watch: Stopwatch, model) -> None:
    """The parts of a forward pass."""
    parts = model.model
    watch.over(parts, "encode", "encoder")
    watch.over(parts.multi_modal_projector, "forward", "adapter")
    watch.over(parts.alignment, "logits", "alignment's scores")
    watch.over(parts.alignment, "ctc_loss", "CTC loss")
    watch.over(parts.readout, "forward", "readout (collapse)")
    watch.over(parts.language_model, "forward", language_model_label)
    watch.over(model, "compute_logits", "LLM's head and loss")


def language_model_label(*args, inputs_embeds=None, **kwargs) -> str:
    cache = kwargs.get(CACHE_NAME)
    if inputs_embeds is None or cache is None or not cache.get_seq_length():
        return "LLM on the prompt"
    return "LLM on a draft" if inputs_embeds.shape[1] > 1 else "LLM, token by token"


def watch_backward(watch: Stopwatch, model) -> list:
    """Laps where gradients arrive: behind and in front of the LLM, behind the adapter. Returns handles to remove."""

    def lap_at(tensor, label):
        if torch.is_tensor(tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: watch.lap(label))

    parts = model.model
    return [
        parts.language_model.register_forward_hook(
            lambda module, args, kwargs, output: (
                lap_at(output.last_hidden_state, "backward: LLM's head and loss"),
                lap_at(kwargs["inputs_embeds"], "backward: LLM"),
            ) and None,
            with_kwargs=True,
        ),
        parts.multi_modal_projector.register_forward_hook(
            lambda module, args, output: lap_at(output[0], "backward: readout, alignment, CTC")
        ),
    ]  # fmt: skip


def known_words(clips, tokenizer: AlignmentTokenizer, known: set[int]) -> list:
    """The clips with the words that the alignment has classes for."""
    return [(wave, " ".join(w for w in text.split() if set(tokenizer.encode(w)) <= known)) for wave, text in clips]


def training_stage(loss: str) -> Stage:
    """The quickstart's stage with that loss, training the adapter alone."""
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    stage = next(stage for stage in recipe.stages if stage.loss == loss)
    return Stage(name=loss, loss=loss, steps=1, batch_size=1, noise=stage.noise, spec_augment=stage.spec_augment)


def profile_training(model, processor, loss: str, clips, repetitions: int) -> list[dict]:
    """Seconds by part of each of several steps."""
    stage = training_stage(loss)
    apply_tuning(model, stage)
    model.train()
    model.model.language_model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    tokenizer = AlignmentTokenizer(processor.tokenizer)
    known = set(model.model.alignment.vocab_ids.tolist())
    spoken = known_words(clips, tokenizer, known)
    collate = AudioPhiCollator(processor, mode=loss, align_tokenizer=tokenizer)
    masks = stage.spec_augment
    augment = Augment(masks.time_masks, masks.time_width, feature_dropout=masks.feature_prob, noise=stage.noise)
    found = []
    for repetition in range(repetitions + 1):
        with Stopwatch("rest of the step") as watch:
            watch.over(processor, "encode_audio", "features")
            watch_model(watch, model)
            handles = watch_backward(watch, model)
            with watch.part("prompts and padding"):
                batch = dict(collate(training_items(spoken, processor)))
            with torch.no_grad():
                hidden, mask = model.model.encode(
                    batch.pop("input_features"), batch.pop("input_features_mask")
                )
            with watch.part("augmentation"):
                hidden = augment(hidden, mask, torch.arange(len(hidden)) + repetition)
            loss_value = model(**batch, audio_hidden_states=hidden, audio_hidden_mask=mask).loss
            with watch.part("backward: adapter"):
                loss_value.backward()
            with watch.part("optimizer"):
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        if not torch.isfinite(loss_value):
            raise RuntimeError(f"loss {loss}: {loss_value.item()}")
        found.append(watch.seconds)
    model.eval()
    return found[1:]


def profile_pipeline(pipe, clips, repetitions: int, max_new_tokens: int) -> list[dict]:
    """Seconds by part of each of several calls."""
    model, processor, found = pipe.model, pipe.processor, []
    rows = [(wave, RATE) for wave, _ in clips]
    for _ in range(repetitions + 1):
        with Stopwatch("rest of generate") as watch:
            watch.over(processor, "load_audio", "reading")
            watch.over(processor, "encode_audio", "features")
            watch.over(processor, "apply_chat_template", "prompts and padding")
            watch.over(pipe.tokenizer, "decode", "words from tokens")
            watch_model(watch, model)
            watch.over(CTCPrefixScorer, "__call__", "CTC's share in the scores", whole=True)
            watch.over(LanguageModelPrior, "__call__", "LLM without audio", whole=True)
            with torch.inference_mode():
                pipe(rows, batch_size=len(rows), max_new_tokens=max_new_tokens)
        found.append(watch.seconds)
    return found[1:]


def summary(profiles: list[dict]) -> dict[str, float]:
    """Median seconds per part, the largest first."""
    parts = {part: median([profile.get(part, 0.0) for profile in profiles]) for part in profiles[0]}
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def measure(options, save) -> dict:
    from transformers import pipeline

    batch, repetitions, new_tokens = (2, 1, 4) if options.quick else (8, 3, 64)
    model, processor = make_model(options.weights)
    clips = joined_speech(batch, SECONDS)
    section = {"max_new_tokens": new_tokens, "profiles": {}, "left_out": []}
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)

    def training(loss):
        # The alignment's own blank is what its loss is about, so here it is not told where to hear words.
        steady = vars(model.model.alignment).pop("logits", None) if loss == "align" else None
        found = profile_training(model, processor, loss, clips, repetitions)
        if steady is not None:
            model.model.alignment.logits = steady
        return found

    together = f"{batch} x {SECONDS:g} s"
    jobs = {
        f"training step, loss lm ({together})": lambda: training("lm"),
        f"training step, loss align ({together})": lambda: training("align"),
        f"pipeline ({together})": lambda: profile_pipeline(pipe, clips, repetitions, new_tokens),
        f"pipeline (1 x {SECONDS:g} s)": lambda: profile_pipeline(pipe, clips[:1], repetitions, new_tokens),
    }
    for name, job in jobs.items():
        if options.budget.left <= 0:
            section["left_out"].append(name)
            continue
        section["profiles"][name] = summary(job())
        print(f"{name}: {sum(section['profiles'][name].values()):.2f} s", flush=True)
        save(section)
    return section


def table(section: dict) -> str:
    """Markdown: a table per profile."""
    parts = []
    for name, profile in section["profiles"].items():
        total = sum(profile.values())
        rows = [[part, f"{seconds:.3f}", f"{100 * seconds / total:.1f} %"] for part, seconds in profile.items()]
        rows.append(["all", f"{total:.3f}", "100 %"])
        parts.append(markdown([name, "seconds", "share"], rows))
    if section["left_out"]:
        parts.append(f"No time was left for: {'; '.join(section['left_out'])}.")
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    return script("profile_step", __doc__, measure, table, 4, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
