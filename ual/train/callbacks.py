"""What watches a training run: progress on the terminal, history on disk, signals, non-finite numbers."""

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ual.errors import UserError
from ual.train.folder import RunFolder


class History(TrainerCallback):
    """Append every log of the trainer to history.jsonl."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

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
        self._folder.append_history({"step": state.global_step, **logs})


class ProgressBar(TrainerCallback):
    """Draw steps and the last logged figures; the display, with times, belongs to the caller."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._task is not None
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, description=describe(logs))


def describe(logs: Mapping[str, Any]) -> str:
    """Return the line beside the bar.

    >>> describe({"loss": 1.5, "tokens_per_second": 1234.5, "mean_smoothing": 0.1, "live_fraction": 0.25})
    'training, loss 1.500, 1,234 tokens/s, smoothing 0.100, 25% live'
    """
    parts = [
        f"{title}{logs[name]:{form}}{unit}"
        for name, title, form, unit in (
            ("loss", "loss ", ".3f", ""),
            ("tokens_per_second", "", ",.0f", " tokens/s"),
            ("mean_smoothing", "smoothing ", ".3f", ""),
            ("live_fraction", "", ".0%", " live"),
        )
        if name in logs
    ]
    return ", ".join(["training", *parts])


class StopOnSignal(TrainerCallback):
    """Turn the first SIGINT or SIGTERM into a checkpoint at the end of the step and a clean stop.

    A second SIGINT interrupts at once. `received` is the signal, or None. Handlers are the process's, so
    whoever trains installs them before and restores them after.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over SIGINT and SIGTERM; only a main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Refuse to update from gradients that are not finite; the last checkpoint stays good."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise UserError(
                f"the gradient of step {state.global_step + 1} is not finite; nothing was updated",
                remedy="lower training.learning_rate, or train in float32 or bfloat16; "
                "--resume goes on from the last checkpoint",
            )
