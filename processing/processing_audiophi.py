"""AudioPhiProcessor: chat messages with audio → the tensors that AudioPhi takes.

A clip's way through this file: `load_audio` (file → waveform) → `_windows` (cut to what the encoder can take at once) →
`window_features.py` (features and mask of one window) → `pad_audio` (a batch of windows). In the prompt a clip is one
placeholder token; the model puts as many embeddings there as its readout keeps, which nobody knows before it heard the
clip.
"""

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .audio_io import load_audio
from .chat_audiophi import (
    HEARD,
    MASK_NAMES,
    PROCESSOR_OPTIONS,
    Renderer,
    is_encoded,
    read_chat,
    split_batch,
    task_code,
    wording_key,
)
from .chat_templates import AUDIO_PLACEHOLDER, TEMPLATES, default_template, named_template
from .feature_extraction_languagebind_audio import LanguageBindAudioFeatureExtractor  # noqa: F401  (registers itself)
from .plain_text import forget_marks, marker
from .window_features import WindowFeatures, window_features, window_lengths

# Special tokens that LLM makers left unused; one of them serves as placeholder where the vocabulary has no free row.
RESERVED_TOKENS = ("<|reserved_special_token_0|>", "<|extra_0|>", "<unused0>", "[unused0]", "<|dummy_0|>", "<reponame>")
# Functions (id, revision) → folder. The installed package adds one (`processing/__init__.py`), which also downloads and
# converts; shipped with a checkpoint, this file is alone.
COMPONENT_FINDERS = []


class AudioPhiProcessor(ProcessorMixin):
    """Feature extractor and tokenizer behind one call.

    Args:
        feature_extractor: of the audio encoder.
        tokenizer: of the LLM; needs a fast one, and gets its end token as padding token where it has none.
        chat_template: Jinja; None takes the LLM's own, or one that fits it (see chat_templates.py).
        audio_token: placeholder in the text, one per clip.
        window_frames: feature frames that the encoder takes at once; longer clips are cut into windows of equal length.
            None = no limit.
        shortest_frames: feature frames that a window has at least, so that it makes a token: shorter ones are padded.
        tasks: {name: {"instructions": wordings, "trained": wordings, "in_pieces": bool}}, what the model was trained
            for: the wordings by which a request is recognised (the first is how one asks), those of training (of free
            questions one of each kind), and whether a long clip may be worked on in pieces. The first task is what the
            pipeline does unasked.
        array_rate: Hz of bare arrays whose rate nobody says, for servers that resample first (vLLM); None refuses them.

    Output of a call: `input_ids` and `attention_mask` (batch, length); `input_features` or `input_values` with their
    mask, one row per *window*, in the order of the prompts; `audio_num_windows` (clips,), how many rows each clip has.
    Chats that end with a prompt also get `asked` (batch, 2): the code of the task that the last user turn asks for (see
    `task_of`; 0: none), and how many clips that turn has.
    """

    _auto_class = "AutoProcessor"  # its files are saved with it

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token=AUDIO_PLACEHOLDER,
        window_frames=None,
        shortest_frames=1,
        tasks=None,
        array_rate=None,
    ):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        forget_marks(tokenizer)
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or self.audio_token_id == tokenizer.unk_token_id:
            raise ValueError(f"audio_token {audio_token!r} is not in the vocabulary of {tokenizer.name_or_path}.")
        self.window_frames = window_frames
        self.shortest_frames = shortest_frames
        if isinstance(tasks, list):  # as saved
            tasks = {task["name"]: {key: value for key, value in task.items() if key != "name"} for task in tasks}
        self.tasks = {
            name: {**task, "instructions": list(task["instructions"])} for name, task in (tasks or {}).items()
        }
        self.array_rate = array_rate
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or default_template(tokenizer))

    @classmethod
    def from_components(
        cls,
        audio: str,
        text: str,
        chat_template: str | None = None,
        window_frames: int | None = None,
        audio_revision: str | None = None,
        text_revision: str | None = None,
    ) -> "AudioPhiProcessor":
        """A processor from the encoder's feature extractor and the LLM's tokenizer (Hub ids or local folders).

        Chooses the placeholder token: "<|audio|>" where the LLM's embedding table has a row to spare, else a token that
        the LLM's makers reserved, else "<|audio|>" as a new row (the model must then resize its embeddings:
        `audio_token_id` is not below `vocab_size`). Its embedding is never read, so any one will do.

        `chat_template`: a name (chatml, llama3, plain, phi) or Jinja; None takes the LLM's own, or one that fits it.
        """
        audio, text = find_component(audio, audio_revision), find_component(text, text_revision)
        feature_extractor = AutoFeatureExtractor.from_pretrained(audio, revision=audio_revision)
        tokenizer = AutoTokenizer.from_pretrained(text, revision=text_revision)
        config = AutoConfig.from_pretrained(text, revision=text_revision)
        rows = config.get_text_config().vocab_size
        tokenizer.padding_side = "left"  # what generation needs; training passes its own side
        audio_token = choose_audio_token(tokenizer, rows)
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [audio_token]}, replace_extra_special_tokens=False)
        if chat_template is None:
            chat_template = default_template(tokenizer, config.model_type)
        else:
            chat_template = named_template(chat_template, tokenizer)
        return cls(feature_extractor, tokenizer, chat_template, audio_token, window_frames)

    def match_model(self, config) -> "AudioPhiProcessor":
        """Take the limits of a window from a model's config; both must mean the same placeholder."""
        if config.audio_token_id != self.audio_token_id:
            raise ValueError(
                f"audio_token_id is {config.audio_token_id} in the model, but {self.audio_token_id} in the processor "
                f"({self.audio_token})."
            )
        self.window_frames, self.shortest_frames = config.window_frames, config.shortest_frames
        if config.hear_with != "alignment" and not self.tasks:  # what the decoder does untrained
            self.tasks = dict(config.decoder_tasks)
        return self

    def to_dict(self) -> dict:
        """As in transformers; tasks as a list, because their order counts and keys are sorted."""
        return {**super().to_dict(), "tasks": [{"name": name, **task} for name, task in self.tasks.items()]}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As in transformers; the padding side is saved by name, not as what the tokenizer last did to a batch."""
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---- audio -------------------------------------------------------------------------------------------------------

    @property
    def sampling_rate(self) -> int:
        """Hz of the waveforms that the encoder takes."""
        return self.feature_extractor.sampling_rate

    @property
    def feature_key(self) -> str:
        """`input_features` or `input_values`."""
        return self.feature_extractor.model_input_names[0]

    @property
    def end_token_id(self) -> int:
        """The token that ends the assistant's turn: the last one in the labels, and where generation has to stop."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return int(encoded["input_ids"][encoded["assistant_masks"].bool()][-1])

    def load_audio(self, source, sampling_rate: int | None = None) -> np.ndarray:
        """Any input form → float32 waveform (samples,) at the encoder's rate. Raises `AudioError`; see audio_io.py."""
        rate = self.array_rate if sampling_rate is None else sampling_rate
        return load_audio(source, target_rate=self.sampling_rate, source_rate=rate)

    def encode_audio(self, audio, sampling_rate: int | None = None) -> dict:
        """One clip → its features, ready to be cached or put into a message as {"type": "audio", "encoded": …}.

        Returns:
            {feature_key: (windows, …), its mask: (windows, frames) bool}
        """
        waveform = self.load_audio(audio, sampling_rate)
        rows = [self.window_features.extract(window) for window in self._windows(waveform)]
        encoded = pad_rows([(features[None], mask[None]) for features, mask in rows], self.time_axis)
        return {self.feature_key: encoded[0], MASK_NAMES[self.feature_key]: encoded[1]}

    def frame_counts(self, num_samples: int) -> list[int]:
        """Feature frames of each window of a clip with `num_samples` samples at the encoder's rate, without looking at
        the audio; `config.num_audio_tokens` says how many adapter tokens they make."""
        return [self.window_features.num_frames(length) for length in self._window_lengths(num_samples)]

    @property
    def window_features(self) -> WindowFeatures:
        """How the feature extractor's family cuts, counts and extracts; see window_features.py."""
        return window_features(self.feature_extractor)

    @property
    def time_axis(self) -> int:
        """Axis of time in the features of a batch: 1, or -1 for Whisper (features before time)."""
        return self.window_features.time_axis

    def _window_lengths(self, num_samples: int) -> list[int]:
        """Samples per window, padding included."""
        features = self.window_features
        shortest = features.shortest_window(self.shortest_frames)
        return window_lengths(features, num_samples, self.window_frames, shortest)

    def _windows(self, waveform: np.ndarray):
        """Cut a waveform (samples,) as `_window_lengths` says; the last window is padded with zeros."""
        start, overlap = 0, self.window_features.overlap
        for length in self._window_lengths(len(waveform)):
            window = waveform[start : start + length]
            yield np.pad(window, (0, length - len(window)))
            start += length - overlap

    def pad_audio(self, clips: list[dict]) -> dict:
        """Batch clips from `encode_audio`, or cached encoder outputs: {"audio_hidden_states": (windows, frames, size),
        "audio_hidden_mask": (windows, frames)}, the mask left out where all frames are real. Beside either there may be
        clips that were never audio: {"heard_ids": (T, K) LLM token ids, "heard_weights": (T, K)}.

        Returns the model's audio inputs, one row per window, and `audio_num_windows` (clips,); nothing for no clips.
        With S clips that were never audio, also `heard_ids` and `heard_weights` (S, longest T, widest K), their
        `heard_lengths` (S,), and `heard_clips` (clips,) bool, which of all they are.
        """
        heard = [clip for clip in clips if HEARD in clip]
        if heard:
            real = self.pad_audio([clip for clip in clips if HEARD not in clip])
            return {**real, **pad_heard(heard), "heard_clips": torch.tensor([HEARD in clip for clip in clips])}
        if not clips:
            return {}
        key = next((key for key in MASK_NAMES if key in clips[0]), None)
        if key is None or any(key not in clip for clip in clips):
            raise ValueError(
                f"clips of one batch must all have the same one of {', '.join(MASK_NAMES)}; got "
                f"{[sorted(clip) for clip in clips]}"
            )
        axis = self.time_axis if key == self.feature_key else 1
        rows = [(clip[key], clip.get(MASK_NAMES[key])) for clip in clips]
        rows = [
            (features, torch.ones(len(features), features.shape[axis]) if mask is None else mask)
            for features, mask in rows
        ]
        features, mask = pad_rows(rows, axis)
        return {
            key: features,
            MASK_NAMES[key]: mask,
            "audio_num_windows": torch.tensor([len(clip[key]) for clip in clips]),
        }

    # ---- text --------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str = "pt",
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **variables,
    ):
        """A chat or a list of chats → prompts. As in transformers, except that

        - what people wrote stays text, whatever it looks like (see plain_text.py);
        - content that is not understood is refused, by turn and item (`read_chat`), and so is a chat that the template
          cannot write; a system message goes into the first user turn if the template has no place for it;
        - the assistant's words are found with any template (see chat_audiophi.py);
        - prompts get `asked`.

        Args:
            conversation: messages {"role", "content"}; a content is a text or a list of items: {"type": "text",
                "text"}, {"type": "audio", and path, url, bytes, array with sampling_rate, or "encoded" from
                `encode_audio`}, or OpenAI's input_text, input_audio and audio_url.
            chat_template: Jinja or one of the names in chat_templates.py, instead of the processor's own.
            tools, documents, variables: for the template. `enable_thinking` is False unless it is given.
            add_generation_prompt: end with what makes the assistant answer.
            continue_final_message: end with the last message's words, left open.
            return_assistant_tokens_mask: adds `assistant_masks` (batch, length), 1 on what the assistant wrote.
            tokenize: False returns the text (or texts) with a placeholder for each clip.
            return_dict: False returns `input_ids` alone.
            processor_kwargs: for `__call__`: padding, padding_side, truncation, sampling_rate, …
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("a prompt cannot continue the last message and ask for a new one.")
        if return_assistant_tokens_mask and (continue_final_message or not (tokenize and return_dict)):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True, return_dict=True and no continue_final_message."
            )
        options = {**(processor_kwargs or {}), **{k: variables.pop(k) for k in PROCESSOR_OPTIONS & set(variables)}}
        conversations, is_batched = split_batch(conversation)
        mark = marker(self.tokenizer)
        chats = [read_chat(conversation, self.audio_token, mark) for conversation in conversations]
        variables |= {"tools": mark(tools), "documents": mark(documents)}
        renderer = Renderer(self.tokenizer, self._resolve_chat_template(chat_template), variables)
        if add_generation_prompt:
            texts = [renderer.prompt(chat.messages) for chat in chats]
        elif continue_final_message:
            texts = [renderer.begun(chat.messages) for chat in chats]
        else:
            texts, spans = zip(*(renderer.whole(chat.messages) for chat in chats), strict=True)
        if not tokenize:
            return list(texts) if is_batched else texts[0]
        if return_tensors not in ("auto", None):
            options["return_tensors"] = return_tensors
        if return_assistant_tokens_mask:
            options["return_offsets_mapping"] = True
        clips = [clip for chat in chats for clip in chat.clips]
        inputs = self(text=list(texts), audio=clips or None, **{"add_special_tokens": False, **options})
        if not return_dict:
            return inputs["input_ids"]
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = masks_of_spans(inputs.pop("offset_mapping"), spans)
        elif add_generation_prompt or continue_final_message:
            tasks = [self._task_of(chat) for chat in chats]
            inputs["asked"] = torch.tensor(
                [[task_code(task) if task else 0, chat.num_asked] for task, chat in zip(tasks, chats, strict=True)]
            )
        return inputs

    def task_of(self, conversation) -> str | None:
        """The task that the last user turn asks for, about one or more clips: the one that has its text among its
        wordings, whatever its case, punctuation and white space, and wherever the audio stands. None where it says
        anything else."""
        return self._task_of(read_chat(split_batch(conversation)[0][0], self.audio_token))

    def _task_of(self, chat) -> str | None:
        key = wording_key(chat.asked or "")
        if not key or not chat.num_asked:
            return None
        named = ((name, wording) for name, task in self.tasks.items() for wording in task["instructions"])
        return next((name for name, wording in named if wording_key(wording) == key), None)

    def _resolve_chat_template(self, chat_template: str | None) -> str:
        """As in transformers; the names of chat_templates.py are understood, too."""
        template = super()._resolve_chat_template(chat_template)
        return named_template(template, self.tokenizer) if template in TEMPLATES else template

    # ---- ProcessorMixin's hooks --------------------------------------------------------------------------------------

    def __call__(self, text=None, audio=None, sampling_rate=None, **kwargs) -> BatchFeature:
        """Prompts and clips → model inputs.

        Args:
            text: prompt or list of prompts with one `audio_token` per clip (or use `apply_chat_template`).
            audio: clip or list of clips in the order of their placeholders, in any form that audio_io.py knows or as
                dicts from `encode_audio`.
            sampling_rate: Hz, for clips that are bare arrays.
            kwargs: for the tokenizer (`padding`, `padding_side`, `truncation`, …), as in every ProcessorMixin.
        Raises:
            AudioError naming a clip that cannot be used; ValueError when placeholders and clips differ in number.
        """
        own = self.tokenizer.init_kwargs
        for name, value in (("padding", own.get("padding", True)), ("return_tensors", "pt")):
            if name not in kwargs.get("text_kwargs", {}):
                kwargs.setdefault(name, value)
        if kwargs.get("return_tensors", "pt") != "pt":
            raise ValueError(
                f"AudioPhiProcessor returns PyTorch tensors only, not return_tensors={kwargs['return_tensors']!r}."
            )
        texts = [text] if isinstance(text, str) else text or []
        first = self.tokenizer.bos_token
        if first and any(isinstance(prompt, str) and prompt.startswith(first) for prompt in texts):
            kwargs.setdefault("add_special_tokens", False)  # as transformers: a rendered chat has its own
        if audio is not None:
            audio = [clip if is_encoded(clip) else self.load_audio(clip, sampling_rate) for clip in as_clips(audio)]
        return super().__call__(text=text, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Audio was loaded in `__call__`, by the project's own rules, so the base class must not fetch it."""
        _, text, _, _ = super().prepare_inputs_layout(text=text)
        return None, text, None, audio

    def _process_audio(self, audio, **kwargs):
        clips = [clip if is_encoded(clip) else self.encode_audio(clip, self.sampling_rate) for clip in audio]
        return self.pad_audio(clips), [self.audio_token] * len(clips)

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            self.feature_key,
            MASK_NAMES[self.feature_key],
            "audio_num_windows",
            "asked",
        ]


def as_clips(audio) -> list:
    """One clip or a list of clips → list of clips. A list of numbers is one clip, and so is a pair of an array and its
    rate."""
    if isinstance(audio, tuple) and len(audio) == 2 and any(part is None or is_scalar(part) for part in audio):
        return [audio]
    if not isinstance(audio, (list, tuple)) or (len(audio) > 0 and isinstance(audio[0], (int, float))):
        return [audio]
    return list(audio)


def is_scalar(value) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def masks_of_spans(offsets, spans: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Per row [(first, past the last character), …] → (rows, length): 1 on the tokens that have a part in them.

    `offsets`: (rows, length, 2), where each token lies in its text; (0, 0) for padding.
    """
    firsts, lasts = torch.as_tensor(offsets).unbind(-1)
    masks = torch.zeros_like(firsts)
    for row, row_spans in enumerate(spans):
        for first, last in row_spans:
            masks[row] |= (firsts[row] < last) & (lasts[row] > first)
    return masks


def pad_rows(rows: list[tuple[torch.Tensor, torch.Tensor]], time_axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join [(features (n, …), mask (n, frames)), …] to one tensor each, zero-padded on the right to the longest."""
    longest = max(mask.shape[1] for _, mask in rows)
    padded = []
    for features, mask in rows:
        missing = longest - mask.shape[1]
        behind = features.dim() - 1 - time_axis % features.dim()
        padded.append(
            (
                torch.nn.functional.pad(features, (0, 0) * behind + (0, missing)),
                torch.nn.functional.pad(mask.bool(), (0, missing)),
            )
        )
    return torch.cat([features for features, _ in padded]), torch.cat([mask for _, mask in padded])


def pad_heard(clips: list[dict]) -> dict[str, torch.Tensor]:
    """`AudioPhiProcessor.pad_audio` for clips that were never audio, zero-padded on the right."""
    ids, weights = ([torch.as_tensor(clip[key]) for clip in clips] for key in (HEARD, "heard_weights"))
    lengths, width = torch.tensor([len(rows) for rows in ids]), max(rows.shape[1] for rows in ids)

    def pad(rows, dtype):
        wide = [torch.nn.functional.pad(row.to(dtype), (0, width - row.shape[1])) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(wide, batch_first=True)

    return {HEARD: pad(ids, torch.long), "heard_weights": pad(weights, torch.float32), "heard_lengths": lengths}


def choose_audio_token(tokenizer, embedding_rows: int) -> str:
    """See `AudioPhiProcessor.from_components`."""
    vocabulary = tokenizer.get_vocab()
    if AUDIO_PLACEHOLDER in vocabulary or len(tokenizer) < embedding_rows:
        return AUDIO_PLACEHOLDER
    return next((token for token in RESERVED_TOKENS if token in vocabulary), AUDIO_PLACEHOLDER)


def find_component(component: str, revision: str | None = None) -> str:
    """A Hub id → the folder that the first of COMPONENT_FINDERS knows, else the id itself, for transformers to find."""
    return next((finder(component, revision) for finder in COMPONENT_FINDERS), component)
