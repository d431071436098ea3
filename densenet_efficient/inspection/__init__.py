"""Looking into a network: feature maps, Grad-CAM, first-layer filters, the reuse of features; and their pictures."""

from .maps import feature_maps, feature_reuse, first_filters, grad_cam

__all__ = ["feature_maps", "feature_reuse", "first_filters", "grad_cam"]
