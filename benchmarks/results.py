"""The results file of a machine: a header and one row per measurement, always whole on the disk."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision

import densenet_efficient
from densenet_efficient.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("task", "model", "implementation", "dtype", "batch", "size", "layout")
MEASURED = ("step_ms", "forward_ms", "images_per_second", "mib_per_image")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The header: machine, cores, device, driver, versions, commit, date. No host names."""
    cuda = torch.device(device).type == "cuda"
    cpu, cores = _cpu_name(), len(os.sched_getaffinity(0))
    instructions = torch.backends.cpu.get_cpu_capability()
    instructions += " AMX" if torch.cpu._is_amx_tile_supported() else ""
    name = torch.cuda.get_device_name(device) if cuda else f"{cpu} {cores} cores {instructions}"
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": cpu,
        "instructions": instructions,
        "cores": cores,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "densenet_efficient": densenet_efficient.__version__,
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def add_output(parser: argparse.ArgumentParser, kind: str = "") -> None:
    """The option that names the results file, else that of `default_path`."""
    default = f"benchmarks/results/{_file_name('<machine>', kind)}"
    parser.add_argument("--output", type=_file, metavar="FILE", help=f"default: {default}")


def default_path(header: dict[str, Any], kind: str = "") -> Path:
    """Where the machine's results of this kind are: of a training step and an inference without one."""
    return RESULTS / _file_name(header["machine"], kind)


def _file_name(machine: str, kind: str) -> str:
    return f"{machine}-{kind}.json" if kind else f"{machine}.json"


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file, such as {path / 'results.json'}")
    return path


def load(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results in `path` under the new header; none if there is no file.

    What another commit has measured keeps its name; the checks and the failures of its code are forgotten.

    Raises ValueError if they were measured on another machine or with other versions: they do not compare.
    """
    if not path.exists():
        return {"header": header, "first_step": [], "rows": []}
    results = json.loads(path.read_text())
    for name in ("machine", "device", "versions"):
        if results["header"][name] != header[name]:
            raise ValueError(
                f"{path} holds results of {name} {results['header'][name]}, this is {header[name]}; "
                "remove the file or give another --output"
            )
    if results["header"]["commit"] != header["commit"]:
        _name_commit(results)
    return results | {"header": header}


def _name_commit(results: dict[str, Any]) -> None:
    """Write down which commit measured the figures of which this is not known otherwise."""
    commit = results["header"]["commit"]
    for name in ("checks", "failed"):
        results.pop(name, None)
    of_one_run = []
    for row in results["rows"]:
        if not row.keys() >= set(KEY):
            of_one_run.append(row)
        elif figures := [name for name in MEASURED if row[name] is not None]:
            row["commits"] = dict.fromkeys(figures, commit) | row.get("commits", {})
    for part in ("first_step", "largest_batch", "kernels"):
        of_one_run += results.get(part, [])
    for row in of_one_run:
        row.setdefault("commit", commit)


def is_current(row: dict[str, Any], figure: str) -> bool:
    """Whether the commit of the header has measured this figure of a row."""
    return row[figure] is not None and figure not in row.get("commits", {})


def record(results: dict[str, Any], key: dict[str, Any], **measured: float) -> None:
    """Set what was measured in the row of `key`; its other figures and the other rows stay as they are."""
    for row in results["rows"]:
        if all(row[name] == key[name] for name in KEY):
            break
    else:
        row = {name: key[name] for name in KEY} | dict.fromkeys(MEASURED)
        results["rows"].append(row)
    row.update(measured)
    earlier = {name: commit for name, commit in row.pop("commits", {}).items() if name not in measured}
    if earlier:
        row["commits"] = earlier


def replace_row(results: dict[str, Any], row: dict[str, Any], key: str, order: Iterable[str]) -> None:
    """Set the row whose ``key`` is that of ``row``; the rows stand in the ``order`` of their keys."""
    names = list(order)
    others = [other for other in results["rows"] if other[key] != row[key]]
    results["rows"] = sorted([*others, row], key=lambda row: names.index(row[key]))


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace `path` in one go, so that an interrupted run leaves the previous file."""
    lines = ",\n    ".join(json.dumps(row) for row in results["rows"])
    text = json.dumps(results | {"rows": []}, indent=2).replace('"rows": []', f'"rows": [\n    {lines}\n  ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit measured, with "+" if the sources differ from it; None outside a git checkout."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "csrc", "densenet_efficient", "benchmarks/*.py")
    return commit and commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None
