"""`python -m benchmarks.soak`: the reliability suite of tests/soak in full, two parts at a time.

Writes benchmarks/results/<machine>-soak.json, and nothing where a part fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import results as results_file

PARTS = (
    "sanitizers",
    "killed_runs",
    "properties",
    "allocation_failures",
    "endurance",
    "killed_worker",
)  # longest first
LIMIT = 20 * 60  # seconds, of everything
VARIABLE = "DENSENET_EFFICIENT_SOAK"  # of tests/soak/conftest.py
SENTENCES = {
    "property_cases": "{:,.0f} random networks, images, layouts, dtypes and modes against the reference: no mismatch",
    "address_sanitizer_tests": "{:,.0f} kernel tests clean under AddressSanitizer and UndefinedBehaviorSanitizer",
    "thread_sanitizer_tests": "{:,.0f} kernel tests clean under ThreadSanitizer, which watches this package's code and "
    "not torch's",
    "allocation_failures": "{:,.0f} allocations of a training step, all but oneDNN's own, failed, each in turn: an "
    "exception each time, consistent buffers, the next step to the same bits",
    "leaked_bytes": "at most {:,.0f} bytes more in use after all failures of a model",
    "training_steps": "{:,.0f} training steps in one process",
    "memory_growth": "its memory grew by {:.2%} from the first tenth to the end",
    "threads": "{:,.0f} threads training a model each at once: the bits of training one after the other",
    "killed_runs": "{:,.0f} training runs killed with SIGKILL at random moments, each continued to the same bits",
    "truncated_checkpoints": "{:,.0f} truncated checkpoints refused, the previous one used",
    "flipped_checkpoints": "{:,.0f} checkpoints with a flipped bit",
    "flips_refused": "of which {:,.0f} were refused, and the others read as written",
    "seconds_until_all_workers_ended": "a worker of three killed within a step: the others ended with an error after "
    "{:.1f} s, and the run continued",
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    results_file.add_output(parser, "soak")
    options = parser.parse_args(arguments)
    header = results_file.describe_machine()
    path = options.output or results_file.default_path(header, "soak")
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as folder:
        outcomes = list(pool.map(lambda part: run(part, Path(folder), begun), PARTS))
    figures: dict[str, Any] = {}
    failed = []
    for part, outcome in zip(PARTS, outcomes, strict=True):
        if isinstance(outcome, str):
            print(outcome, file=sys.stderr)
            failed.append(part)
        else:
            figures |= outcome
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    figures["minutes"] = round((time.monotonic() - begun) / 60, 1)
    results_file.save(path, {"header": header, "rows": [figures]})
    print("\n".join(lines(figures)))
    print(f"wrote {path}", flush=True)


def run(part: str, folder: Path, begun: float) -> dict[str, Any] | str:
    """The figures of a part, or the report of its failure."""
    figures = folder / f"{part}.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", f"tests/soak/test_{part}.py"]
    environment = os.environ | {VARIABLE: str(figures), "OMP_NUM_THREADS": "1"}
    print(f"soak: {part}", flush=True)
    left = LIMIT - (time.monotonic() - begun)
    try:
        process = subprocess.run(
            command, cwd=results_file.ROOT, env=environment, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return f"{part}: not finished within the {LIMIT // 60} minutes of the whole"
    print(f"soak: {part} ended after {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
    if process.returncode != 0 or not figures.exists():
        return f"{part}:\n{process.stdout}{process.stderr}"
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures of a run in Markdown."""
    return [f"- {text.format(figures[name])}" for name, text in SENTENCES.items() if name in figures]


if __name__ == "__main__":
    main(sys.argv[1:])
