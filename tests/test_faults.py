"""Runs of train.py in processes of their own that are killed, signalled, starved of disk space and cut off from the
Hub."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from audiophi.training.checkpoints import checkpoint_damage, complete_checkpoints
from tests.loopback_hub import LoopbackHub
from tests.tiny_runs import ALIGN, ENVIRONMENT, LM, ROOT, largest_difference

pytestmark = pytest.mark.faults
PATIENCE = 180  # seconds for anything that must happen
STAGES = (
    {**ALIGN, "steps": 30, "save_steps": 3, "eval_steps": 10, "noise": 0.2},
    {**LM, "steps": 30, "save_steps": 3, "lora": {"r": 2, "dropout": 0.1}},
)


class Job:
    """A recipe that is run as a command, again and again."""

    def __init__(self, folder, settings):
        self.out = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(self.out)}))
        self.train = [str(ROOT / "train.py"), str(folder / "recipe.yaml")]

    def start(self, *launcher, **environment):
        command = [sys.executable, *launcher, *self.train]
        environment = {**ENVIRONMENT, **environment}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, **environment):
        """Runs to the end; what was printed."""
        process = self.start(**environment)
        printed, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        return printed

    def reached(self, stage, step):
        """Whether a run has come that far."""
        with contextlib.suppress(FileNotFoundError):
            for line in (self.out / "history.jsonl").read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # is being written
                    entry = json.loads(line)
                    if entry["stage"] == stage and entry["step"] >= step:
                        return True
        return False

    def wait_until(self, process, stage, step):
        deadline = time.monotonic() + PATIENCE
        while not self.reached(stage, step):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{stage} {step} was not reached"
            time.sleep(0.002)

    def weights(self):
        return load_file(self.out / "final" / "model.safetensors")


@pytest.fixture
def job(settings, tmp_path):
    """job(name, *stages, **keys)"""
    defaults = {"logging_steps": 1}
    return lambda name, *stages, **keys: Job(tmp_path / name, settings(*stages, **defaults, **keys))


def test_ten_kills_change_nothing(settings, job):
    """SIGKILL twice at any moment of the start, and four times at any moment of each stage."""
    data = {**settings()["data"], "speeds": [0.9, 1.1], "eval": settings()["data"]["train"]}
    straight = job("straight", *STAGES, data=data)
    began = time.monotonic()
    straight.run()
    whole = time.monotonic() - began
    killed = job("killed", *STAGES, data=data)
    moments = random.Random(5)
    targets = [(None, 0)] * 2
    targets += [("align", step) for step in sorted(moments.sample(range(1, 28), 4))]
    targets += [("lm", step) for step in sorted(moments.sample(range(1, 28), 4))]
    for stage, step in targets:
        process = killed.start()
        if stage is None:
            time.sleep(moments.uniform(0, 0.5 * whole))
        else:
            killed.wait_until(process, stage, step)
            time.sleep(moments.uniform(0, 0.02))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    assert "resuming at step" in killed.run()
    assert largest_difference(straight.weights(), killed.weights()) == 0
    entries = [json.loads(line) for line in (killed.out / "history.jsonl").read_text().splitlines()]
    for stage in ("align", "lm"):
        logged = [entry["step"] for entry in entries if entry["stage"] == stage and "loss" in entry]
        assert logged == list(range(1, 31)), "the history has gaps or repeats"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_is_told_to_run_the_command_again(job, number):
    straight, stopped = job("straight", *STAGES), job("stopped", *STAGES)
    straight.run(PYTHONHASHSEED="1")
    for stage, step in (("align", 11), ("lm", 5)):
        process = stopped.start(PYTHONHASHSEED="2")
        stopped.wait_until(process, stage, step)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 85, errors
        assert "the same command resumes (exit code 85)" in errors and "Traceback" not in errors
        assert checkpoint_damage(complete_checkpoints(stopped.out / stage)[0]) is None
    stopped.run()
    assert largest_difference(straight.weights(), stopped.weights()) == 0


def test_workers_that_get_the_signal_too_let_the_step_be_finished(job):
    """As schedulers do it: the signal goes to the whole process group, data loader workers included."""
    straight = job("straight", *STAGES, num_workers=2)
    straight.run()
    stopped = job("stopped", *STAGES, num_workers=2)
    environment = {**ENVIRONMENT, "PYTHONHASHSEED": "7"}
    process = subprocess.Popen(
        [sys.executable, *stopped.train],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stopped.wait_until(process, "lm", 4)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 85, errors
    stopped.run()
    assert largest_difference(straight.weights(), stopped.weights()) == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(job):
    """Two processes of one run, as Slurm's srun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [job.start(RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def end_of(processes):
    """(exit codes, what went to stderr)."""
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], "".join(errors for _, errors in ends)


def test_two_processes_stop_together_when_one_gets_the_signal(job):
    straight, stopped = job("straight", *STAGES), job("stopped", *STAGES)
    codes, errors = end_of(start_ranks(straight))
    assert codes == [0, 0], errors
    ranks = start_ranks(stopped)
    stopped.wait_until(ranks[0], "align", 7)
    ranks[1].send_signal(signal.SIGUSR1)
    codes, errors = end_of(ranks)
    assert codes == [85, 85], errors
    assert "stopped by a signal to another process" in errors and "stopped by SIGUSR1" in errors
    codes, errors = end_of(start_ranks(stopped))
    assert codes == [0, 0], errors
    assert largest_difference(straight.weights(), stopped.weights()) == 0


def test_torchrun_passes_sigterm_on(job):
    stopped = job("stopped", *STAGES)
    process = stopped.start("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    stopped.wait_until(process, "align", 7)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, 85), errors
    assert "the same command resumes (exit code 85)" in errors
    (newest, *_) = complete_checkpoints(stopped.out / "align")
    assert int(newest.name.rpartition("-")[2]) >= 7 and checkpoint_damage(newest) is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no full disk can be made")
    if result.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here (root may): {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(job, settings, small_disk, tmp_path):
    straight = job("straight", *STAGES)
    straight.run()
    full = Job(small_disk, settings(*STAGES, logging_steps=1))
    process = full.start()
    full.wait_until(process, "align", 8)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:  # somebody else's data
        while True:
            file.write(bytes(4096))
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "No space left on device" in errors or "write" in errors
    assert str(small_disk) in errors and ("the same command" in errors)
    assert checkpoint_damage(complete_checkpoints(full.out / "align")[0]) is None
    filler.unlink()
    assert "resuming at step" in full.run()
    assert largest_difference(straight.weights(), full.weights()) == 0


def test_the_hub_goes_away_and_comes_back(settings, tmp_path, tiny_whisper_dir, tiny_llm_dir):
    """Components and uploads of a Hub that stops in mid-run: the run ends well, and run again it uploads."""
    hub = LoopbackHub({"hf_writer": "acme"})
    hub.add_folder("acme/tiny-whisper", tiny_whisper_dir)
    hub.add_folder("acme/tiny-llm", tiny_llm_dir)
    components = {"audio": "acme/tiny-whisper", "text": "acme/tiny-llm"}
    keys = {"components": components, "push_to_hub": "acme/tiny", "push_stages": True, "logging_steps": 1}
    job = Job(tmp_path / "job", settings(*STAGES, **keys))
    # Pauses of the length that a test can wait for.
    job.train = ["-c", "import sys, audiophi.training.uploads as u; u.FIRST_PAUSE = 0.5; import train\n"] + job.train
    job.train[1] += "sys.exit(train.main(sys.argv[2:]))"
    with hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_writer",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        process = job.start(**environment)
        job.wait_until(process, "align", 5)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "finished:" in printed and "by hand: hf upload acme/tiny" in printed and "not uploaded:" in printed
    assert "acme/tiny" not in hub.repositories
    assert json.loads((job.out / "upload.json").read_text())["folder"] == str(job.out / "final")
    with hub:
        assert f"uploaded {job.out / 'final'} to acme/tiny" in job.run(**environment)
        files = hub.files("acme/tiny")
    assert files["model.safetensors"] == (job.out / "final" / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "modeling_audiophi.py"} <= files.keys()
    assert not (job.out / "upload.json").exists()
    # The same in one run: there is no Hub when the first stage is uploaded, there is one later.
    late = Job(tmp_path / "late", {**settings(*STAGES, **{**keys, "push_to_hub": "acme/late"})})
    late.train = [*job.train[:2], *late.train]
    with hub:
        process = late.start(**environment)
        late.wait_until(process, "align", 5)
    late.wait_until(process, "lm", 3)
    with hub:
        printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert f"uploaded {late.out / 'final'} to acme/late" in printed
