"""Trackers of experiments through Ray Tune's own callbacks: TensorBoard, MLflow, Weights & Biases. A trial is a block; a point is a step it committed.

The store is the record: a tracker is for looking on while a sweep runs, and a run goes on without one that fails.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iclgd_dist.config import SweepError
from iclgd_dist.terminal import say
from iclgd_dist.toml_text import unknown

TRACKERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # name -> the package it needs


def check(names: Sequence[str]) -> None:
    """Errors: SweepError for a tracker that is unknown, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SweepError(f"--track: {unknown('tracker', name, TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise SweepError(f"--track {name} needs {TRACKERS[name]}, which is not installed: pip install {TRACKERS[name]}")


def callbacks(names: Sequence[str], sweep: str, folder: Path) -> list[Any]:
    """Return Tune's callbacks; TensorBoard writes to `folder`, the others where their own environment variables say. One that fails is switched off."""
    made: list[Any] = []
    for name in names:
        if name == "tensorboard":
            made.append(_tensorboard(folder))
        elif name == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            made.append(MLflowLoggerCallback(experiment_name=sweep))
        else:
            from ray.air.integrations.wandb import WandbLoggerCallback

            made.append(WandbLoggerCallback(project=sweep))
    return [guarded(name, callback) for name, callback in zip(names, made, strict=True)]


def guarded(name: str, callback: Any) -> Any:
    """Return a callback that hands everything on until it fails, says so once, and from then on does nothing: Tune would end the run."""
    from ray.tune import Callback

    class Guarded(Callback):
        is_on = True

        def _hand_on(self, hook: str, *arguments: Any, **named: Any) -> None:
            if self.is_on:
                try:
                    getattr(callback, hook)(*arguments, **named)
                except Exception as error:  # a tracker may raise anything
                    self.is_on = False
                    say(f"--track {name} is switched off: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    for hook in ("setup", *(hook for hook in dir(Callback) if hook.startswith("on_"))):
        setattr(Guarded, hook, functools.partialmethod(Guarded._hand_on, hook))
    return Guarded()


def _tensorboard(folder: Path) -> Any:
    from ray.tune.logger import TBXLoggerCallback

    class InFolder(TBXLoggerCallback):  # type: ignore[misc]
        """Ray's own, with a run for each block under `folder`, not under Tune's folder, which is gone after the run."""

        def log_trial_start(self, trial: Any) -> None:
            if trial in self._trial_writer:
                self._trial_writer[trial].close()
            self._trial_writer[trial] = self._summary_writer_cls(str(folder / trial.config["block"]), flush_secs=30)
            self._trial_result[trial] = {}

    return InFolder()
