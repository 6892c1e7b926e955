"""The demo as its users have it: the real checkpoint, a server of its own, Chromium without a window.

$DEMO_SCREENSHOT=FILE.png: also take a picture of the page with its answer to the sample.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import pytest
import soundfile as sf

from audiophi.evaluation.text_normalization import normalize

ROOT = Path(__file__).resolve().parents[1]
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,870"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
SAMPLE, SPOKEN = ROOT / "audiophi/samples/man.ogg", "our flight to oslo was late by two hundred and nine minutes"
MODEL = "audiophi-tiny"
SECONDS = 240  # for the model to answer, on a machine with other things to do


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """SAMPLE as a WAV file."""
    path = tmp_path_factory.mktemp("speech") / "spoken.wav"
    sf.write(path, *sf.read(SAMPLE))
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, process id) of `audiophi demo`."""
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as output:
        command = [sys.executable, "-u", "-m", "audiophi", "demo", "--model", ROOT / "checkpoints" / MODEL]
        server = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        end, found = time.monotonic() + SECONDS, None
        while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield found[0], server.pid
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def browse(served, speech, tmp_path):
    """The page, open, with a microphone that hears the speech."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}/profile", f"--use-file-for-fake-audio-capture={speech}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        browser.get(served[0])
        yield Page(browser)
    finally:
        browser.quit()


class Page:
    """What a user does and sees."""

    def __init__(self, browser):
        self.browser = browser

    def wait(self, see, seconds=60):
        """The first true value of `see()`."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if seen := see():
                    return seen
            except WebDriverException:  # not there yet, or just replaced
                pass
            time.sleep(0.1)
        raise AssertionError(f"not seen in {seconds} s; the page: {self.text()[-2000:]}")

    def find(self, css):
        return self.browser.find_element("css selector", css)

    def button(self, text):
        """The one with these words, or below which they are."""
        found = self.browser.find_elements("css selector", ".gallery-item, button")
        return next((one for one in found if one.text.strip() == text), None)

    def text(self):
        return self.find("body").text

    def upload(self, path):
        self.wait(lambda: self.find("#audio input[type=file]")).send_keys(str(path))

    def answer(self):
        return self.find("#answer textarea").get_attribute("value")

    def status(self):
        return self.find("#status").text


def cpu_seconds(process):
    """What a process has used (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_spoken(words):
    """Whether most of what was said is there."""
    return jiwer.wer(normalize(SPOKEN), normalize(words)) < 0.5


def test_upload_ask_and_see_the_words_come(browse, speech):
    browse.upload(speech)
    browse.wait(lambda: browse.find("#plot img").get_property("naturalWidth") > 500)
    browse.wait(lambda: browse.find("#go").is_enabled())
    browse.find("#go").click()
    draft = browse.wait(lambda: browse.status().startswith("Word by word") and browse.answer(), SECONDS)
    browse.wait(lambda: browse.status().startswith("Done (greedy)"), SECONDS)
    words = browse.answer()
    assert len(draft.split()) <= len(words.split())
    assert is_spoken(words), words
    # Nothing on the page comes from anywhere else: it works without a network, and tells nobody.
    loaded = browse.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    here = browse.browser.current_url
    assert len(loaded) > 10 and [name for name in loaded if not name.startswith((here, "data:", "blob:"))] == []


def test_a_sample_a_trained_question_and_the_alignments_reading(browse):
    """All of it by clicks: no file, nothing to type."""
    browse.wait(lambda: browse.button(SAMPLE.stem)).click()
    browse.wait(lambda: browse.find("#plot img").get_property("naturalWidth") > 500)
    browse.find("#go").click()
    browse.wait(lambda: browse.status().startswith("Done"), SECONDS)
    assert is_spoken(browse.answer()), browse.answer()
    browse.find("#how button").click()
    heard = browse.wait(lambda: browse.find("#heard").text)
    assert {*SPOKEN.lower().rstrip(".").split()} & {*heard.split()}, heard
    browse.button("What is the last word?").click()
    browse.wait(lambda: browse.find("#instruction textarea").get_property("value") == "What is the last word?")
    browse.find("#go").click()
    browse.wait(lambda: browse.status().startswith("Listening"))
    browse.wait(lambda: browse.status().startswith("Done"), SECONDS)
    assert len(browse.answer().split()) == 1, browse.answer()
    if path := os.environ.get("DEMO_SCREENSHOT"):
        browse.wait(lambda: browse.find("#heard").text)
        browse.browser.set_window_size(1280, 1600)
        time.sleep(1)
        browse.browser.save_screenshot(path)


def test_stop_while_it_writes(browse, speech, served):
    """The words stay, the model rests, and the next one is answered."""
    browse.upload(speech)
    browse.wait(lambda: browse.find("#plot img").get_property("naturalWidth") > 500)
    for _ in range(2):
        browse.find("#go").click()
        browse.wait(lambda: browse.status().startswith("Word by word") and browse.answer(), SECONDS)
        browse.find("#stop").click()
        browse.wait(lambda: browse.status() == "Stopped.")

        def idle():
            before = cpu_seconds(served[1])
            time.sleep(1)
            return cpu_seconds(served[1]) - before < 0.2

        browse.wait(idle, 15)
        assert browse.status() == "Stopped." and browse.answer()


def test_record_and_ask(browse, speech):
    """The microphone plays the clip over and over; the recording is stopped after a while."""
    browse.wait(lambda: browse.find("#audio button[aria-label='Record audio']")).click()
    browse.wait(lambda: browse.find("#audio .record-button")).click()
    time.sleep(sf.info(speech).duration)
    browse.wait(lambda: browse.find("#audio .stop-button")).click()
    browse.wait(lambda: browse.find("#plot img").get_property("naturalWidth") > 500)
    browse.find("#go").click()
    browse.wait(lambda: browse.status().startswith("Done"), SECONDS)
    assert {*browse.answer().split()} & {*SPOKEN.lower().split()}


def test_what_is_no_audio_gets_a_message(browse, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio at all")
    browse.upload(tmp_path / "notes.wav")
    browse.wait(lambda: "notes.wav: not audio that" in browse.text())
    assert "Traceback" not in browse.text() and str(ROOT) not in browse.text()


def test_without_audio_it_asks_for_some(browse):
    browse.wait(lambda: browse.find("#go").is_enabled())
    browse.find("#go").click()
    browse.wait(lambda: "nothing to hear yet" in browse.text())
