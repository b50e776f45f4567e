"""Callbacks of a training run: progress on the terminal, history on disk, signals, non-finite gradients."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ual.errors import Stopped, UserError
from ual.runs.folder import RunFolder
from ual.runs.progress import Progress, Task
from ual.train import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""From a terminal, a launcher, a lost connection, and schedulers before the end of a job's time."""
_ONE_PRESS = 1.0
"""Seconds within which two SIGINTs are one: a terminal and a launcher both send it on Ctrl-C."""


class History(TrainerCallback):
    """Append every log of the trainer to history.jsonl.

    Args:
        folder: of the run.
        seconds: returns the seconds that the run has trained for; each entry records them.
    """

    def __init__(self, folder: RunFolder, seconds: Callable[[], float]) -> None:
        self._folder = folder
        self._seconds = seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = dict(logs or {})
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        self._folder.append_history({"step": state.global_step, **logs, "seconds": self._seconds()})


class ShowProgress(TrainerCallback):
    """Show steps and the last logged figures on the caller's display."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._task = self._progress.task("training", state.max_steps, completed=state.global_step, logs=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._task is not None
        self._task.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._task is not None and logs and (figures := describe(logs)):
            self._task.log(figures)


def describe(logs: Mapping[str, Any]) -> str:
    """Return the figures of a log entry in words; none if it is not about training or evaluation.

    >>> describe({"loss": 1.5, "tokens_per_second": 1234.5, "mean_smoothing": 0.1, "live_fraction": 0.25})
    'loss 1.500, 1,234 tokens/s, smoothing 0.100, 25% loss tokens'
    >>> describe({"eval_loss": 3.5714, "epoch": 1.0})
    'eval_loss 3.571'
    """
    parts = [
        f"{title}{logs[name]:{form}}{unit}"
        for name, title, form, unit in (
            ("loss", "loss ", ".3f", ""),
            ("tokens_per_second", "", ",.0f", " tokens/s"),
            ("mean_smoothing", "smoothing ", ".3f", ""),
            ("live_fraction", "", ".0%", " loss tokens"),
            ("eval_loss", "eval_loss ", ".3f", ""),
        )
        if name in logs
    ]
    return ", ".join(parts)


class StopOnSignal(TrainerCallback):
    """Turn the first of `SIGNALS` into a checkpoint at the end of the step and a clean stop.

    If one process of several receives it, all stop after the same step. A later second SIGINT interrupts at
    once. Outside of training there is no step to save, and a signal raises `Stopped`.

    Attributes:
        received: the signal that all processes stop for, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._mine: signal.Signals | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals within, and then call the handler that the received signal had before.

        Such a handler belongs to a scheduler, which for example queues the job again. Ignored signals (nohup
        ignores SIGHUP) stay ignored. Only the main thread can handle signals; in others nothing changes.
        """
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            handler = before[self._mine] if self._mine else None
            if callable(handler) and handler is not signal.default_int_handler:
                handler(self._mine, None)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals within wait for the end of a step.

        Raises:
            Stopped: a signal arrived after the last agreement; or before, while a finalizer ran, whose
                exceptions Python discards.
        """
        if self._mine:
            raise Stopped(self._mine)
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._mine and not self.received:
            raise Stopped(self._mine)

    def agree(self) -> bool:
        """Return whether any process has received a signal; then `received` is set in all of them."""
        number = distributed.highest(self._mine or 0)
        self.received = signal.Signals(number) if number else None
        return bool(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._mine = self._mine, self._mine or signal.Signals(number)
        if not (self._deferred or self.received):
            raise Stopped(number)
        if again is None:
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _ONE_PRESS:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.agree():
            control.should_save = True
            control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Stop before an update with gradients that are not finite; the last checkpoint remains valid.

    The check is a hook of the innermost optimizer, which both transformers and DeepSpeed (within backward)
    call to change parameters.

    Args:
        suspects: returns the ids of this process's samples that may be the cause.
    """

    def __init__(self, suspects: Callable[[], list[str]] = list) -> None:
        self._suspects = suspects
        self._step = 0
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._step = state.global_step + 1
        while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            optimizer = optimizer.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        self._hook = optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._agree(bool(gradients) and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        # DeepSpeed has stepped or skipped the step; under float16 a skip only lowers the loss scale
        if not args.fp16 and type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
            self._agree(bool(optimizer.step_was_skipped))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step = state.global_step + 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _agree(self, mine: bool) -> None:
        """Stop all processes if any has a gradient that is not finite: partitions differ."""
        if not distributed.highest(mine):
            return
        names = [name for names in distributed.gather(self._suspects()) for name in names]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"the gradient of step {self._step} is not finite; nothing was updated. Samples: {shown}",
            remedy="check these samples; lower training.learning_rate, or train in float32 or bfloat16; "
            "--resume continues from the last checkpoint",
        )
