"""timm's registry: ``import densenet_efficient.timm``, and ``timm.create_model("efficient_densenet201")`` builds one.

The models are timm's own, built by timm with everything its ``create_model`` takes (``pretrained``, ``features_only``,
``in_chans``, ``num_classes``, ``drop_rate``, ``global_pool``, ...) and converted: the same classes, methods, names and
weights. ``memory_efficient=False`` or ``checkpointing="none"`` saves the bottleneck outputs, as does
``model.set_grad_checkpointing(False)`` later.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .conversion import convert
from .conversion.modules import ConvertedBlock
from .optional import needed

timm = needed("timm.models", "timm")
hub_errors = needed("huggingface_hub.errors", "timm")
timm.register_notrace_module(ConvertedBlock)  # torch.fx, where timm calls it, keeps these blocks whole

__all__: list[str] = []  # of which register_model makes the list

# Each network here, with timm's that it is a variant of and in what it differs.
_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "densenet121": ("densenet121", {}),
    "densenet161": ("densenet161", {}),
    "densenet169": ("densenet169", {}),
    "densenet201": ("densenet201", {}),
    "densenet264": ("densenet121", {"block_config": (6, 12, 64, 48)}),
    "densenet264d": ("densenet264d", {}),
    "densenetblur121d": ("densenetblur121d", {}),
}
_configurations: dict[str, Any] = {
    f"efficient_{tag}": cfg for name in _NETWORKS for tag, cfg in timm.get_arch_pretrained_cfgs(name).items()
}
_configurations["efficient_densenet264.untrained"] = _configurations["efficient_densenet264d.untrained"]
default_cfgs = timm.generate_default_cfgs(_configurations)  # where register_model looks for them


def _register(network: str, original: str, differences: dict[str, Any]) -> None:
    name = f"efficient_{network}"

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        memory_efficient: bool = True,
        checkpointing: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        level = checkpointing or ("bottleneck" if memory_efficient else "none")
        cfg = timm.resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        if _is_graph(kwargs.get("feature_cls")):
            kwargs["feature_cls"] = partial(_converted_graph, name, level)
        try:
            model: nn.Module = timm.model_entrypoint(original)(pretrained, pretrained_cfg=cfg, **differences | kwargs)
        except hub_errors.LocalEntryNotFoundError as error:
            raise RuntimeError(
                f"cannot download the weights of {cfg.hf_hub_id}, and they are not in the cache; put them anywhere and "
                f"pass pretrained_cfg_overlay={{'file': their path}}"
            ) from error
        if not isinstance(model, timm.FeatureGraphNet):
            _convert_all(name, model, level)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's {original}{f' with {differences}' if differences else ''}, converted."
    globals()[name] = timm.register_model(build)


def _is_graph(feature_cls: Any) -> bool:
    """Whether features are to come from torch.fx's graph of the network."""
    return feature_cls is timm.FeatureGraphNet or (isinstance(feature_cls, str) and feature_cls.lower() == "fx")


def _converted_graph(name: str, level: str, model: nn.Module, **kwargs: Any) -> nn.Module:
    """timm's graph of a network that is converted before it is traced."""
    _convert_all(name, model, level)
    graph: nn.Module = timm.FeatureGraphNet(model, **kwargs)
    return graph


def _convert_all(name: str, model: nn.Module, level: str) -> None:
    """Converts ``model``, or raises where a dense block of it cannot be."""
    left = [entry for entry in convert(model, level).left if entry.kind == "DenseBlock"]
    if left:
        raise ValueError(f"{name} cannot be built with these arguments: {left[0].path}: {left[0].note}")


for _network, (_original, _differences) in _NETWORKS.items():
    _register(_network, _original, _differences)
