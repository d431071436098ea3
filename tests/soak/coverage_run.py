"""`python tests/soak/coverage_run.py`: which lines the tests run, of the package's Python and of csrc/cpu.

Prints both reports and writes build/coverage/figures.json.
"""

import json
import os
import subprocess
import sys

from instrumented import ROOT, build_apart, environment_for

FOLDER = ROOT / "build" / "coverage"
PYTEST = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-p", "no:cacheprovider"]
CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]
NATIVE_TESTS = ["kernels", "native_layers", "inference", "operators", "roofline"]


def run(*command, **environment):
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def python():
    run(*PYTEST, "-m", "own_process")
    run(*PYTEST, "-m", "not own_process", "--numprocesses", "2")
    run(sys.executable, "-m", "coverage", "combine", "--quiet")
    run(sys.executable, "-m", "coverage", "report", "--show-missing", "--skip-covered")
    run(sys.executable, "-m", "coverage", "json", "-q", "-o", str(FOLDER / "python.json"))
    return json.loads((FOLDER / "python.json").read_text())["totals"]


def native():
    build_apart("coverage")
    tests = [f"tests/test_{name}.py" for name in NATIVE_TESTS]
    for capability in CAPABILITIES:
        run(
            *[sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-o", "pythonpath=build/coverage"],
            *[*tests, "-k", "not cpu_capability"],
            **environment_for("coverage"),
            DENSENET_EFFICIENT_CPU_CAPABILITY=capability,
        )
    report = ["--root", str(ROOT), "--filter", "csrc/", "--exclude-unreachable-branches", str(FOLDER / "objects")]
    run(sys.executable, "-m", "gcovr", *report, "--json-summary", str(FOLDER / "native.json"), "--txt", "-")
    return json.loads((FOLDER / "native.json").read_text())


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    totals, lines = python(), native()
    figures = {
        "python_lines": totals["num_statements"],
        "python_covered": round(totals["percent_covered"], 2),
        "native_lines": lines["line_total"],
        "native_covered": lines["line_percent"],
    }
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
