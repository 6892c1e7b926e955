"""`pipeline("audio-text-to-text", model=…)`: audio in whatever form, a question, words.

A row's way through this file: `preprocess` (any input → one prompt, or one per piece of a long recording to transcribe)
→ `_forward` (prompts of all rows of a batch, decoded together where their settings agree) → `postprocess` (words →
result). Rows are padded by the processor, which knows which side and which axis, not by transformers' collator.
"""

import copy
import inspect
from functools import cached_property

import torch
from transformers import GenerationMixin, Pipeline

from .chunks_audiophi import OneStreamOfSeveral, split_at_pauses
from .generation_audiophi import GENERATION_SETTINGS
from .pipeline_rows_audiophi import Results, is_chat, is_one_input, loader, prompt, undecoded

MAX_NEW_TOKENS = 512  # where neither the call nor the model's generation config says
GENERATE_ARGUMENTS = {*inspect.signature(GenerationMixin.generate).parameters} - {"self", "inputs", "kwargs"}
GENERATE_ARGUMENTS |= {"tokenizer", "assistant_tokenizer"}  # `generate` takes them out of its kwargs
ROW_ERRORS = (ValueError, OSError)  # what a single input can be to blame for


class AudioTextToTextPipeline(Pipeline):
    """Audio and a question in, words out.

        pipe = pipeline("audio-text-to-text", model="checkpoints/audiophi-tiny")
        pipe("speech.wav")                                     # {"generated_text": "…"}
        pipe("rain.flac", instruction="caption")
        pipe("speech.wav", instruction="Is the speaker happy?", max_new_tokens=50)
        for result in pipe(dataset, batch_size=8): …

    An input is one of
        a clip: path, URL, bytes, (array, sampling_rate), {"array" or "raw": …, "sampling_rate": …}, a `datasets` Audio,
            or an array together with `sampling_rate=`;
        a row: {"audio": clip or list of clips, "instruction": … (optional)}; other columns are not read, so that a data
            set's `text`, what was said, never gets into the prompt;
        a chat: [{"role": …, "content": text or [{"type": "audio", "path": …}, {"type": "text", "text": …}]}, …], with
            any number of clips and turns; a last turn of the assistant's is continued.
    A list, data set, generator or any other iterable of inputs gives a result for each, in order: a list for a list,
    else an iterable that reads on as its results are taken.

    Arguments, in `pipeline(…)` or in the call:
        instruction: "transcribe" (default), "caption" (tasks that the processor has wordings for; `task=` names the
            pipeline itself) or free text, put after the audio.
        chunk_length_s: a transcript of a longer recording is made in pieces of at most so many seconds, cut at pauses;
            default: the encoder's window (30 s), 0: never. Everything else hears a recording as a whole.
        return_timestamps: add "chunks" to transcripts: [{"timestamp": (start, end) in seconds, "text"}, …].
        sampling_rate: Hz, of bare arrays.
        batch_size (1), num_workers (0): rows decoded at a time; processes that read and prepare them.
        everything else, or `generate_kwargs={…}`: for `generate`, say max_new_tokens (512), num_beams,
            generation_config, or `streamer`, for one input; streaming decodes without beams unless num_beams is given.
    The alignment head has a part in transcripts only (`ctc_weight`): it knows nothing of other answers.

    A result is {"generated_text": str}, with num_return_sequences above 1 also "alternatives" (all of them). For a
    single input that cannot be used the call raises ValueError or OSError naming it; among several it costs its own
    row: {"generated_text": None, "error": message}. TypeError: an argument that nobody knows.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __call__(self, inputs=None, *, audio=None, text=None, batch_size=None, num_workers=None, **kwargs):
        """See the class. `audio=` and `text=` (an instruction, or chats) are what other pipelines of transformers call
        the inputs."""
        if isinstance(text, str):
            if kwargs.setdefault("instruction", text) != text:
                raise ValueError("text= is the instruction, give only one of them")
            text = None
        given = [value for value in (inputs, audio, text) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give audio, rows or chats once, not {len(given)} times; text= may also be an instruction"
            )
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        preprocess = {**self._preprocess_params, **preprocess}
        settings = {**self._forward_params["generate_kwargs"], **forward["generate_kwargs"]}
        postprocess = {**self._postprocess_params, **postprocess}
        streamer = settings.get("streamer")
        try:
            self._generation_config(settings)  # a wrong argument is no row's fault
            alone = is_one_input(given[0])
            if streamer is not None and not alone:
                raise ValueError("a streamer takes one input at a time")
            batch_size = (batch_size or self._batch_size or 1) if streamer is None else 1
            rows = [given[0]] if alone else undecoded(given[0])
            results = Results(
                loader(rows, lambda row: self._prepare(row, preprocess), batch_size, num_workers or self._num_workers),
                lambda batch: self.forward(batch, generate_kwargs=settings, batch_size=batch_size),
                lambda row: self.postprocess(row, **postprocess),
                rows,
            )
            if not alone:
                return list(results) if isinstance(rows, (list, tuple)) else results
            (row,) = results.unfinished()
            if "error" in row:
                raise row["error"]
            return self.postprocess(row, **postprocess)
        except BaseException:
            if streamer is not None:
                streamer.end()  # whoever reads it in another thread would wait for ever
            raise

    def _sanitize_parameters(
        self,
        instruction=None,
        chunk_length_s=None,
        return_timestamps=None,
        sampling_rate=None,
        generate_kwargs=None,
        **kwargs,
    ):
        if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
            raise ValueError(f"instruction must be a task or a text, not {instruction!r}")
        if chunk_length_s is not None and chunk_length_s != 0 and chunk_length_s < 1:
            raise ValueError(f"chunk_length_s={chunk_length_s}: expected 0 (never cut) or at least 1 second")
        preprocess = {"instruction": instruction, "chunk_length_s": chunk_length_s, "sampling_rate": sampling_rate}
        postprocess = {"return_timestamps": return_timestamps}
        twice = sorted({*(generate_kwargs or {})} & {*kwargs})
        if twice:
            raise ValueError(f"given twice, directly and in generate_kwargs: {', '.join(twice)}")
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {"generate_kwargs": {**(generate_kwargs or {}), **kwargs}},
            {name: value for name, value in postprocess.items() if value is not None},
        )

    # ---- input -> prompts --------------------------------------------------------------------------------------------

    def preprocess(self, row, instruction="transcribe", chunk_length_s=None, sampling_rate=None):
        """One input → {"prompts": chats with encoded audio, "seconds": their (start, end) or None, "transcript":
        whether the alignment head knows what is wanted, "continued": whether the last turn is the assistant's}.

        Raises ValueError (`AudioError` for a clip) naming what cannot be used.
        """
        if is_chat(row):
            return self._chat(row, sampling_rate)
        clips = [row]
        if isinstance(row, dict) and "audio" in row:
            instruction = row.get("instruction") or instruction
            sampling_rate = row.get("sampling_rate", sampling_rate)
            several = isinstance(row["audio"], list) and not is_one_input(row["audio"])
            clips = row["audio"] if several else [row["audio"]]
        question = self.processor.instructions.get(instruction, [instruction])[0]
        if len(clips) != 1 or question not in self.processor.instructions["transcribe"]:
            encoded = [self.processor.encode_audio(clip, sampling_rate) for clip in clips]
            return {"prompts": [prompt(encoded, question)], "seconds": None, "transcript": False, "continued": False}
        waveform, rate = self.processor.load_audio(clips[0], sampling_rate), self.processor.sampling_rate
        longest = self.window_seconds if chunk_length_s is None else chunk_length_s
        pieces = split_at_pauses(waveform, rate, longest) if longest else [(0, len(waveform))]
        return {
            "prompts": [prompt([self.processor.encode_audio(waveform[a:b], rate)], question) for a, b in pieces],
            "seconds": [(round(a / rate, 3), round(b / rate, 3)) for a, b in pieces],
            "transcript": True,
            "continued": False,
        }

    def _chat(self, messages, sampling_rate):
        chat, clips, words = [], 0, []
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(f"every turn of a chat needs a role and a content, this one has not: {message!r:.200}")
            content = message["content"]
            if not isinstance(content, str):
                content = [self._item(item, sampling_rate) for item in content]
                clips += sum(item["type"] == "audio" for item in content)
            if message["role"] == "user":
                words += [content] if isinstance(content, str) else [i["text"] for i in content if i["type"] == "text"]
            chat.append({**message, "content": content})
        roles = [message["role"] for message in chat]
        # With several clips or turns the alignment would expect all that was ever said, from the beginning.
        asked = "".join(words).strip() in self.processor.instructions["transcribe"]
        transcript = asked and clips == 1 and roles.count("user") == 1 and "assistant" not in roles
        return {"prompts": [chat], "seconds": None, "transcript": transcript, "continued": roles[-1] == "assistant"}

    def _item(self, item, sampling_rate):
        if item.get("type") != "audio" or "encoded" in item:
            return item
        clip = {name: value for name, value in item.items() if name != "type"}
        return {"type": "audio", "encoded": self.processor.encode_audio(clip, sampling_rate)}

    def _prepare(self, read, arguments):
        """`preprocess` for one of several inputs, `read()`: what is wrong with it is its result."""
        try:
            return self.preprocess(read(), **arguments)
        except ROW_ERRORS as error:
            return {"error": error}

    @property
    def window_seconds(self):
        """What the encoder takes at once; None: any length."""
        frames, features = self.processor.window_frames, self.processor.window_features
        return frames and frames * features.samples_per_frame / self.processor.sampling_rate

    # ---- prompts -> words --------------------------------------------------------------------------------------------

    def _forward(self, rows, generate_kwargs=None, batch_size=1):
        """Rows of `preprocess`, or {"error"} → per row {"texts": a list of answers per prompt, "seconds"} or
        {"error"}."""
        settings, answers, groups = generate_kwargs or {}, {}, {}
        for number, row in enumerate(rows):
            for piece in range(len(row.get("prompts", ()))):
                groups.setdefault((row["transcript"], row["continued"]), []).append((number, piece))
        total, stream = sum(map(len, groups.values())), None
        if settings.get("streamer") is not None and total > 1:
            space = self.tokenizer.encode(" ", add_special_tokens=False)
            stream = OneStreamOfSeveral(settings["streamer"], space, self._generation_config(settings).eos_token_id)
            settings = {**settings, "streamer": stream}
        for (transcript, continued), places in groups.items():
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                if stream is not None:
                    stream.last = len(answers) + len(batch) == total
                prompts = [rows[number]["prompts"][piece] for number, piece in batch]
                answers.update(zip(batch, self._answers(prompts, transcript, continued, settings), strict=True))
        results = []
        for number, row in enumerate(rows):
            texts = [answers[number, piece] for piece in range(len(row.get("prompts", ())))]
            errors = [row["error"]] if "error" in row else [text for text in texts if isinstance(text, Exception)]
            results.append({"error": errors[0]} if errors else {"texts": texts, "seconds": row["seconds"]})
        return results

    def _answers(self, prompts, transcript, continued, settings):
        """Per prompt a list of texts, or the error it causes (say it is longer than the LLM's context)."""
        try:
            return self._generate(prompts, transcript, continued, settings)
        except ROW_ERRORS as error:
            if len(prompts) == 1:
                return [error]
            return [self._answers([one], transcript, continued, settings)[0] for one in prompts]

    def _generate(self, prompts, transcript, continued, settings):
        inputs = self.processor.apply_chat_template(
            prompts, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=not continued,
            continue_final_message=continued, processor_kwargs={"padding_side": "left"},
        ).to(self.device, dtype=self.dtype)  # fmt: skip
        config = self._generation_config(settings)
        if not transcript and "ctc_weight" not in settings:
            config.ctc_weight = 0.0
        more = {name: value for name, value in settings.items() if name in GENERATE_ARGUMENTS}
        output = self.model.generate(**inputs, **{**more, "generation_config": config})
        output = output if isinstance(output, torch.Tensor) else output.sequences
        texts = [self._text(words, config, continued) for words in output[:, inputs["input_ids"].shape[1] :].tolist()]
        each = len(texts) // len(prompts)
        return [texts[start : start + each] for start in range(0, len(texts), each)]

    def _text(self, words, config, continued):
        length = next((index for index, token in enumerate(words) if token in config.eos_token_id), None)
        text = self.tokenizer.decode(words[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if continued else text.strip()

    def _generation_config(self, settings):
        """The model's generation config, or the caller's, with `settings`. TypeError for what neither it nor `generate`
        knows, ValueError for values that are out of range."""
        config = settings.get("generation_config")
        config = copy.deepcopy(self.model.generation_config if config is None else config)
        known = {*config.to_diff_dict(), *settings}
        for name, value in settings.items():
            if name in GENERATE_ARGUMENTS:
                continue
            if name.startswith("_") or not (name in vars(config) or name in GENERATION_SETTINGS):
                raise TypeError(f"neither the pipeline nor generate knows the argument {name!r}")
            setattr(config, name, value)
        if not known & {"max_new_tokens", "max_length"}:
            config.max_new_tokens = MAX_NEW_TOKENS
        if "max_length" not in settings and config.max_new_tokens is not None:
            config.max_length = None  # transformers warns where both are set
        if settings.get("streamer") is not None and "num_beams" not in settings:
            config.num_beams, config.length_penalty = 1, type(config)().length_penalty
        ends = config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        # The chat's end of turn: some LLMs name only the end of a text.
        config.eos_token_id = ends if "eos_token_id" in settings else sorted({*ends, self._end_of_turn})
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        config.validate()
        self.model._fusion_settings(config, {})
        return config

    @cached_property
    def _end_of_turn(self):
        return self.processor.end_token_id

    # ---- words -> result ---------------------------------------------------------------------------------------------

    def postprocess(self, row, return_timestamps=False):
        """A row of `_forward` → the caller's result; see the class."""
        if "error" in row:
            return {"generated_text": None, "error": str(row["error"])}
        texts = [text[0] for text in row["texts"]]
        result = {"generated_text": texts[0] if len(texts) == 1 else " ".join(filter(None, texts))}
        if len(texts) == 1 and len(row["texts"][0]) > 1:
            result["alternatives"] = row["texts"][0]
        if return_timestamps and row["seconds"] is not None:
            pairs = zip(row["seconds"], texts, strict=True)
            result["chunks"] = [{"timestamp": seconds, "text": text} for seconds, text in pairs]
        return result

    def save_pretrained(self, save_directory, **kwargs):
        """Model and processor, complete: the base class forgets the processor and writes its parts twice."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
