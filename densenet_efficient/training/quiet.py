"""Keeps Lightning from saying what a user of the commands need not know."""

from __future__ import annotations

import logging
import warnings

# About what is as it should be here.
EXPECTED_WARNINGS = (
    "does not have many workers",
    "exists and is not empty",
    "is smaller than the logging interval",
    "LeafSpec",
    "No (positive|negative) samples in targets",  # of the few images that are tried before the training
    "WeightAveraging doesn't support sharding",  # and nothing is sharded then
    "predict returned None",  # of a batch whose files were all skipped
)


def quieten_lightning() -> None:
    """Its notes on the hardware and on other products, and the warnings above."""
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    # It tells that a process of several has ended, before it kills the others.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=f".*({'|'.join(EXPECTED_WARNINGS)})")
