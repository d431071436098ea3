"""Which bottleneck outputs the level "bottleneck" saves nevertheless: those that make no step's peak higher.

The peak of a step is the backward of one block, mostly of the first, whose maps are the largest. By then the later
blocks have given back what they saved, so that they may save some of their bottlenecks for nothing. For each byte those
of a block's last layers spare the most multiply-adds: they read the most channels.

How many are free follows from the proportions of the network alone, not from the images: it is found once, for images
that every stage halves evenly. Of other sizes the later blocks have fewer pixels yet. In one and three dimensions, and
where a layer's last convolution has no kernel of its own, temporaries make other peaks: there none is free.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .. import fusion
from ..kernels import spatial
from ..modules import take_stage
from ..operator_calls import StageBlock
from ..stage import HEAD, TRANSITION
from .shapes import BlockShape, NetworkShape, Parameters, StemShape, block_shape
from .timeline import OPTIMIZERS, Optimizer, TrainingStep

IMAGES = 64  # more than are recomputed together
LAST_SIDE = 7  # of the last block's maps, as of 224x224 images
ELEMENT = 4  # bytes
NO_PARAMETERS = Parameters(0, 0, 0, 0)


def usual_shape(children: list[nn.Module], device: str) -> NetworkShape | None:
    """The activations of a network, whose features are ``children``, for images of a usual size.

    None where anything else lies on the way: nothing is known of its memory.
    """
    stem = fusion.take_stem(children)
    conv, rest = (stem[0], stem[2]) if stem is not None else (next(iter(children), None), children[1:])
    stages = []
    while rest:
        stage = take_stage(rest, with_head=True)
        if stage is None or not _is_known(stage[1], stage[2]):
            return None
        stages.append(stage)
        rest = rest[2:]
    if not stages or not isinstance(conv, nn.Conv2d):
        return None
    sides = [LAST_SIDE * 2**index for index in reversed(range(len(stages)))]
    blocks = [_block(*stage, side, device) for stage, side in zip(stages, sides, strict=True)]
    return NetworkShape(IMAGES, _stem(conv, sides[0], stem is not None), blocks, NO_PARAMETERS)


def _is_known(layers: list[fusion.LayerParts], stage_exit: fusion.StageExit) -> bool:
    return stage_exit.kind in (TRANSITION, HEAD) and all(
        layer.spatial_dims == 2 and spatial.has_kernel(layer.convolutions[-1].weight, layer.dilation)
        for layer in layers
    )


def _block(
    block: StageBlock, layers: list[fusion.LayerParts], stage_exit: fusion.StageExit, side: int, device: str
) -> BlockShape:
    first = layers[0]
    width, growth_rate = first.channels if first.bottleneck else (0, *first.channels)
    in_channels = first.norm1.num_features
    conv = stage_exit.conv
    return block_shape(
        type(block).__name__,
        NO_PARAMETERS,
        images=IMAGES,
        pixels=IMAGES * side**2,
        in_channels=in_channels,
        layers=len(layers),
        growth_rate=growth_rate,
        width=width,
        windows=IMAGES * (side // 2) ** 2 if conv is not None else IMAGES,
        out_channels=conv.out_channels if conv is not None else in_channels + len(layers) * growth_rate,
        element=ELEMENT,
        drops=first.drop_rate > 0,
        device=device,
    )


def _stem(conv: nn.Conv2d, side: int, pools: bool) -> StemShape:
    """Without what torch's convolutions take besides: it is little for so many images."""
    convolved = side * 2 if pools else side
    image = convolved * conv.stride[0]
    conv_out = IMAGES * convolved**2 * conv.out_channels * ELEMENT if pools else 0
    return StemShape(
        NO_PARAMETERS,
        images=IMAGES * image**2 * conv.in_channels * ELEMENT,
        cast=0,
        conv_out=conv_out,
        out=IMAGES * side**2 * conv.out_channels * ELEMENT,
        forward_workspace=0,
        backward_workspace=0,
        recomputed=0,
    )


def share_out(
    usual: NetworkShape | None, levels: Sequence[str], device: str, offloaded: Sequence[bool] = ()
) -> list[int] | None:
    """Of how many layers of each block, the last ones, the bottlenecks are saved at these levels.

    None where ``usual`` is: every block follows its level.
    """
    if usual is None:
        return None

    def peak_of(saved: Sequence[int]) -> int:
        return TrainingStep(usual, levels, OPTIMIZERS["sgd"], device, offloaded, saved).activation_peak

    saved = saved_by_level(usual, levels)
    peak = peak_of(saved)
    candidates = [
        (multiply_adds / block.bottleneck, index)
        for index, (block, level) in enumerate(zip(usual.blocks, levels, strict=True))
        if level == "bottleneck" and block.bottleneck
        for multiply_adds in block.recomputed
    ]
    refused = set()
    for _, index in sorted(candidates, reverse=True):
        more = [count + (index == block) for block, count in enumerate(saved)]
        if index in refused or peak_of(more) > peak:
            refused.add(index)
        else:
            saved = more
    return saved


def saved_by_level(shape: NetworkShape, levels: Sequence[str]) -> list[int]:
    """As `share_out`, where no bottleneck is free."""
    return [block.layers if level == "none" else 0 for block, level in zip(shape.blocks, levels, strict=True)]


def training_step(
    shape: NetworkShape, levels: Sequence[str], optimizer: Optimizer, device: str, offloaded: Sequence[bool] = ()
) -> TrainingStep:
    """A step at these levels, which save what is free."""
    saved = share_out(shape.usual, levels, device, offloaded) or saved_by_level(shape, levels)
    return TrainingStep(shape, levels, optimizer, device, offloaded, saved)


def find_free_bottlenecks(children: list[nn.Module]) -> None:
    """Tells every dense block among the features of a network how many of its bottlenecks are free."""
    blocks = [child for child in children if isinstance(child, StageBlock)]
    levels, offloaded = [block.checkpointing for block in blocks], [block.offload for block in blocks]
    shares = {
        device: share_out(usual_shape(children, device), levels, device, offloaded if device == "cuda" else ())
        for device in ("cpu", "cuda")
    }
    for index, block in enumerate(blocks):
        block.free_bottlenecks = {device: saved[index] for device, saved in shares.items() if saved is not None}
