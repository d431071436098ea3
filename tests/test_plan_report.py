"""What a plan says as a table and in sentences."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from densenet_efficient.planning import Memory, MemoryPlan, Peak, StageMemory
from densenet_efficient.planning.report import conclusions, plan_table, print_plan

KIB = 2**10
STEP = Memory(1 * KIB, 2 * KIB, 3 * KIB, 4 * KIB, 5 * KIB)
FORWARD = Memory(6 * KIB, 0, 0, 7 * KIB, 8 * KIB)
STAGES = [
    StageMemory("stem", "none", STEP, 20 * KIB),
    StageMemory("denseblock1", "bottleneck", FORWARD, 30 * KIB),
    StageMemory("denseblock2", "none", STEP, 40 * KIB),
    StageMemory("head", None, FORWARD, 50 * KIB),
]
PLAN = MemoryPlan(
    model="net",
    input_shape=(4, 3, 64, 32),
    dtype="bfloat16",
    optimizer="sgd",
    checkpointing=["bottleneck", "none"],
    offloaded=[True, False],
    on_host=0,
    training=Peak("denseblock1, backward", STEP),
    inference=Peak("stem, forward", FORWARD),
    stages=STAGES,
    recomputed=0.125,
    budget=None,
    largest_batch=None,
    largest_size=None,
)
RECOMPUTED = "The backward recomputes 12.5% of a forward's multiply-adds."
COUNTED = "Counted are tensors; the interpreter, the libraries and a GPU's context come on top."


def test_the_table_of_a_plan():
    table = plan_table(PLAN)
    assert table.title == "net, input 4x3x64x32, bfloat16, sgd"
    columns = [(str(column.header).replace("\n", " "), *map(str, column.cells)) for column in table.columns]
    assert columns == [
        ("", "stem", "denseblock1", "denseblock2", "head", "training", "inference"),
        ("Check- pointing", "none", "bottleneck", "none", "", "denseblock1, backward", "stem, forward"),
        ("Weights", *["1.0 KiB", "6.0 KiB"] * 3),
        ("Gradients", *["2.0 KiB", "0"] * 3),
        ("Optimizer state", *["3.0 KiB", "0"] * 3),
        ("Saved activations", *["4.0 KiB", "7.0 KiB"] * 3),
        ("Workspace", *["5.0 KiB", "8.0 KiB"] * 3),
        ("Peak of all memory", "20.0 KiB", "30.0 KiB", "40.0 KiB", "50.0 KiB", "15.0 KiB", "21.0 KiB"),
    ]


def test_without_a_budget_a_plan_concludes_what_is_recomputed():
    assert conclusions(PLAN) == [RECOMPUTED, COUNTED]


@pytest.mark.parametrize(
    ("budget", "batch", "size", "says"),
    [(15, 7, 96, ("fits", "7", "96x96")), (14, 0, 0, ("does not fit", "none", "none"))],
)
def test_a_plan_concludes_what_fits_its_budget(budget, batch, size, says):
    """Its peak of 15 KiB fits into just as many."""
    plan = replace(PLAN, budget=budget * KIB, largest_batch=batch, largest_size=size)
    assert plan.fits == (budget == 15)
    assert conclusions(plan) == [
        RECOMPUTED,
        f"The training step {says[0]} into {budget}.0 KiB.",
        f"The largest batch of 3x64x32 images that fits: {says[1]}.",
        f"The largest images that fit at batch 4: {says[2]}.",
        COUNTED,
    ]


@pytest.mark.parametrize(
    ("batch", "size", "remedies"),
    [
        (7, 96, "a batch of at most 7, or images of at most 96x96, or a larger budget"),
        (0, 0, "a larger budget"),
        (None, None, "a larger budget"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_remedies_that_there_are(batch, size, remedies):
    plan = replace(PLAN, budget=14 * KIB, largest_batch=batch, largest_size=size)
    with pytest.raises(ValueError, match=r"needs 15.0 KiB at least, the budget is 14.0 KiB; remedy: ") as raised:
        plan.check_fits()
    assert str(raised.value).endswith(f"; remedy: {remedies}")


def test_a_plan_names_the_storages_that_wait_on_the_host():
    waiting = "In the host's pinned memory wait the storages of denseblock1: 2.0 KiB."
    assert conclusions(replace(PLAN, on_host=2 * KIB)) == [RECOMPUTED, waiting, COUNTED]


def test_a_plan_is_cut_off_by_no_narrow_terminal():
    text = io.StringIO()
    print_plan(PLAN, Console(file=text, width=40))
    assert "…" not in text.getvalue() and "Peak of" in text.getvalue()
    assert text.getvalue().splitlines()[-1] == COUNTED
