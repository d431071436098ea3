"""Parameters, gradients and optimizer states divided among the processes: torch's FSDP2, through Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import SyncBatchNorm

from densenet_efficient.models import EfficientDenseNet

FSDP = "fsdp"  # of --trainer.strategy


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes, with the checkpoints of every other strategy."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning's own restoring asks for a state of every parameter, also while the head is trained alone."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_divided(state, optimizer))


def _divided(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, each tensor divided as the parameter that it belongs to."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divided(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value  # such as the number of steps
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    states = {
        name: {key: divided(value, parameter) for key, value in saved["state"][name].items()}
        for name, parameter in zip(names, parameters, strict=True)
        if name in saved["state"]
    }
    return {**saved, "state": states}


def shard(module: LightningModule, model: EfficientDenseNet, mesh: DeviceMesh) -> None:
    """Divide the parameters of `model` among the processes of `mesh`; its norms as the trainer's sync_batchnorm says.

    A DenseNet has few parameters for its activations (those of 201 layers take 77 MiB), so they are gathered at once,
    not part by part: hooks on a block would keep its transition from joining it, and hooks on all features the last
    norm.
    """
    if module.trainer.strategy._layer_sync is not None:  # type: ignore[attr-defined]
        SyncBatchNorm.convert_sync_batchnorm(model)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, EfficientDenseNet.forward_of_frozen_features.__name__)
