"""torchvision's registry: ``import densenet_efficient.torchvision``, and ``torchvision.models.get_model`` builds
``"efficient_densenet201"`` and the others, as ``list_models``, ``get_model_weights`` and ``get_model_builder`` know
them."""

from __future__ import annotations

from typing import Any

from . import models
from .models import EfficientDenseNet
from .optional import needed

api = needed("torchvision.models._api", "hub")


def _register(network: type[EfficientDenseNet]) -> None:
    architecture = network.architecture
    name = f"efficient_{architecture}"

    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> EfficientDenseNet:
        model = network(**kwargs)
        model.load_torchvision(weights, progress)
        return model

    if architecture in api.list_models():  # where get_model_weights looks for the enum
        build.__annotations__["weights"] = api.get_model_weights(architecture) | None
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`{network.__name__}`; ``weights`` are those of torchvision's {architecture}."
    globals()[name] = api.register_model(name)(build)


for _network in (
    models.EfficientDenseNet121,
    models.EfficientDenseNet161,
    models.EfficientDenseNet169,
    models.EfficientDenseNet201,
    models.EfficientDenseNet264,
):
    _register(_network)
