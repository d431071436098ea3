"""Batch norms of several processes synchronised on CPUs too."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy
from torch.nn import SyncBatchNorm


class SynchronisedOnCPUs(DDPStrategy):
    """DDP that converts the norms once it has wrapped the model, since torch refuses to wrap such norms on a CPU.

    torch's own would not run there, but a dense block merges its statistics itself.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert self.model is not None
        SyncBatchNorm.convert_sync_batchnorm(self.model)  # in place: the norms are parts of larger modules
