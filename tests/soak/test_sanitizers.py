"""The kernel suite in extensions compiled with sanitizers; shortly, in those that an earlier `make soak` has built."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from instrumented import ROOT, build_apart, capabilities_of, environment_for

pytestmark = [
    pytest.mark.own_process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the run-time libraries are preloaded"),
]
TESTS = [
    "tests/test_kernels.py",
    "tests/test_native_layers.py",
    "tests/test_inference.py",
    "tests/test_inference_stem.py",
    "tests/test_module_snapshot.py",
]
SHORT = "small_images or loop_in_python or share_a_model"
# A bound of precision that only capabilities with fused multiplication and addition keep, which "default" has not.
# The tests of the choice of a capability start processes of their own, with other extensions than this one; and a
# process that forks must not have ThreadSanitizer's threads.
ALL = "not cpu_capability and not means_far_from_zero and not forked"
# MKL takes one thread within a region of OpenMP; in ThreadSanitizer's threads, which are not OpenMP's, it takes more,
# and its products then have other bits on some CPUs.
SELECTIONS = {"address": ALL, "thread": f"{ALL} and not same_bits_in_every_run"}


def passed(name, capability, which):
    """The number of tests that ran clean in the extension ``name``."""
    command = [sys.executable, "-m", "pytest", "-o", f"pythonpath=build/{name}", "-p", "no:cacheprovider", "-s"]
    process = subprocess.run(
        [*command, "-x", *TESTS, "-k", which],
        cwd=ROOT,
        env=os.environ | environment_for(name) | {"DENSENET_EFFICIENT_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    report = process.stdout + process.stderr
    assert process.returncode == 0 and "WARNING: ThreadSanitizer" not in report, report[-6000:]
    return int(re.search(r"(\d+) passed", process.stdout)[1])


def is_built(name):
    """Whether the extension ``name`` was built, from the sources as they are."""
    sources = max(path.stat().st_mtime for path in Path(ROOT, "csrc").rglob("*"))
    extensions = Path(ROOT, "build", name, "densenet_efficient").glob("_C*.so")
    return any(extension.stat().st_mtime > sources for extension in extensions)


@pytest.mark.parametrize("name", ["address", "thread"])
def test_kernels_run_clean(name, in_full, record):
    if in_full:
        build_apart(name)
    elif not is_built(name):
        pytest.skip("`make soak` compiles the extension with sanitizers, which takes minutes")
    capabilities = capabilities_of(name) if in_full else capabilities_of(name)[-1:]
    counts = [passed(name, capability, SELECTIONS[name] if in_full else SHORT) for capability in capabilities]
    record(**{f"{name}_sanitizer_tests": sum(counts)})
