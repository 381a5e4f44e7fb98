"""Profiles a few steps with torch.profiler: a chrome trace and a table of operators per rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.config.base import Profile
from trainer.training.callbacks import Callback, StepReport
from trainer.training.progress import TrainingProgress

#: Number of operators in the table, which is sorted by self time.
TABLE_ROWS = 40


class Profiler(Callback):
    """Records the steps of ``engine.profile``, each with the events after the previous step.

    Writes ``profile-rank-N.json.gz``, for chrome://tracing or https://ui.perfetto.dev, and
    ``profile-rank-N.txt``. A run that resumes after these steps records nothing; a run that ends
    before the last of them writes what it has recorded.
    """

    def __init__(
        self,
        settings: Profile,
        folder: Path,
        rank: int,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._device, self._warn = settings, device, warn
        self._path = folder / f"profile-rank-{rank}"
        self._profile: profile | None = None

    def on_run_start(self, progress: TrainingProgress) -> None:
        before = max(0, self._settings.first - 1 - progress.step)
        last_step = self._settings.first - 1 + self._settings.steps
        recorded = last_step - progress.step - before
        if recorded <= 0:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        warmup = min(1, before)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=before - warmup, warmup=warmup, active=recorded, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def on_step_end(self, report: StepReport) -> None:
        if self._profile is not None:
            self._profile.step()
            if report.step == self._settings.first - 1 + self._settings.steps:
                self.on_run_end()

    def on_run_end(self) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _write(self, recorded: profile) -> None:
        time = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=time, row_limit=TABLE_ROWS)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.with_suffix(".txt").write_text(table)
            recorded.export_chrome_trace(f"{self._path}.json.gz")
        except OSError as error:
            self._warn(f"{self._path}: profile not written: {error}; training continues")
