"""no_speech: asked for a transcript of silence, noise or music, in which nobody speaks, nothing is to be written.

For training alone: without words there is no error rate."""

from .base import Row, Task, base_example, need_clips, silent
from .transcribe import Transcribe


class NoSpeech(Task):
    name = "no_speech"
    asked_as = Transcribe.name

    def example(self, row: Row):
        need_clips(row)
        return base_example(self, row, clips=silent(row.clips), references=("",), transcript="")
