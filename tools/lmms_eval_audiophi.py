"""AudioPhi in lmms-eval (EvolvingLMMs-Lab/lmms-eval), so that others' benchmarks of audio can be run with others' code.

    pip install "lmms-eval[audio]" "filelock<4"     # 0.7.3; in an environment of its own, it brings much along
    python tools/lmms_eval_audiophi.py --tasks librispeech_test_clean --batch_size 8 --output_path OUT \
        --model_args pretrained=checkpoints/audiophi-tiny,task=transcribe

All arguments are lmms-eval's, which are read behind `--model audiophi`; several GPUs with `accelerate launch` before
it. model_args:

    pretrained  a checkpoint, folder or Hub id
    task        one of the checkpoint's tasks, which is asked in its own words instead of the benchmark's: an ASR
                benchmark's prompt is no wording that a small model knows
    dtype       float32, bfloat16, ...
    others      settings of decoding that go before the benchmark's, say num_beams=5

What cannot be answered (a clip that cannot be read, a prompt that is too long) is counted, told, and answered with "".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import Accelerator  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest  # noqa: E402
from lmms_eval.utils import Collator  # noqa: E402
from loguru import logger  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import pipeline  # noqa: E402

import modeling_audiophi  # noqa: E402, F401

SAMPLING = ("temperature", "top_p", "top_k")  # what benchmarks also say where nothing is sampled


class AudioPhi(lmms):
    """A checkpoint as lmms-eval asks it. See above for the arguments."""

    def __init__(self, pretrained, task=None, dtype="float32", device=None, batch_size=1, max_batch_size=None, **given):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else device
        self.pipe = pipeline("audio-text-to-text", model=pretrained, dtype=dtype, device=self.device)
        if task is not None and task not in self.pipe.processor.tasks:
            raise ValueError(f"task={task}: {pretrained} knows {', '.join(self.pipe.processor.tasks) or 'none'}")
        self.pipe.engine.arguments(**given)  # a wrong one is found out before the data is there
        self.task, self.batch_size, self.given = task, int(batch_size), given

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to requests, whose `args` are (prompt, settings, document -> its clips, number, task, split)."""
        order = Collator([request.args for request in requests], lambda args: -len(args[0]), grouping=True)
        answers, errors = [], []
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="AudioPhi")
        for batch in order.get_batched(n=self.batch_size):
            rows = []
            for prompt, _, clips_of, number, task, split in batch:
                clips = clips_of(self.task_dict[task][split][number])
                rows.append({"audio": clips, "instruction": self.task or prompt})
            settings, until = settings_of(batch[0][1])
            results = self.pipe(rows, batch_size=self.batch_size, **{**settings, **self.given})
            for (prompt, asked, *_), result in zip(batch, results, strict=True):
                errors += [result["error"]] if "error" in result else []
                text = result["generated_text"] or ""
                for end in until:
                    text = text.split(end)[0]
                answers.append(text)
                self.cache_hook.add_partial("generate_until", (prompt, asked), text)
            progress.update(len(batch))
        progress.close()
        if errors:
            logger.warning(f"{len(errors)} of {len(requests)} answers are empty, the first because: {errors[0]}")
        return order.get_original(answers)

    def loglikelihood(self, requests):
        raise NotImplementedError("AudioPhi answers in words; choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("AudioPhi answers one turn; choose a task of output_type generate_until")


def settings_of(asked: dict) -> tuple[dict, list[str]]:
    """A benchmark's generation_kwargs -> (what `generate` takes, strings that end an answer)."""
    until = asked.get("until") or []
    sampled = asked.get("do_sample", bool(asked.get("temperature")))
    dropped = ("until", "do_sample", *(() if sampled else SAMPLING))
    settings = {name: value for name, value in asked.items() if name not in dropped and value is not None}
    return {**settings, "do_sample": sampled}, [end for end in ([until] if isinstance(until, str) else until) if end]


def register() -> None:
    """Tells lmms-eval of `--model audiophi`."""
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("audiophi", "tools.lmms_eval_audiophi.AudioPhi"))


if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate

    register()
    sys.argv[1:1] = ["--model", "audiophi"]
    cli_evaluate()
