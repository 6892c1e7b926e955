"""Several processes, here two on CPUs: accelerate's configs start them, and they train what one process trains."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import soundfile
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from audiophi.training import sharding
from audiophi.training.bad_rows import BadRows
from audiophi.training.batches import BatchSchedule
from audiophi.training.build import build_model, build_processor
from audiophi.training.checkpoints import complete_checkpoints
from audiophi.training.continuing import check_same_recipe, remember_recipe
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.streams import StreamingSet
from tests.tiny_runs import ALIGN, ENVIRONMENT, LM, ROOT, largest_difference, train

CONFIGS = ROOT / "configs" / "accelerate"
KINDS = {
    "one_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
    "fsdp2": ("FSDP", 8, 1),
    "cpu_2_processes": ("MULTI_GPU", 2, 1),
    "cpu_2_processes_fsdp2": ("FSDP", 2, 1),
}
PATIENCE = 600  # seconds: after that, the processes wait for each other for ever
TOLERANCE = 1e-5  # relative, of losses; the order of additions differs


def test_every_config_is_named_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_config(name):
    kind, processes, machines = KINDS[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type == DistributedType(kind)
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision is None, "the recipe decides"
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), str(ROOT / "train.py"), "recipe.yaml"]
    told, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert told.num_processes == processes and told.mixed_precision == "no"
    if kind == "FSDP":
        assert told.use_fsdp and int(told.fsdp_version) == 2


def test_slurm_script_is_bash():
    script = ROOT / "configs" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "train.py" in script.read_text() and "--signal=USR1@" in script.read_text()


def launch(folder, settings, config="cpu_2_processes", wait=True, script=ROOT / "train.py"):
    """A recipe under `accelerate launch`; the finished process, or the running one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "run")}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += [str(script), str(folder / "recipe.yaml")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **streams)
    if not wait:
        return process
    try:
        printed, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == 0, printed + errors
    return printed


def kill_all(process):
    """Kills a launcher and the processes that it started, which are not of its process group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
    process.communicate()


def weights(folder):
    return load_file(folder / "run" / "final" / "model.safetensors")


def history(out):
    entries = [json.loads(line) for line in (Path(out) / "history.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry], [e for e in entries if "loss" not in e]


# ---- what does not need several processes ----------------------------------------------------------------------------


@given(
    rows=st.integers(2, 70),
    size=st.one_of(st.tuples(st.integers(1, 5), st.none()), st.tuples(st.none(), st.floats(1, 40))),
    accum=st.integers(1, 3),
    world=st.integers(1, 4),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_processes_share_the_data_without_loss_or_repeat(rows, size, accum, world):
    rows = max(rows, accum * world)  # fewer rows than micro-batches in a step: some must be repeated
    seconds = [0.5 + 7 * (i * 37 % 11) for i in range(rows)]
    ranks = [
        list(
            BatchSchedule(
                seconds,
                epochs=1,
                batch_size=size[0],
                batch_seconds=size[1],
                grad_accum=accum,
                rank=rank,
                world_size=world,
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "a process would wait for the others for ever"
    assert all(batch for batches in ranks for batch in batches), "a micro-batch is empty"
    assert sorted(draw.row for batches in ranks for batch in batches for draw in batch) == list(range(rows))


def test_processes_share_a_stream_without_loss_or_repeat(settings, speech, tmp_path):
    recipe = recipe_from_dict(settings(ALIGN, data={"train": [{"path": str(speech)}], "streaming": True}))
    processor = build_processor(recipe)
    build_model(replace(recipe, alignment=None, readout=None), processor, None)
    drawn = []
    for rank in range(2):
        stream = StreamingSet(
            recipe.data.train, BadRows(tmp_path / "bad.jsonl", 0), processor, recipe.stages[0], recipe, rank, 2
        )
        batches = itertools.islice(stream, 2)  # half of the first pass: 16 clips in batches of 4
        drawn += [(example["epoch"], example["id"]) for batch in batches for example in batch]
    assert sorted(drawn) == [(0, number) for number in range(16)]


def test_a_run_is_continued_with_other_processes_but_the_same_steps(settings, tmp_path):
    def recipe(**stage):
        return recipe_from_dict(settings({**ALIGN, **stage}))

    (tmp_path / "align").mkdir()
    remember_recipe(recipe(batch_size=4), tmp_path, 2)
    for same, processes in (({"batch_size": 8}, 1), ({"batch_size": 2, "grad_accum": 2}, 2), ({"batch_size": 2}, 4)):
        check_same_recipe(recipe(**same), tmp_path, processes)
    with pytest.raises(
        RecipeError, match="with 2 processes, 8 clips.*with 1 processes it would be 4 clips.*grad_accum"
    ):
        check_same_recipe(recipe(batch_size=4), tmp_path, 1)
    with pytest.raises(RecipeError, match="other settings of stages.0.batch_size"):
        check_same_recipe(recipe(batch_size=2), tmp_path, 2)
    (tmp_path / "align" / "stage.json").write_text("{}")
    check_same_recipe(recipe(batch_size=4), tmp_path, 1)  # that stage is finished
    (tmp_path / "processes").unlink()  # a run from before it was recorded
    check_same_recipe(recipe(batch_size=4), tmp_path, 1)


def test_fsdp_settings_that_are_not_followed_are_refused(monkeypatch, settings):
    monkeypatch.setattr(sharding, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setenv("AUDIOPHI_USE_FSDP2", "false")
    assert not sharding.take_over()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="fsdp_version is 1, only 2"):
        sharding.take_over()
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(RecipeError, match="fsdp_offload_params is not supported"):
        sharding.take_over()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    assert sharding.take_over() and "ACCELERATE_USE_FSDP" not in os.environ and sharding.take_over()
    with pytest.raises(RecipeError, match="stages.0.precision: FSDP2 has no loss scaling"):
        sharding.check_recipe(recipe_from_dict(settings({**ALIGN, "precision": "fp16"})))


# ---- two processes ---------------------------------------------------------------------------------------------------

TWO = {"ddp": "cpu_2_processes", "fsdp2": "cpu_2_processes_fsdp2"}
SETTLED = {"dropout": 0.0}  # dropout's random numbers depend on the process


def halved(stages):
    return [{**stage, "batch_size": stage["batch_size"] // 2} for stage in stages]


@pytest.mark.faults
@pytest.mark.parametrize("kind", TWO)
def test_two_processes_train_as_one(kind, settings, tmp_path):
    """Loss curve, weights and evaluations of every kind of stage, the global batch being the same."""
    data = {**settings()["data"], "eval": settings()["data"]["train"]}
    stages = (
        {**ALIGN, "eval_steps": 2},
        {**LM, "loss": "both", "lora": {"r": 2, **SETTLED}, "grad_accum": 2, "eval_steps": 2},
        {**LM, "name": "full", "tune": {"llm": "full"}, "max_grad_norm": 0.5},
        {**ALIGN, "name": "encoder", "tune": {"encoder": "full"}},
    )
    keys = {"adapter": {**settings()["adapter"], **SETTLED}, "data": data, "logging_steps": 1}
    one = train(settings(*stages, output_dir=str(tmp_path / "one"), **keys))
    printed = launch(tmp_path / "two", settings(*halved(stages), **keys), TWO[kind])
    if kind == "fsdp2":
        told = re.findall(r"FSDP2: ([\d,]+) of ([\d,]+) parameters are shared .* ([\d,]+) of them lie", printed)
        assert len(told) == len(stages)
        for numbers in told:
            shared, total, first = (int(number.replace(",", "")) for number in numbers)
            assert shared > 0.8 * total and first < 0.55 * shared
    (losses, scores), (losses_of_two, scores_of_two) = history(tmp_path / "one"), history(tmp_path / "two" / "run")
    assert len(losses) == 6 + 4 + 4 + 6, "a step's log is missing"
    assert losses_of_two == pytest.approx(losses, rel=TOLERANCE)
    assert len(scores) == 7 and [{**s, "seconds": 0} for s in scores_of_two] == [{**s, "seconds": 0} for s in scores]
    # Adam turns the rounding of a gradient that nearly cancels into a share of the learning rate (1e-3): 1.3e-5 was
    # seen in one weight of 67,309, all others within 4e-7.
    two = weights(tmp_path / "two")
    apart = torch.cat([(one[name].float() - two[name].float()).abs().flatten() for name in one])
    assert one.keys() == two.keys() and apart.max() < 1e-4 and (apart > TOLERANCE).float().mean() < 1e-4


@pytest.mark.faults
@pytest.mark.parametrize("kind", TWO)
def test_losses_of_some_tokens_at_a_time_are_those_of_all(kind, settings, tmp_path):
    """The backward pass computes logits again, of another number of parts in each process, with a table that is shared
    between them."""
    data = {"train": settings()["data"]["train"]}
    stages = ({**LM, "loss": "both", "tune": {"llm": "full"}, "lora": None, "steps": 3},)
    keys = {"adapter": {**settings()["adapter"], **SETTLED}, "data": data, "logging_steps": 1}
    one = train(settings(*stages, output_dir=str(tmp_path / "one"), **keys))
    script = tmp_path / "train_in_parts.py"
    script.write_text(IN_PARTS)
    printed = launch(tmp_path / "two", settings(*halved(stages), **keys), TWO[kind], script=script)
    parts = [int(number) for number in re.findall(r"(\d+) parts", printed)]
    assert len(parts) == 2 and min(parts) > 3 * 2, printed
    losses, losses_of_two = (history(folder)[0] for folder in (tmp_path / "one", tmp_path / "two" / "run"))
    assert len(losses) == 3 and losses_of_two == pytest.approx(losses, rel=TOLERANCE)
    two = weights(tmp_path / "two")
    apart = torch.cat([(one[name].float() - two[name].float()).abs().flatten() for name in one])
    assert apart.max() < 1e-4 and (apart > TOLERANCE).float().mean() < 1e-4


IN_PARTS = """
import sys
from audiophi.cli import train
from modeling_audiophi import token_losses_audiophi as losses
made, checkpoint, losses.MOST_LOGITS = [], losses.checkpoint, 1
losses.checkpoint = lambda *given, **keys: made.append(1) or checkpoint(*given, **keys)
code = train.main(sys.argv[1:])
print(len(made), "parts", flush=True)
sys.exit(code)
"""


@pytest.mark.faults
def test_checkpoints_go_from_any_number_of_processes_to_any_other(settings, tmp_path):
    """Killed after a checkpoint and resumed otherwise, again and again, until the run is finished."""
    stages = ({**LM, "loss": "both", "steps": 30, "save_steps": 2, "lora": {"r": 2, **SETTLED}},)
    keys = {"adapter": {**settings()["adapter"], **SETTLED}, "logging_steps": 1}
    straight = train(settings(*stages, output_dir=str(tmp_path / "straight"), **keys))
    folder, reached = tmp_path / "moved", 0
    for config in (TWO["ddp"], "one_gpu", TWO["fsdp2"], "one_gpu", TWO["ddp"], TWO["fsdp2"]):
        split = stages if config == "one_gpu" else halved(stages)
        process = launch(folder, settings(*split, **keys), config, wait=False)
        deadline = time.monotonic() + PATIENCE
        try:
            while newest(folder / "run" / "lm") <= reached:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            kill_all(process)
        reached = newest(folder / "run" / "lm")
        assert 0 < reached < 30
    printed = launch(folder, settings(*stages, **keys), "one_gpu")
    assert f"resuming at step {reached}" in printed
    (losses, _), (moved, _) = history(tmp_path / "straight"), history(folder / "run")
    assert moved == pytest.approx(losses, rel=TOLERANCE)
    assert largest_difference(straight, weights(folder)) < TOLERANCE


def newest(stage):
    """Step of a stage's newest complete checkpoint, 0 for none."""
    found = complete_checkpoints(stage)
    return int(found[0].name.rpartition("-")[2]) if found else 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", TWO)
def test_processes_with_unlike_batches_do_not_wait_for_ever(kind, settings, waveform, tmp_path, monkeypatch):
    """Short speech in one process and long sounds in the other, so that each uses other parts of the model; a clip too
    short for its text, from which a process learns nothing; a row of text alone; a last step with an odd clip."""
    for name, seconds, rows in (
        (
            "speech",
            [0.3, 0.5, 0.7, 0.9, 1.1],
            [{"text": word} for word in ("the fox " * 12, "a dog", "it was", "sea", "she")],
        ),
        ("sounds", [2.5, 4.0, 5.0, 6.5], [{"text": "", "label": word} for word in ("bear", "bear", "fox", "fox")]),
    ):
        (tmp_path / name).mkdir()
        for number, (length, row) in enumerate(zip(seconds, rows, strict=True)):
            soundfile.write(tmp_path / name / f"{number}.wav", waveform(length, number), 16000)
            row |= {"audio": f"{number}.wav", "id": f"{name}{number}"}
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sounds = {"path": str(tmp_path / "sounds"), "task": "caption", "label_column": "label"}
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"instruction": "2 + 2?", "answer": "4"}) + "\n")
    sources = [{"path": str(tmp_path / "speech")}, sounds, {"path": str(text)}]
    data = {"train": sources, "eval": [sounds, {"path": str(tmp_path / "speech")}]}
    passes = {"steps": None, "epochs": 3, "batch_size": 1}
    stages = ({**ALIGN, **passes}, {**LM, "loss": "both", **passes, "tune": {"llm": "full"}})
    keys = {"adapter": {**settings()["adapter"], **SETTLED}, "data": data, "logging_steps": 1, "readout": "mixed"}
    keys["clip_tokens"] = 2
    one = [{**stage, "grad_accum": 2} for stage in stages]
    script = tmp_path / "train_without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, values: values)
    train(settings(*one, output_dir=str(tmp_path / "one"), **keys))
    launch(tmp_path / "two", settings(*stages, **keys), TWO[kind], script=script)
    (losses, scores), (losses_of_two, scores_of_two) = history(tmp_path / "one"), history(tmp_path / "two" / "run")
    assert len(losses) > 20 and losses_of_two == pytest.approx(losses, rel=10 * TOLERANCE)
    assert [{**s, "seconds": 0} for s in scores_of_two] == [{**s, "seconds": 0} for s in scores]


# Dropout of the mixed readout and of clip tokens cannot be set.
WITHOUT_DROPOUT = """
import sys
import torch
torch.nn.Dropout.forward = lambda self, values: values
from audiophi.cli import train
sys.exit(train.main(sys.argv[1:]))
"""
GATHER = """
import json, sys
from pathlib import Path
from accelerate import PartialState
rank = PartialState(cpu=True).process_index
from audiophi.training import callbacks
from audiophi.training.cache_filling import encoder_of
from audiophi.training.corpus import BadRows, Corpus
from audiophi.training.recipe import load_recipe, recipe_to_dict

class Transcriber:
    def __init__(self, *arguments):
        pass

    def __call__(self, clips):
        here.extend(clip["num_audio_tokens"] for clip in clips)
        return [{"hypothesis": "a", "hypothesis_align": None, "stopped": True} for clip in clips]

callbacks.AudioPhiTranscriber = Transcriber
recipe, found = load_recipe(sys.argv[1]), []
processor, _, _ = encoder_of(json.dumps(recipe_to_dict(recipe)))
corpus = Corpus(recipe.data.train, BadRows(Path(sys.argv[2]) / f"bad{rank}", 0))
for clips in (16, 7, 1):
    here = []
    development = callbacks.Development(corpus, processor, clips, 2, 5)
    scores, predictions = development.evaluate(None, True)
    found.append({"here": len(here), "ids": [p["id"] for p in predictions], "wer": scores["wer"]})
(Path(sys.argv[2]) / f"rank{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.faults
def test_an_evaluation_gathers_every_row_once(settings, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(ALIGN)))
    (tmp_path / "gather.py").write_text(GATHER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(CONFIGS / "cpu_2_processes.yaml"), str(tmp_path / "gather.py"), str(tmp_path / "recipe.yaml")]
    subprocess.run([*command, str(tmp_path)], env=ENVIRONMENT, timeout=PATIENCE, check=True)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    subprocess.run(
        [sys.executable, str(tmp_path / "gather.py"), str(tmp_path / "recipe.yaml"), str(tmp_path)],
        env=ENVIRONMENT,
        timeout=PATIENCE,
        check=True,
    )
    alone = json.loads((tmp_path / "rank0.json").read_text())
    for a, b, whole, parts in zip(first, second, alone, [(8, 8), (4, 3), (1, 0)], strict=True):
        assert (a["here"], b["here"]) == parts
        assert a["ids"] == b["ids"] == whole["ids"] and len(set(a["ids"])) == sum(parts)
        assert a["wer"] == b["wer"] == whole["wer"]
