"""Where in an image a class was seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_efficient.models import EfficientDenseNet


@torch.inference_mode()
def class_activation(
    model: EfficientDenseNet,
    images: Tensor,  # [N, C, H, W]
    classes: Tensor,  # int64 [N]
) -> Tensor:
    """Grad-CAM of one class per image (Selvaraju et al. 2017, arXiv:1610.02391), as [N, H, W] in [0, 1].

    Behind a DenseNet's last features stand only their mean and the classifier, so that the gradient of a class is the
    classifier's row of it, and no backward is needed (section 3.1 there). The model is to be in evaluation mode.
    """
    features = F.relu(model.features(images))
    weighted = torch.einsum("nchw,nc->nhw", features, model.classifier.weight[classes])
    maps = F.interpolate(F.relu(weighted)[:, None], images.shape[2:], mode="bilinear")[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
