"""Whatever the shapes, strides, dtypes, levels, variants and modes: outputs, gradients and buffers of the reference."""

import pytest
import torch
from cases import (
    FLOAT64_FLOOR,
    GROUPS,
    LEVELS,
    MODES,
    VARIANTS,
    assert_close,
    difference,
    gathered,
    make_images,
    make_pair,
    step,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT, FULL = 60, 2000
FACTOR = 4  # times the naive network's own error in the same dtype, and of the norm of what is judged:
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Where that is exceeded: times what the exact results change when the images do by this, relative to each pixel.
DISTURBANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

networks = st.fixed_dictionaries(
    {
        "growth_rate": st.integers(1, 9),
        "block_config": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "num_init_features": st.integers(1, 20),
        "bn_size": st.integers(1, 4),
        "checkpointing": st.sampled_from(LEVELS),
        "drop_rate": st.sampled_from([0.0, 0.0, 0.3]),
    }
)
layouts = st.sampled_from(["contiguous", "channels last", "slice", "transposed", "expanded"])


def laid_out(images, layout):
    """The same values with other strides; an expanded batch repeats its first image."""
    if layout == "channels last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        return torch.nn.functional.pad(images, (1, 2, 3, 1))[..., 3:-1, 1:-2]
    if layout == "transposed":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    return images[:1].expand_as(images) if layout == "expanded" else images


def errors(results, truth):
    """The norm of the error and that of the truth, of all logits, all gradients, and all running statistics."""
    return {group: difference(gathered(results, suffix), gathered(truth, suffix)) for group, suffix in GROUPS.items()}


def check(networks, variant, mode, dtype, images, layout):
    channels_last_dropout = networks["drop_rate"] and layout == "channels last"
    network = networks | VARIANTS[variant] | ({"drop_rate": 0.0} if channels_last_dropout else {})
    if mode != "train":
        network["drop_rate"] = 0.0
    naive, efficient = make_pair(dtype=dtype, mode=mode, **network)
    given_images = laid_out(images.to(dtype), layout)
    expected, found = step(naive, given_images, seed=1), step(efficient, given_images, seed=1)
    if dtype == torch.float64:
        size = 1 + gathered(expected, ".grad").norm().item()  # of a gradient that is zero but for rounding, its terms
        assert_close(found, expected, floor=FLOAT64_FLOOR * size)
        return
    exact = step(make_pair(dtype=torch.float64, mode=mode, **network)[0], given_images.double(), seed=1)
    theirs, ours = errors(expected, exact), errors(found, exact)
    if dtype != torch.float32:  # ReLUs that flip by rounding change the gradients of a few channels by much
        del theirs["gradients"]
    bounds = {group: FACTOR * error + FLOORS[dtype] * (size or 1.0) for group, (error, size) in theirs.items()}
    if any(ours[group][0] > bounds[group] for group in bounds):
        for seed in range(5):
            disturbed = given_images.double() * (1 + DISTURBANCES[dtype] * make_images(*images.shape, seed=seed))
            changes = errors(step(make_pair(dtype=torch.float64, mode=mode, **network)[0], disturbed, seed=1), exact)
            bounds = {group: max(bound, FACTOR * changes[group][0]) for group, bound in bounds.items()}
    assert all(ours[group][0] <= bound for group, bound in bounds.items()), (ours, bounds)


def test_any_network_on_any_images(in_full, record):
    cases = []

    @settings(
        max_examples=FULL if in_full else SHORT,
        deadline=None,
        derandomize=not in_full,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        networks,
        st.sampled_from(list(VARIANTS)),
        st.sampled_from([*MODES, "mixed"]),
        st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        st.tuples(st.integers(1, 3), st.integers(25, 70), st.integers(25, 70)),
        layouts,
    )
    def any_case(network, variant, mode, dtype, size, layout):
        images, height, width = size
        if mode in ("train", "mixed"):
            images += 2  # several values per channel also where the last maps are of one pixel
        cases.append(1)
        check(network, variant, mode, dtype, make_images(images, 3, height, width), layout)

    any_case()
    assert len(cases) >= (FULL if in_full else SHORT)
    record(property_cases=len(cases))
