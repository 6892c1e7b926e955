"""Being asked to stop: a scheduler's SIGTERM or SIGUSR1 ends a run with a checkpoint and an exit code that says so.

    python train.py RECIPE; test $? = 85 && requeue

While a stage trains, the optimiser step is finished, a checkpoint is saved and all processes stop together, also when
only one of them got the signal. While data are read and encoded, the run stops at once; what was encoded is kept. In
both cases the same command resumes, and ends with the weights of a run that was never stopped.

In Slurm: `#SBATCH --signal=USR1@120 --requeue` (120 seconds before the end), `srun python train.py RECIPE`, and
`scontrol requeue $SLURM_JOB_ID` when that returns 85. `torchrun` does not hand on its workers' exit codes: it passes
SIGTERM on to them, gives them 30 seconds to save, and itself ends with a code of its own, not 0; SIGUSR1 ends it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import torch
from accelerate import PartialState

EXIT_RESUME = 85  # Linux's error number for "should be restarted", and the code of HTCondor's manual for this
STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """The run was asked to stop, and can be resumed. Exits with code 85 wherever it is not caught."""

    def __init__(self, message: str):
        super().__init__(EXIT_RESUME)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Context manager: receives SIGTERM and SIGUSR1 as long as it lasts. `received`: the first one's name, or None.

    A signal raises Interrupted at once, but inside `deferred()` when that ends. Outside of the main thread, where
    Python cannot handle signals, nothing is received.
    """

    def __init__(self):
        self.received: str | None = None
        self._deferred = 0
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number, frame) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(f"stopped by {self.received}")
        if first:  # not print, which may be what was interrupted
            os.write(2, f"{self.received}: saving a checkpoint after this step, then stopping\n".encode())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals are only noted; at the end Interrupted is raised in all processes if any got one."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if in_any_process(self.received is not None):
            raise Interrupted(f"stopped by {self.received or 'a signal to another process'}")


def in_any_process(here: bool) -> bool:
    """Whether `here` is true in any process; every process must ask."""
    state = PartialState()
    if state.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=state.device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


def ignore_in_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: a scheduler's signal goes to all processes, and the main one still needs its
    workers to finish the step. They end with it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
