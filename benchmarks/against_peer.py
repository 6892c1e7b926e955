"""AudioPhi against transformers' own audio language models, with the same encoder and LLM: training step, generation.

    python benchmarks/against_peer.py [--quick] [--minutes 14] [--weights random] [--output benchmarks/results.json]

Peers: Voxtral's and Qwen2-Audio's classes around Whisper base's encoder and SmolLM2-135M, the same weights as ours, all
float32 on the CPU. The same speech, words, instruction and chat format for all; features are extracted beforehand (what
that costs stands in a column of its own). Side by side in one process, interleaved repetitions, medians.

    train      one optimiser step of the adapter, encoder and LLM frozen: loss lm, collapse readout, live encoder
    (cached)   the same from the feature cache, as recipes train: not compared with anybody
    generate   as many tokens as the words spoken have (`--new_tokens N`: as many as that), greedy, by the LLM alone
               (`ctc_weight` 0), from features to tokens
    (no draft) the same token by token: what the alignment heard is not used as a draft of the transcript. Only a
               single clip is drafted

Ratios are the peer's time over ours: above 1, we are faster. `train_ratio_7s` and the like are those against Voxtral,
the smaller of the two batch sizes. At 30 s the larger batch is 4, because 8 take too long on two cores; for the same
reason Qwen2-Audio competes in batches of 1 only.
"""

import copy
import sys

import torch
from transformers import GenerationConfig

from audiophi.data.collator import IGNORED, AudioPhiCollator
from audiophi.tasks import default_task
from audiophi.training.build import apply_tuning
from audiophi.training.recipe import Stage
from measuring import (
    RATE,
    interleaved,
    joined_speech,
    make_model,
    markdown,
    median,
    script,
    seconds_of,
    training_items,
)

# In the order in which time is spent on them: headlines first, with twice the time.
LENGTHS = (7.0, 30.0, 3.0, 10.0)
HEADLINE_LENGTHS = LENGTHS[:2]
REPETITIONS = 5
HEADLINE_PEER = "voxtral"
OWN_WAYS = ("ours, cached", "ours, no draft")  # of doing the same, compared with ourselves only
SMALL_BATCHES_ONLY = {"qwen2_audio"}


def batch_sizes(seconds: float, quick: bool) -> tuple[int, ...]:
    return (2,) if quick else (1, 4) if seconds >= 30 else (1, 8)


# ---- the peers -----------------------------------------------------------------------------------------------------


def voxtral(config):
    from transformers import VoxtralConfig, VoxtralEncoderConfig, VoxtralForConditionalGeneration

    audio = config.audio_config
    encoder = VoxtralEncoderConfig(
        hidden_size=audio.d_model,
        intermediate_size=audio.encoder_ffn_dim,
        num_hidden_layers=audio.encoder_layers,
        num_attention_heads=audio.encoder_attention_heads,
        num_mel_bins=audio.num_mel_bins,
        max_source_positions=audio.max_source_positions,
    )
    text = copy.deepcopy(config.text_config)
    return VoxtralForConditionalGeneration(
        VoxtralConfig(audio_config=encoder, text_config=text, audio_token_id=config.audio_token_id)
    )


def qwen2_audio(config):
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration

    audio = config.audio_config
    encoder = Qwen2AudioEncoderConfig(
        d_model=audio.d_model,
        encoder_ffn_dim=audio.encoder_ffn_dim,
        encoder_layers=audio.encoder_layers,
        encoder_attention_heads=audio.encoder_attention_heads,
        num_mel_bins=audio.num_mel_bins,
        max_source_positions=audio.max_source_positions,
    )
    text = copy.deepcopy(config.text_config)
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=encoder, text_config=text, audio_token_index=config.audio_token_id)
    )


PEERS = {"voxtral": voxtral, "qwen2_audio": qwen2_audio}


def make_peer(name: str, ours):
    """A peer with our encoder's and LLM's weights (strictly loaded: another size would raise), its adapter trained."""
    torch.manual_seed(0)
    peer = PEERS[name](ours.config)
    peer.model.audio_tower.load_state_dict(ours.model.audio_tower.encoder.state_dict())
    peer.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    peer.lm_head.weight = peer.get_input_embeddings().weight  # tied, as SmolLM2's is
    peer.requires_grad_(False)
    peer.model.multi_modal_projector.requires_grad_(True)
    for part in (peer.model.audio_tower, peer.model.language_model):
        part.eval()
    return peer


def peer_audio(name: str, peer, processor, waves) -> tuple[dict, list[int]]:
    """A peer's audio inputs, padded to 30 s as its encoder wants them, and its number of audio tokens per clip."""
    audio = peer.config.audio_config
    features = processor.feature_extractor(waves, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    inputs = {"input_features": features["input_features"]}
    if name == "voxtral":  # every token is as many frames as fit into the projector's input
        tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        return inputs, [tokens] * len(waves)
    inputs["feature_attention_mask"] = features["attention_mask"]
    _, lengths = peer.model.audio_tower._get_feat_extract_output_lengths(features["attention_mask"].sum(-1))
    return inputs, lengths.tolist()


def with_audio_tokens(batch: dict, audio_id: int, counts: list[int], pad_id: int) -> dict:
    """The text inputs of `batch` with so many audio tokens in the place of each row's placeholder, padded on the right.
    ValueError for a row that has not one."""
    rows = {name: [] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    for number, count in enumerate(counts):
        real = batch["attention_mask"][number].bool()
        ids = batch["input_ids"][number][real]
        places = (ids == audio_id).nonzero()[:, 0].tolist()
        if len(places) != 1:
            raise ValueError(f"row {number} has {len(places)} audio placeholders")
        place = places[0]
        audio = {"input_ids": audio_id, "attention_mask": 1, "labels": IGNORED}
        for name in rows:
            values = batch[name][number][real]
            middle = values.new_full((count,), audio[name])
            rows[name].append(torch.cat([values[:place], middle, values[place + 1 :]]))
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill[name])
        for name, values in rows.items()
    }


# ---- the work ------------------------------------------------------------------------------------------------------


class Trainee:
    """A model and the optimiser of what it trains."""

    def __init__(self, model):
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def step(self, batch: dict) -> None:
        """RuntimeError where nothing would be learned."""
        loss = self.model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not (torch.isfinite(loss) and norm > 0):
            raise RuntimeError(f"{type(self.model).__name__}: loss {loss.item()}, gradient {norm.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def generate(model, prompt: dict, new_tokens: int, **settings) -> None:
    """RuntimeError where another number of tokens comes out. `settings`: more arguments of the model's `generate`."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True,
        eos_token_id=model.config.text_config.eos_token_id, pad_token_id=model.config.text_config.pad_token_id,
    )  # fmt: skip
    output = model.generate(**prompt, generation_config=config, **settings)
    made = output.shape[1] - prompt["input_ids"].shape[1]
    if made != new_tokens:
        raise RuntimeError(f"{type(model).__name__} made {made} tokens instead of {new_tokens}")


class Contest:
    """Ours and the peers, ready for both kinds of work."""

    def __init__(self, weights: str, peers: list[str]):
        self.ours, self.processor = make_model(weights)
        apply_tuning(self.ours, Stage(name="lm", loss="lm", steps=1, batch_size=1))
        self.peers = {name: make_peer(name, self.ours) for name in peers}
        self.trainees = {name: Trainee(model) for name, model in {"ours": self.ours, **self.peers}.items()}
        self.collate = AudioPhiCollator(self.processor, mode="lm")

    def training_mode(self, on: bool) -> None:
        """Adapters as in training; the frozen parts stay in eval mode, as in our Trainer."""
        self.ours.train(on)
        self.ours.model.language_model.eval()
        for peer in self.peers.values():
            peer.model.multi_modal_projector.train(on)

    def train(self, clips) -> tuple[dict, dict, dict]:
        """(what to time, audio tokens per clip, seconds that features and prompts took) of a batch."""
        self.training_mode(True)
        prepared, tokens, work = {}, {}, {}

        def collated():
            return self.collate(training_items(clips, self.processor))

        batch = collated()
        prepared["ours"] = seconds_of(collated)
        with torch.no_grad():
            hidden, mask = self.ours.model.encode(batch["input_features"], batch["input_features_mask"])
            keep = self.ours.get_audio_features(audio_hidden_states=hidden, audio_hidden_mask=mask).keep
        tokens["ours"] = float(keep.sum()) / len(clips)
        cached = {name: value for name, value in batch.items() if not name.startswith("input_features")}
        cached |= {"audio_hidden_states": hidden, "audio_hidden_mask": mask}
        work["ours"] = lambda: self.trainees["ours"].step(batch)
        work["ours, cached"] = lambda: self.trainees["ours"].step(cached)
        for name, theirs in self.peer_batches(clips, batch, prepared, tokens).items():
            work[name] = lambda name=name, theirs=theirs: self.trainees[name].step(theirs)
        return work, tokens, prepared

    def tokens_spoken(self, clips) -> int:
        """Tokens of the longest of the clips' texts."""
        return max(len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text in clips)

    def generation(self, clips, new_tokens: int) -> tuple[dict, dict, dict]:
        """As `train`."""
        self.training_mode(False)
        prepared, tokens, work = {}, {}, {}

        def prompts():
            return self.processor.apply_chat_template(
                [
                    [{"role": "user", "content": [
                        {"type": "audio", "encoded": self.processor.encode_audio(wave, RATE)},
                        {"type": "text", "text": default_task().wordings[0]},
                    ]}] for wave, _ in clips
                ],
                tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
                processor_kwargs={"padding_side": "left"},
            )  # fmt: skip

        batch = dict(prompts())
        del batch["asked"]  # plain decoding, whatever the checkpoint says of the task
        prepared["ours"] = seconds_of(prompts)
        audio = {name: batch[name] for name in ("input_features", "input_features_mask", "audio_num_windows")}
        with torch.no_grad():
            tokens["ours"] = float(self.ours.get_audio_features(**audio).keep.sum()) / len(clips)
        draft = default_task().decoding["draft_tokens"]
        work["ours"] = lambda: generate(self.ours, batch, new_tokens, draft_tokens=draft)
        if len(clips) == 1:
            work["ours, no draft"] = lambda: generate(self.ours, batch, new_tokens)
        for name, theirs in self.peer_batches(clips, batch, prepared, tokens).items():
            work[name] = lambda name=name, theirs=theirs: generate(self.peers[name], theirs, new_tokens)
        return work, tokens, prepared

    def peer_batches(self, clips, batch: dict, prepared: dict, tokens: dict) -> dict[str, dict]:
        waves, batches = [wave for wave, _ in clips], {}
        pad, audio_id = self.processor.tokenizer.pad_token_id, self.processor.audio_token_id
        for name, peer in self.peers.items():
            prepared[name] = seconds_of(lambda name=name, peer=peer: peer_audio(name, peer, self.processor, waves))
            audio, counts = peer_audio(name, peer, self.processor, waves)
            tokens[name] = sum(counts) / len(counts)
            batches[name] = {**audio, **with_audio_tokens(batch, audio_id, counts, pad)}
        return batches


# ---- the whole -----------------------------------------------------------------------------------------------------


def measure(options, save) -> dict:
    lengths = (7.0, 30.0) if options.quick else LENGTHS
    lengths = tuple(options.lengths) if options.lengths else lengths
    new_tokens = 4 if options.quick else options.new_tokens
    repetitions = 1 if options.quick else REPETITIONS
    cases = [
        (task, seconds, batch)
        for seconds in lengths
        for batch in batch_sizes(seconds, options.quick)
        for task in ("train", "generate")
    ]
    # Small batches first: they need less than their share, and the rest of it goes to the large ones.
    cases.sort(key=lambda case: (case[1] not in HEADLINE_LENGTHS, case[2]))
    weights = [2 if seconds in HEADLINE_LENGTHS else 1 for _, seconds, _ in cases]
    contest = Contest(options.weights, options.peers)
    section = {"cases": [], "left_out": []}
    for number, (task, seconds, batch) in enumerate(cases):
        name = f"{task} {seconds:g} s, batch {batch}"
        share = options.budget.left * weights[number] / sum(weights[number:])
        if options.budget.left <= 0:
            section["left_out"].append(name)
            continue
        clips = joined_speech(batch, seconds)
        case = {"task": task, "seconds": seconds, "batch": batch}
        if task == "train":
            work, tokens, prepared = contest.train(clips)
        else:
            case["new_tokens"] = new_tokens or contest.tokens_spoken(clips)
            work, tokens, prepared = contest.generation(clips, case["new_tokens"])
        if batch > 1 and not options.quick:
            work = {who: job for who, job in work.items() if who not in SMALL_BATCHES_ONLY}
        times = interleaved(work, repetitions, share)
        medians = {who: median(values) for who, values in times.items()}
        ratios = {peer: medians[peer] / medians["ours"] for peer in contest.peers if peer in medians}
        section["cases"].append(
            {**case, "times": times, "medians": medians, "ratios": ratios, "audio_tokens": tokens, "prepared": prepared}
        )
        section["headline"] = headline(section["cases"])
        print(f"{name}: " + ", ".join(f"{who} {value:.2f} s" for who, value in medians.items()), flush=True)
        save(section)
    return section


def headline(cases: list[dict]) -> dict[str, float]:
    """The smallest ratio over batch sizes per task and length: against Voxtral under the plain names."""
    found: dict[str, float] = {}
    for case in cases:
        for peer, ratio in case["ratios"].items():
            name = f"{case['task']}_ratio_{case['seconds']:g}s" + ("" if peer == HEADLINE_PEER else f"_{peer}")
            found[name] = min(round(ratio, 3), found.get(name, float("inf")))
    return found


def table(section: dict) -> str:
    """Markdown: a row per case."""
    if not section["cases"]:
        return "nothing was measured"
    peers = max((list(case["ratios"]) for case in section["cases"]), key=len)
    header = ["", "clip", "batch", "new tokens", "ours", *OWN_WAYS, *peers, *(f"{peer} / ours" for peer in peers)]
    header += ["audio tokens: ours, " + ", ".join(peers), "features: ours, " + ", ".join(peers), "rounds"]
    rows = []
    for case in sorted(section["cases"], key=lambda c: (c["task"] != "train", c["seconds"], c["batch"])):
        seconds = {who: f"{value:.2f} s" for who, value in case["medians"].items()}
        rows.append(
            [case["task"], f"{case['seconds']:g} s", case["batch"], case.get("new_tokens", "")]
            + [seconds.get(who, "") for who in ("ours", *OWN_WAYS, *peers)]
            + [f"{case['ratios'][peer]:.2f}" if peer in case["ratios"] else "" for peer in peers]
            + [" / ".join(f"{case['audio_tokens'][who]:.0f}" for who in ("ours", *peers))]
            + [" / ".join(f"{case['prepared'][who]:.2f}" for who in ("ours", *peers)) + " s"]
            + [len(case["times"]["ours"])]
        )
    text = markdown(header, rows)
    if section["left_out"]:
        text += f"\n\nNo time was left for: {'; '.join(section['left_out'])}."
    return text


def add_options(parser) -> None:
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--new_tokens", type=int, help="that each generation makes (as many as the words spoken have)")
    parser.add_argument("--lengths", nargs="+", type=float, help="of the clips, in seconds")


def main(arguments: list[str]) -> int:
    return script("against_peer", __doc__, measure, table, 14, arguments, add_options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
