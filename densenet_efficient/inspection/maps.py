"""What a trained network looks at: feature maps, Grad-CAM, first-layer filters and the reuse of features.

Everything here works on any model that contains the modules it names, at every level of checkpointing: a module that is
observed runs through its own forward. The model runs in the mode that it is in: in training mode its norms
take the images' statistics, and their running ones change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..dimensions import Convolution
from ..operator_calls import StageBlock, unannounced


def feature_maps(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """The output [N, C, H, W] of the module named ``layer``, such as "features.denseblock2", for ``images``.

    Of signals it is [N, C, L], of volumes [N, C, D, H, W].

    Raises:
        ValueError: there is no such module, the forward does not call it, or its output is no feature maps.
    """
    with torch.no_grad(), _captured(model, layer) as outputs:
        model(images)
    return _only(outputs, layer)


def grad_cam(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W], or of one or three dimensions
    layer: str = "features",
    classes: Tensor | None = None,  # [N], int64; the predicted ones if not given
) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): where ``layer`` speaks for a class, [N, H', W'], in [0, 1].

    The layer's channels are weighted by the mean gradient of the class's logit, summed, cut off below zero and divided
    by the largest of each image. The model's own parameters get no gradient.

    Raises:
        ValueError: as `feature_maps`; or the classes are not one per image, or one is outside the model's.
    """
    with torch.enable_grad(), _captured(model, layer) as outputs:
        logits = model(images.detach().requires_grad_())
        maps = _only(outputs, layer)
        chosen = logits.argmax(1) if classes is None else torch.as_tensor(classes, device=logits.device)
        if chosen.shape != logits.shape[:1]:
            raise ValueError(f"expected one class for each of {len(logits)} images, got {list(chosen.shape)}")
        if int(chosen.min()) < 0 or int(chosen.max()) >= logits.shape[1]:
            raise ValueError(f"expected classes from 0 to {logits.shape[1] - 1}, got {chosen.tolist()}")
        scores = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, maps)
    weights = gradient.flatten(2).mean(2)
    cam = torch.einsum("nc,nc...->n...", weights, maps.detach()).relu()
    largest = cam.flatten(1).amax(1).reshape(-1, *[1] * (cam.dim() - 1))
    return cam / largest.clamp_min(torch.finfo(cam.dtype).tiny)


def first_filters(model: nn.Module) -> Tensor:
    """The weight [K, C, kh, kw] of the first convolution, or of one or three dimensions.

    Raises:
        ValueError: the model has no convolution.
    """
    for module in model.modules():
        if isinstance(module, Convolution):
            return module.weight.detach()
    raise ValueError(f"a {type(model).__name__} has no convolution whose filters could be shown")


def feature_reuse(model: nn.Module) -> dict[str, Tensor]:
    """How much each layer uses each earlier one of its block, by the block's name (Huang et al., figure 5).

    Of a block of L layers, [L + 1, L + 1]: row 0 is the block's input, row s its layer s; column t is layer t + 1, and
    the last column what consumes the block, its transition or the classifier. An entry is the mean absolute weight of
    the target's first convolution over the channels of the source; NaN where the source does not come before it.

    Raises:
        ValueError: there is no dense block in ``model.features``, or one is changed so that its weights cannot be told
            apart by source.
    """
    children = list(getattr(model, "features", nn.Module()).named_children())
    reuse = {}
    for index, (name, block) in enumerate(children):
        if isinstance(block, StageBlock):
            behind = children[index + 1 : index + 2]
            is_last = not any(isinstance(child, StageBlock) for _, child in children[index + 1 :])
            consumer = _classifier(model) if is_last else behind[0][1] if behind else None
            reuse[name] = _block_reuse(name, block, consumer)
    if not reuse:
        raise ValueError(f"found no dense block among the features of a {type(model).__name__}")
    return reuse


def _classifier(model: nn.Module) -> nn.Module | None:
    """What the last block's features go to, under MONAI's name too."""
    return model._modules.get("classifier") or model._modules.get("class_layers")


def _block_reuse(name: str, block: StageBlock, consumer: nn.Module | None) -> Tensor:
    layers = block.read()
    if isinstance(layers, str):
        raise ValueError(f"cannot attribute the weights of {name} to its layers: {layers}")
    inputs, growth = layers[0].norm1.num_features, layers[0].channels[-1]
    weights = [layer.conv1.weight for layer in layers] + [_weight_of(consumer, inputs + growth * len(layers), name)]
    reuse = torch.full((len(layers) + 1, len(weights)), torch.nan)
    for target, weight in enumerate(weights):
        by_channel = weight.detach().transpose(0, 1).flatten(1).abs().mean(1)
        sources = by_channel.split([inputs, *[growth] * target])
        reuse[: target + 1, target] = torch.stack([source.mean() for source in sources])
    return reuse


def _weight_of(consumer: nn.Module | None, channels: int, name: str) -> Tensor:
    """[K, C, ...] of the convolution or linear map that reads all channels of a block."""
    for module in consumer.modules() if consumer is not None else ():
        if isinstance(module, Convolution | nn.Linear) and module.weight.shape[1] == channels:
            return module.weight
    raise ValueError(f"nothing behind {name} has weights for its {channels} channels")


@contextmanager
def _captured(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """The outputs of a module while the block of the ``with`` runs; what follows it gets copies to change at will."""
    names = dict(model.named_modules())
    if not layer or layer not in names:
        close = difflib.get_close_matches(layer, names, n=3)
        raise ValueError(
            f"there is no layer {layer!r} in this {type(model).__name__}; close: {', '.join(close) or 'none'}"
        )
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() < 3:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{layer} gives no feature maps [N, C, H, W] but {shape}; name a layer before the pooling")
        outputs.append(output)
        return output.clone()

    handle = names[layer].register_forward_hook(keep)
    try:
        with unannounced():  # that a block runs layer by layer, for once, on purpose
            yield outputs
    finally:
        handle.remove()


def _only(outputs: list[Tensor], layer: str) -> Tensor:
    if not outputs:
        raise ValueError(f"the forward does not call {layer}; name a layer that it does")
    return outputs[-1]
