"""`pipeline("audio-text-to-text", model=…)`: audio in whatever form, a question, words.

A row's way through this file: `preprocess` (any input → one prompt, or one per piece of a long recording) → `_forward`
(prompts of all rows of a batch, answered together by the engine where their task agrees) → `postprocess` (words →
result). Rows are padded by the processor, which knows which side and which axis, not by transformers' collator.
"""

from functools import cached_property
from numbers import Real

from transformers import Pipeline

from .chunks_audiophi import OneStreamOfSeveral
from .engine_audiophi import NEEDS_BOTH, Engine
from .pipeline_rows_audiophi import ROW_ERRORS, Results, RowReader, is_one_input, loader, undecoded, window_seconds


class AudioTextToTextPipeline(Pipeline):
    """Audio and a question in, words out.

        pipe = pipeline("audio-text-to-text", model="checkpoints/audiophi-tiny")
        pipe("speech.wav")                                     # {"generated_text": "…"}
        pipe("rain.flac", task=…)                              # one of pipe.processor.tasks
        pipe("speech.wav", instruction="Is the speaker happy?", max_new_tokens=50)
        for result in pipe(dataset, batch_size=8): …

    An input is one of
        a clip: path, URL, bytes, (array, sampling_rate), {"array" or "raw": …, "sampling_rate": …}, a `datasets` Audio,
            or an array together with `sampling_rate=`;
        a row: {"audio": clip or list of clips, "instruction": …, "task": …}, not all of them needed; other columns are
            not read, so that a data set's `text`, what was said, never gets into the prompt;
        a chat: [{"role": …, "content": text or [{"type": "audio", "path": …}, {"type": "text", "text": …}]}, …], with
            any number of clips and turns; a last turn of the assistant's is continued.
    A list, data set, generator or any other iterable of inputs gives a result for each, in order: a list for a list,
    else an iterable that reads on as its results are taken.

    Arguments, in the call (and, but for `task`, in `pipeline(…)`):
        task: how to ask and to decode: a name in `processor.tasks`, what the model was trained for. By default the one
            that the instruction is a wording of, whatever its case and punctuation; without an instruction the first.
        instruction: free text, put after the audio, or the name of a task, to ask in its words.
        chunk_length_s: a longer recording is worked on in pieces of at most so many seconds, cut at pauses, where the
            task allows it (`in_pieces`); default: the encoder's window (30 s), 0: never.
        return_timestamps: add "chunks" where the task allows pieces: [{"timestamp": (start, end) in seconds, "text"},
            …], of each piece (True), or of each word ("word"; with an alignment head, see word_times_audiophi.py).
        return_confidence (False): with both ears add "words" where the task allows pieces: [{"text", "confidence"}, …],
            from 0 to 1 (confidence_audiophi.py); chunks of words have theirs, too.
        sampling_rate: Hz, of bare arrays.
        batch_size (1), num_workers (0): rows decoded at a time; processes that read and prepare them.
        everything else, or `generate_kwargs={…}`: for `generate`, say max_new_tokens (512), num_beams,
            generation_config, or `streamer`, for one input; streaming decodes without beams unless num_beams is given.
    What the task's settings in the generation config say (beams, the alignment's share, …) holds where the call says
    nothing else. A free question that is no task's is decoded plainly.

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
        given = {**self._forward_params["generate_kwargs"], **(kwargs.get("generate_kwargs") or {}), **kwargs}
        streamer = given.get("streamer")
        try:
            if isinstance(text, str):
                if kwargs.setdefault("instruction", text) != text:
                    raise ValueError("text= is the instruction, give only one of them")
                text = None
            inputs = [value for value in (inputs, audio, text) if value is not None]
            if len(inputs) != 1:
                raise ValueError(
                    f"give audio, rows or chats once, not {len(inputs)} times; text= may also be an instruction"
                )
            inputs = inputs[0]
            preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
            preprocess = {**self._preprocess_params, **preprocess}
            reader = RowReader(self.processor, **preprocess)
            settings = {**self._forward_params["generate_kwargs"], **forward["generate_kwargs"]}
            postprocess = {**self._postprocess_params, **postprocess}
            self.engine.arguments(preprocess.get("task"), **settings)  # a wrong argument is no row's fault
            alone = is_one_input(inputs)
            if streamer is not None and not alone:
                raise ValueError("a streamer takes one input at a time")
            batch_size = (batch_size or self._batch_size or 1) if streamer is None else 1
            rows = [inputs] if alone else undecoded(inputs)
            how = {"generate_kwargs": settings, "batch_size": batch_size}
            how["with_times"] = postprocess.get("return_timestamps") == "word"
            how["with_confidence"] = bool(postprocess.get("return_confidence"))
            results = Results(
                loader(rows, reader, batch_size, num_workers or self._num_workers),
                lambda batch: self.forward(batch, **how),
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
        task=None,
        instruction=None,
        chunk_length_s=None,
        return_timestamps=None,
        return_confidence=None,
        sampling_rate=None,
        generate_kwargs=None,
        **kwargs,
    ):
        if chunk_length_s is not None and not (
            isinstance(chunk_length_s, Real) and (not chunk_length_s or chunk_length_s >= 1)
        ):
            raise ValueError(f"chunk_length_s={chunk_length_s!r}: expected 0 (never cut) or at least 1 second")
        if return_timestamps not in (None, True, False, "word"):
            raise ValueError(f'return_timestamps={return_timestamps!r}: expected "word", True (of pieces) or False')
        if return_timestamps == "word" and self.model.model.alignment is None:
            raise ValueError('return_timestamps="word" needs an alignment head, which this model does not have')
        preprocess = {"task": task, "instruction": instruction, "chunk_length_s": chunk_length_s}
        preprocess = {**preprocess, "sampling_rate": sampling_rate}
        if task is not None or instruction is not None:
            RowReader(self.processor).request(task, instruction)  # a wrong one is no row's fault
        if return_confidence and self.model.config.hear_with != "both" and kwargs.get("hear_with") != "both":
            raise ValueError(f"return_confidence: {NEEDS_BOTH}")
        postprocess = {"return_timestamps": return_timestamps, "return_confidence": return_confidence}
        twice = sorted({*(generate_kwargs or {})} & {*kwargs})
        if twice:
            raise ValueError(f"given twice, directly and in generate_kwargs: {', '.join(twice)}")
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {"generate_kwargs": {**(generate_kwargs or {}), **kwargs}},
            {name: value for name, value in postprocess.items() if value is not None},
        )

    @cached_property
    def engine(self):
        return Engine(self.model, self.processor)

    @property
    def window_seconds(self):
        """What the encoder takes at once; None: any length."""
        return window_seconds(self.processor)

    def preprocess(self, row, **arguments):
        """See `RowReader.read`."""
        return RowReader(self.processor, **arguments).read(row)

    def _forward(self, rows, generate_kwargs=None, batch_size=1, with_times=False, with_confidence=False):
        """Rows of `preprocess`, or {"error"} → per row {"answers": one per prompt, "seconds"} or {"error"}.
        `with_times`, `with_confidence`: of the words, where a row is a recording in pieces."""
        settings, answers, groups = generate_kwargs or {}, {}, {}
        for number, row in enumerate(rows):
            for piece in range(len(row.get("prompts", ()))):
                more = row["seconds"] is not None
                key = (row["task"], row["continued"], with_times and more, with_confidence and more)
                groups.setdefault(key, []).append((number, piece))
        total, stream = sum(map(len, groups.values())), None
        if settings.get("streamer") is not None and total > 1:
            space = self.tokenizer.encode(" ", add_special_tokens=False)
            ends = self.engine.arguments(**settings)["generation_config"].eos_token_id
            stream = OneStreamOfSeveral(settings["streamer"], space, ends)
            settings = {**settings, "streamer": stream}
        for (task, continued, timed, sure), places in groups.items():
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                if stream is not None:
                    stream.last = len(answers) + len(batch) == total
                prompts = [rows[number]["prompts"][piece] for number, piece in batch]
                asked = {"task": task, "continued": continued, **settings}
                asked |= {"with_times": timed, "with_confidence": sure}
                answers.update(zip(batch, self._answers(prompts, asked), strict=True))
        results = []
        for number, row in enumerate(rows):
            own = [answers[number, piece] for piece in range(len(row.get("prompts", ())))]
            errors = [row["error"]] if "error" in row else [answer for answer in own if isinstance(answer, Exception)]
            results.append({"error": errors[0]} if errors else {"answers": own, "seconds": row["seconds"]})
        return results

    def _answers(self, prompts, asked):
        """Per prompt an `Answer`, or the error it causes (say it is longer than the LLM's context)."""
        try:
            return self.engine(prompts, **asked)
        except ROW_ERRORS as error:
            if len(prompts) == 1:
                return [error]
            return [self._answers([one], asked)[0] for one in prompts]

    # ---- words -> result ---------------------------------------------------------------------------------------------

    def postprocess(self, row, return_timestamps=False, return_confidence=False):
        """A row of `_forward` → the caller's result; see the class."""
        if "error" in row:
            return {"generated_text": None, "error": str(row["error"])}
        answers = row["answers"]
        texts = [answer.texts[0] for answer in answers]
        result = {"generated_text": texts[0] if len(texts) == 1 else " ".join(filter(None, texts))}
        if len(texts) == 1 and len(answers[0].texts) > 1:
            result["alternatives"] = answers[0].texts
        if return_timestamps and row["seconds"] is not None:
            pairs = zip(row["seconds"], texts, strict=True)
            if return_timestamps == "word":
                pieces = zip(row["seconds"], answers, strict=True)
                # The last frame of a piece may reach beyond its end.
                pairs = [
                    ((round(min(begin + a, end), 3), round(min(begin + b, end), 3)), word)
                    for (begin, end), answer in pieces
                    for word, a, b in answer.words
                ]
            result["chunks"] = [{"timestamp": seconds, "text": text} for seconds, text in pairs]
        if return_confidence and row["seconds"] is not None:
            result["words"] = [
                {"text": word, "confidence": sure}
                for text, answer in zip(texts, answers, strict=True)
                for word, sure in zip(text.split(), answer.confidence, strict=True)
            ]
            if return_timestamps == "word":
                for chunk, word in zip(result["chunks"], result["words"], strict=True):
                    chunk["confidence"] = word["confidence"]
        return result

    def save_pretrained(self, save_directory, **kwargs):
        """Model and processor, complete: the base class forgets the processor and writes its parts twice."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
