"""What blocking would save: the formula against sums written out, and against what must hold of any."""

import pytest

from benchmarks import blocking
from benchmarks.blocking import Block
from densenet_efficient.models import create_model


def test_a_block_of_two_layers_by_hand() -> None:
    block = Block(layers=2, inputs=64, pixels=10)
    own, ends = 6 * 128 + 5 * 32, 4 * (64 + 64) + 4 * 64
    assert block.moved(1) == 10 * (4 * 64 + 4 * 96 + 2 * own + ends)
    assert block.moved(2) == 10 * (4 * 64 + 4 * 32 + 2 * (own + 4 * 128) + ends)


@pytest.mark.parametrize("name", blocking.LAYERS)
def test_the_blocks_are_those_of_the_network(name: str) -> None:
    features = create_model(name).features
    norms = [features.transition1.norm, features.transition2.norm, features.transition3.norm, features.norm5]
    assert [block.channels for block in blocking.blocks_of(name)] == [norm.num_features for norm in norms]


def test_what_lies_in_the_cache_saves_nothing() -> None:
    assert blocking.saving("densenet121", 1, 4, cache=2**40).saved == 0
    alone, cached = (blocking.saving("densenet201", 8, 4, cache) for cache in (0, blocking.CPU_CACHE))
    assert alone.step == cached.step
    assert alone.saved > cached.saved > 0
    assert cached.groups[2:] == (1, 1)


def test_the_time_is_that_of_the_saved_bytes() -> None:
    saved = blocking.saving("densenet201", 8, 4, blocking.CPU_CACHE).saved
    share = blocking.share_of_time("densenet201", "float32", 8, 2.0, 1e9, blocking.CPU_CACHE)
    assert share == pytest.approx(saved / 2e9)
