"""The area under the ROC curve of several labels."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.classification import MultilabelAUROC
from torchmetrics.utilities import dim_zero_cat


class MeanAUROC(MultilabelAUROC):
    """Averaged over the labels that some images have and others have not; NaN without one, as in the report.

    torchmetrics' own average counts the others as 0.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average=None)

    def compute(self) -> Tensor:  # type: ignore[override]
        labels = dim_zero_cat(self.target)
        has_both = (labels.amin(0) == 0) & (labels.amax(0) == 1)
        areas: Tensor = super().compute()
        return areas[has_both].mean()
