"""What a row tells about itself without a look at its files: whether it can be used, and what is asked of all rows."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from audiophi.data.alignment_text import normalise_transcript
from audiophi.data.example import Clip, Example, longest
from audiophi.tasks import TASKS
from processing.audio_io import MAX_SECONDS, AudioError, check_file

from .feature_cache import hash_audio

# How long a clip would be that is known by its words only, for batches by seconds: what English is read at.
CHARACTERS_PER_SECOND = 15


class Facts(NamedTuple):
    """Of a row its `id`, and the `reason` why it cannot be used.

    Of its clips the lengths (s), None where a file has to be asked, the files, and the hashes of what lies in no file.
    The bytes of its longest prompt's text with the answer, and its turns, none where its task asks in its own words;
    whether clip tokens can learn from it; for the alignment what is said, and the words that say what is heard.
    """

    id: str
    reason: str | None = None
    lengths: tuple[float | None, ...] = ()
    files: tuple[str | None, ...] = ()
    hashes: tuple[str | None, ...] = ()
    bytes: int = 0
    turns: int = 0
    described: bool = False
    said: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()


def facts_of(example: Example, text_case: str) -> Facts:
    """`text_case`: see `normalise_transcript`."""
    task, name, clips = TASKS[example.task], example.id, example.clips
    facts = Facts(name, files=tuple(map(file_of, clips)))
    if lacks_words(example, text_case):
        return facts._replace(reason="has no text")
    try:
        hashes = tuple(None if file_of(clip) or clip.simulated else hash_held(clip, name) for clip in clips)
        lengths = tuple(clip.seconds or (None if file_of(clip) else measure_seconds(clip, name)) for clip in clips)
    except (AudioError, OSError) as error:
        return facts._replace(reason=str(error))
    asked = longest(example)
    said = (clip.transcript for clip in clips if clip.transcript is not None)
    sounds = (text for text in map(task.sounds, example.references) if text is not None)
    return facts._replace(
        lengths=lengths,
        hashes=hashes,
        bytes=text_bytes(asked, (task.target(text, text_case) for text in example.references)),
        turns=len(asked.messages),
        described=any(clip.described for clip in clips),
        said=tuple(normalise_transcript(text, text_case) for text in said),
        sounds=tuple(normalise_transcript(text, text_case) for text in sounds),
    )


def questions_of(example: Example) -> Iterator[tuple[str | None, str | None, str]]:
    """(task, kind, wording) of what is asked about the clip of a row, what a demo offers; task None where the row asks
    in its own words."""
    if len(example.clips) != 1:
        return
    for question in example.questions:
        if question.templates:
            yield example.task, question.kind, question.wordings[0]
    if [message["role"] for message in example.messages] == ["user"]:
        yield None, example.kind, " ".join(filter(None, texts_of(example)))


def lacks_words(example: Example, text_case: str) -> bool:
    """Whether nothing that can be learned is left of a right answer."""
    task = TASKS[example.task]
    return any(text.strip() and not task.target(text, text_case).strip() for text in example.references)


def file_of(clip: Clip) -> str | None:
    """The path of a clip whose audio is in a file of its own."""
    audio = clip.audio or {}
    return audio.get("path") if audio.get("bytes") is None and "array" not in audio else None


def missing_file(example: Example) -> str | None:
    """The path of a clip that is not there."""
    paths = [(clip.audio or {}).get("path") for clip in example.clips]
    return next((path for path in paths if path and not Path(path).exists()), None)


def text_tokens(example: Example) -> int:
    """About how many tokens of text an example has at most: a third of its bytes."""
    return text_bytes(longest(example), example.references) // 3 + 1


def text_bytes(example: Example, answers: Iterable[str]) -> int:
    """Bytes of the text of an example's turns and of the longest of its answers."""
    return sum(len(text.encode()) for text in [max(answers, key=len, default=""), *texts_of(example)])


def texts_of(example: Example) -> Iterator[str]:
    """The texts of an example's turns."""
    for message in example.messages:
        content = message["content"]
        yield from [content] if isinstance(content, str) else [item.get("text", "") for item in content]


def hash_held(clip: Clip, name: str) -> str:
    """`hash_audio` of what a row itself holds: a file's bytes, or samples with their rate. AudioError where it holds
    nothing."""
    audio = clip.audio or {}
    if audio.get("bytes") is not None:
        return hash_audio(audio["bytes"])
    if "array" not in audio:
        raise AudioError(f"{name}: has no audio.")
    samples = np.asarray(audio["array"], dtype=np.float32)
    return hash_audio(f"{audio.get('sampling_rate')} ".encode() + samples.tobytes())


def measure_seconds(clip: Clip, name: str) -> float:
    """Length of a clip, from the file's header where possible, else by decoding; of a simulated one estimated. Raises
    AudioError or OSError."""
    if clip.simulated:
        return max(1, len(clip.transcript)) / CHARACTERS_PER_SECOND
    audio = clip.audio
    if audio is not None and (audio.get("bytes") is not None or audio.get("path")):
        try:
            if audio.get("bytes") is None:
                check_file(audio["path"])
            info = soundfile.info(audio["path"] if audio.get("bytes") is None else io.BytesIO(audio["bytes"]))
            if info.frames > 0:
                seconds = info.frames / info.samplerate
                if seconds <= MAX_SECONDS:
                    return seconds
        except AudioError:
            raise
        except (RuntimeError, TypeError, ValueError, OSError):
            pass  # not a container of libsndfile's: decoding tells more
    return len(clip.read(name)) / 16000
