"""Uploading to the Hub beside the training, which never waits for it and never fails with it.

A finished folder is handed to a process of its own, the command `hf upload`. Where that fails (no network, a Hub that
does not answer, no token) it is tried again, later and later, while training goes on, a last few times at the end of
the run, and whenever the same train.py command is run again. `upload.json` in the run's folder holds what is still to
be uploaded; with each failure the command is printed that does it by hand.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .checkpoints import write_atomically

PENDING_NAME = "upload.json"
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 1800.0  # seconds; a pause is twice the one before
LAST_TRIES = 3  # at the end of a run
LONGEST_UPLOAD = 3600.0  # seconds that the end of a run waits for an upload that is under way


class HubUpload:
    """Keeps the Hub repository `repository` (org/name) at the newest finished folder. For the main process only.

    Args:
        folder: of the run. say: prints a line.
    """

    def __init__(self, repository: str, folder: Path, say: Callable[[str], None]):
        self.repository, self.path, self.say = repository, folder / PENDING_NAME, say
        self._process: subprocess.Popen | None = None
        self._output = None
        self._uploading: dict | None = None
        self._pause, self._next_try = FIRST_PAUSE, 0.0

    def pending(self) -> dict | None:
        """{"folder", "message"} of what is still to be uploaded."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def offer(self, folder: Path, message: str) -> None:
        """To be uploaded from now on instead of what was offered before."""
        write_atomically(self.path, json.dumps({"folder": str(folder), "message": message}))
        self._next_try = 0.0
        self.poll()

    def poll(self) -> None:
        """Call it often: looks after the upload under way, starts one when it is time to. Returns at once."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._ended()
        if self.pending() is not None and time.monotonic() >= self._next_try:
            self._start(self.pending())

    def finish(self) -> None:
        """At the end of a run: waits for the upload, and tries a few more times."""
        for number in range(LAST_TRIES):
            if number:
                time.sleep(max(0.0, min(self._next_try - time.monotonic(), FIRST_PAUSE)))
                self._next_try = 0.0
            self.poll()
            if self._process is not None:
                try:
                    self._process.wait(LONGEST_UPLOAD)
                except subprocess.TimeoutExpired:
                    self.say(f"the upload to {self.repository} takes more than {LONGEST_UPLOAD:.0f} s and is ended")
                    self._process.kill()
                    self._process.wait()
                self._ended()
            if self.pending() is None:
                return
        self.say(f"not uploaded: {self.pending()['folder']}; the same command tries again")

    def close(self) -> None:
        """Ends an upload that is under way; it stays pending."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self, job: dict) -> None:
        self._uploading, self._output = job, tempfile.TemporaryFile()
        # In a session of its own: a scheduler's signal to the run is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "huggingface_hub.cli.hf", *self._arguments(job)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _arguments(self, job: dict) -> list[str]:
        # A repository that does not exist yet is made private: publishing is for people to decide.
        return ["upload", self.repository, job["folder"], ".", "--private", "--commit-message", job["message"]]

    def _ended(self) -> None:
        """Notes how the upload went."""
        failed, self._process = self._process.returncode != 0, None
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        self._output.close()
        if not failed:
            self._pause = FIRST_PAUSE
            if self.pending() == self._uploading:
                self.path.unlink()
            self.say(f"uploaded {self._uploading['folder']} to {self.repository}")
            return
        self._next_try = time.monotonic() + self._pause
        said = next((line for line in reversed(lines) if line.strip()), "no reason given")
        self.say(
            f"cannot upload {self._uploading['folder']} to {self.repository}: {said[:300]}. "
            f"It is tried again in {self._pause:.0f} s; by hand: hf {shlex.join(self._arguments(self._uploading))}"
        )
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
