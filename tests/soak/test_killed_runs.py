"""Kills at any moment and damaged files: a continued run has the bits of one that nothing interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten
from training_cases import assert_same_bits, fit, make_images, weights

from densenet_efficient.training.checkpoint import is_whole, last_whole, read_checkpoint

SHORT_RUNS, RUNS = 2, 100
SCRIPT = Path(__file__).with_name("killed_runs.py")


def test_killed_at_random_moments(in_full, record, tmp_path):
    runs = RUNS if in_full else SHORT_RUNS
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(runs)]
    process = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["killed_runs"] == runs
    record(**found)


def assert_same_content(found, expected):
    (ones, structure), (others, expected_structure) = tree_flatten(found), tree_flatten(expected)
    assert structure == expected_structure
    pairs = zip(ones, others, strict=True)
    assert all(torch.equal(one, other) if torch.is_tensor(other) else one == other for one, other in pairs)


def test_damaged_checkpoints(in_full, record, tmp_path):
    """Cut at every KiB, and with a flipped bit: refused, and the one before it used, from which a run continues."""
    images = make_images(tmp_path / "images")
    output = tmp_path / "run"
    options = ("--model.drop_rate", "0", "--trainer.max_epochs", "2")
    assert fit(images, output, *options) == 0
    last, previous, whole = output / "last.ckpt", output / "previous.ckpt", weights(output)
    content, written = last.read_bytes(), read_checkpoint(last)
    step = 1024 if in_full else 128 * 1024
    cuts = range(0, len(content), step)
    flips = range(3, len(content), step)
    refused = 0
    for position in cuts:
        last.write_bytes(content[:position])
        with pytest.raises(RuntimeError, match=r"truncated|damaged"):
            read_checkpoint(last)
        assert not is_whole(last)
    for position in flips:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        last.write_bytes(damaged)
        try:
            found = read_checkpoint(last)
        except RuntimeError:
            refused += 1
            assert not is_whole(last)
        else:  # between the parts of the archive, where nothing is read
            assert_same_content(found, written)
    assert refused >= 0.9 * len(flips)
    last.write_bytes(content[: len(content) // 2])
    assert last_whole(output) == previous
    assert fit(images, output, *options, "--ckpt_path", "last") == 0
    assert_same_bits(weights(output), whole)
    record(truncated_checkpoints=len(cuts), flipped_checkpoints=len(flips), flips_refused=refused)
