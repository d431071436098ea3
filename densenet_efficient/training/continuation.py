"""What a run that is continued takes from its checkpoint beside the weights: what was best, whether it had ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from densenet_efficient.training.checkpoint import BEST, LAST
from densenet_efficient.training.parameter_groups import options_of


def is_own_checkpoint(given: Any, output: str | Path) -> bool:
    """Whether --ckpt_path names a checkpoint of the run in `output`, so that it is this run that goes on."""
    if given is None or given in (Path(LAST).stem, Path(BEST).stem):
        return given is not None
    return Path(given).parent.resolve().is_relative_to(Path(output).resolve())


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, with the last checkpoint of each epoch, and with what was best in a run that was moved or copied."""

    @property
    def state_key(self) -> str:
        """Lightning's too, under which older checkpoints keep it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of a checkpoint that lies elsewhere, the best one is not of this run, whatever its name."""
        state = checkpoint["callbacks"].get(self.state_key)
        assert self.dirpath is not None
        if state is None or state["dirpath"] == self.dirpath or not is_own_checkpoint(trainer.ckpt_path, self.dirpath):
            return
        if trainer.strategy.broadcast(self._here(state["best_model_path"]) != ""):
            checkpoint["callbacks"][self.state_key] = self._moved_here(state)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning writes the last one only beside a new best one."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):  # by which it knows what it has just written
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _moved_here(self, state: Mapping[str, Any]) -> dict[str, Any]:
        paths = {
            name: self._here(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = {self._here(path): score for path, score in state["best_k_models"].items()}
        return {**state, **paths, "best_k_models": best, "dirpath": self.dirpath}

    def _here(self, path: str) -> str:
        """The file of this name in this folder; of one that is not there nothing."""
        here = Path(str(self.dirpath), Path(path).name)
        return str(here) if here.is_file() else ""


class StopEarly(EarlyStopping):
    """Lightning's, which by itself looks only after an epoch, so that a run that had stopped would train one more."""

    @property
    def state_key(self) -> str:
        """Lightning's too, under which older checkpoints keep it."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """All but the patience, which is the one given now."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The last moment before the training begins at which every strategy asks."""
        state = checkpoint["callbacks"].get(self.state_key)
        reason = None if state is None else self._why_stopped(state)
        if reason is None:
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            print(f"{trainer.ckpt_path}: this training had stopped early, {reason}")

    def _why_stopped(self, state: Mapping[str, Any]) -> str | None:
        if state.get("stopping_reason") == EarlyStoppingReason.NON_FINITE_METRIC.value:
            return f"since {self.monitor} was not finite"
        if state["wait_count"] < self.patience:
            return None
        return (
            f"after {state['wait_count']} epochs without a better {self.monitor}; with a larger --patience it goes on"
        )


def check_options(path: str | Path, groups: Sequence[Mapping[str, Any]], given: Any) -> None:
    """Raise ValueError if the groups of a checkpoint's optimizer are of other options than a classifier was given.

    They are restored with its state, so that what is given now would go unheard.
    """
    for name, theirs in options_of(groups).items():
        ours = getattr(given, name)
        if theirs != ours if isinstance(theirs, str) else not math.isclose(theirs, ours, rel_tol=1e-9):
            raise ValueError(
                f"{path}: a checkpoint of --model.{name} {_as_given(theirs)}, which cannot go on with "
                f"{_as_given(ours)}; give {_as_given(theirs)}, or start another --output from its weights alone with "
                f"--model.weights {path}"
            )


def _as_given(value: Any) -> str:
    """On the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:.9g}"
