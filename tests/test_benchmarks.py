"""The benchmarks compare equal networks, keep what they measured, and the README shows exactly that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_cases import HEADER, KEY
from torch._functorch import config as functorch_config

from benchmarks import cells, conversion, implementations, report, run, segmentation
from benchmarks import results as results_file
from benchmarks.cells import COMPILED, RUNTIMES, Cell, Variant, measure_memory, measure_times, variants_of
from benchmarks.evidence.__main__ import PARTS
from benchmarks.implementations import IMPLEMENTATIONS, build, factory_of
from benchmarks.picture import panels_of
from benchmarks.runtimes import ExportedNetwork
from densenet_efficient.conversion.modules import ConvertedBlock
from densenet_efficient.measure import build_model, make_step

SECTIONS = [name for name, (_, part) in report.SECTIONS.items() if part not in PARTS]  # the others: test_evidence.py
EAGER = [name for name in IMPLEMENTATIONS if name not in (*COMPILED, *RUNTIMES)]


@pytest.mark.parametrize("name", EAGER)
def test_all_implementations_are_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    reference, network = build("torchvision", "tiny").double(), build(name, "tiny").double()
    network.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(images), reference(images))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", RUNTIMES)
def test_exported_networks_give_the_same_logits(name: str) -> None:
    network = build(name, "tiny").eval()
    assert isinstance(network, ExportedNetwork)
    for batch in (1, 2, 1):
        images = torch.rand(batch, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(network(images), network.network(images), rtol=1e-4, atol=1e-5)
    assert len(network.runs) == 2  # exported once per shape


def test_which_runtime_takes_which_dtype() -> None:
    names = list(RUNTIMES)
    assert variants_of(names, "infer", "float32") == [
        Variant("onnxruntime", "contiguous"),
        Variant("openvino", "contiguous"),
    ]
    assert variants_of(names, "infer", "bfloat16") == [Variant("openvino", "contiguous")]
    assert variants_of(names, "train", "float32") == []


def test_a_runtime_that_is_not_installed_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "is_installed", lambda package: package != "openvino")
    options = run.parse(["--quick", "--output=quick.json", "--tasks=infer"])
    variants = run.variants_in(run.plan(options)[0], options)
    assert {"onnxruntime"} == {variant.implementation for variant in variants} & set(RUNTIMES)
    assert "openvino" in capsys.readouterr().out
    options = run.parse(["--quick", "--output=quick.json", "--tasks=train"])
    run.variants_in(run.plan(options)[0], options)
    assert not capsys.readouterr().out


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown implementation 'fastest'; expected one of naive, torchvision"):
        build("fastest", "tiny")


def test_torchvision_is_not_compared_on_networks_it_lacks() -> None:
    with pytest.raises(ValueError, match="torchvision has only DenseNet-BC"):
        build("torchvision", "densenet-40-12")


def test_the_budget_holds_while_its_backend_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    default = functorch_config.activation_memory_budget
    budget = lambda graph, inputs: functorch_config.activation_memory_budget  # noqa: E731
    monkeypatch.setattr(compile_fx, "compile_fx", budget)
    assert implementations._within_budget(0.5)(None, []) == 0.5
    assert functorch_config.activation_memory_budget == default == 1.0


def test_torchvision_is_timed_in_both_layouts_and_inference_has_no_checkpointing() -> None:
    assert variants_of(["torchvision", "ours-none", "ours-bottleneck"], "infer", "float32") == [
        Variant("torchvision", "channels-last"),
        Variant("torchvision", "contiguous"),
        Variant("ours-none", "channels-last"),
    ]
    assert Variant("ours-bottleneck", "channels-last") in variants_of(list(IMPLEMENTATIONS), "train", "float32")


@pytest.mark.parametrize("task", ["train", "infer"])
def test_a_cell_times_all_its_variants_in_turn(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def step_times(steps: dict[Any, Any], rounds: int, settle: float) -> dict[Any, float]:
        calls.append((list(steps), rounds, settle > 0))
        return {name: 100.0 if name[1] == "step_ms" else 40.0 for name in steps}

    monkeypatch.setattr(cells, "step_times", step_times)
    variants = variants_of(["torchvision", "ours-none"], task, "float32")
    cell = Cell(task, "tiny", "float32", 4, 32)
    times = measure_times(cell, variants, rounds=3)
    step_ms = 100.0 if task == "train" else 40.0
    expected = {"step_ms": step_ms, "forward_ms": 40.0, "images_per_second": 4e3 / step_ms}
    assert times == dict.fromkeys(variants, expected)
    names = ["forward_ms", "step_ms"] if task == "train" else ["forward_ms"]
    in_turn = [((cell, variant), name) for variant in variants for name in names]
    assert calls == [(in_turn, 3, task == "infer")]


def test_memory_is_measured_on_the_network_and_layout_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def peak_memory_per_image(
        factory: str, arguments: dict[str, Any], shape: Any, batches: Any, **options: Any
    ) -> float:
        asked.update(options, factory=factory, arguments=arguments, shape=shape, batches=batches)
        return 10.1234

    monkeypatch.setattr(cells, "peak_memory_per_image", peak_memory_per_image)
    cell, variant = Cell("train", "tiny", "bfloat16", 4, 32), Variant("torchvision", "contiguous")
    assert measure_memory(cell, variant, batches=(2, 6)) == 10.12
    assert asked == {
        "factory": "benchmarks.implementations:build",
        "arguments": {"implementation": "torchvision", "model": "tiny"},
        "shape": (3, 32, 32),
        "batches": (2, 6),
        "dtype": "bfloat16",
        "task": "train",
        "device": "cpu",
        "channels_last": False,
    }


@pytest.mark.parametrize("model", ["tiny", "densenet121"])
@pytest.mark.parametrize("implementation", run.FIRST_STEP)
def test_the_first_step_is_one_of_the_same_network(implementation: str, model: str) -> None:
    factory, arguments = factory_of(implementation, model)
    with torch.device("meta"):
        direct = build_model(factory, json.loads(json.dumps(arguments)))
        built = build(implementation, model)
    assert type(direct) is type(built)
    assert getattr(direct, "checkpointing", None) == getattr(built, "checkpointing", None)
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (direct, built)]
    assert shapes[0] == shapes[1]


def test_quick_does_not_touch_the_real_results() -> None:
    with pytest.raises(SystemExit):
        run.parse(["--quick"])
    options = run.parse(["--quick", "--output=quick.json", "--rounds=3"])
    assert (options.models, options.rounds, options.output) == (["tiny"], 3, Path("quick.json"))


def test_pytest_benchmarks_run() -> None:
    options = ["--models=tiny", "--size=32", "--batch=2", "--rounds=1", "--no-memory"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:xdist", "--benchmark-only", *options]
    # Benchmarks refuse to run beside others: the child must not take itself for a worker of this test run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    process = subprocess.run(
        [*command, "--implementations", "torchvision", "ours-bottleneck"],
        cwd=results_file.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    assert "8 passed" in process.stdout  # torchvision's two layouts and ours: step and forward; 2 inferences


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, list[str]]:
    """A README with empty sections, and the arguments of the report for it and for a machine's results."""
    folder = tmp_path / "results"
    results = results_file.load(folder / "machine.json", HEADER)
    results["first_step"] = [{"model": "tiny", "implementation": "ours-none", "seconds": 3.21}]
    figures = {
        ("torchvision", "channels-last"): (100.0, 200.0),
        ("torchvision", "contiguous"): (125.0, 210.0),
        ("torchvision-checkpoint", "channels-last"): (150.0, 100.0),
        ("ours-none", "channels-last"): (62.0, 25.0),
        ("ours-bottleneck", "channels-last"): (72.0, None),
    }
    for (implementation, layout), (step_ms, mib_per_image) in figures.items():
        key = KEY | {"implementation": implementation, "layout": layout}
        measured = {"step_ms": step_ms, "forward_ms": step_ms / 4, "images_per_second": 8e3 / step_ms}
        results_file.record(results, key, **measured)
        if mib_per_image is not None:
            results_file.record(results, key, mib_per_image=mib_per_image)
    results_file.save(folder / "machine.json", results)
    lines = [
        {"operation": "bn_relu_conv1x1", "rows": 512, "calls": 4, "seconds": 0.06, "flops": 6e9, "bytes": 3e8},
        {"operation": "channel_stats", "rows": 512, "calls": 1, "seconds": 0.0005, "flops": 0.0, "bytes": 1e6},
        {"operation": "the rest", "rows": 0, "calls": 0, "seconds": 0.0395, "flops": 0.0, "bytes": 0.0},
    ]
    step = {"model": "tiny", "dtype": "float32", "batch": 2, "size": 64, "level": "none", "step_seconds": 0.1}
    rates = {"step_flops": 7.5e9, "product_rate": 2e11, "copy_rate": 2e10}
    roofline = {"header": HEADER, "rows": [step | rates | {"lines": lines}]}
    results_file.save(folder / "machine-roofline.json", roofline)
    row = {"model": "fc-tiny", "size": [18, 24], "dtype": "float32", "batches": [1, 2], "naive": 80.0, "ours": 20.0}
    results_file.save(folder / "machine-segmentation.json", {"header": HEADER, "rows": [row]})
    row = {"source": "volumes", "image": [1, 64, 64, 64], "original": 90.0, "converted": 6.0}
    results_file.save(folder / "machine-conversion.json", {"header": HEADER, "rows": [row]})
    readme = tmp_path / "README.md"
    sections = [f"<!-- benchmarks:begin {name} -->\nold\n<!-- benchmarks:end -->\n" for name in SECTIONS]
    readme.write_text("before\n" + "between\n".join(sections) + "after\n")
    return readme, [f"--documents={readme}", f"--results={folder}", f"--pictures={tmp_path / 'pictures'}"]


def test_the_report_fills_the_sections_and_then_checks(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    with pytest.raises(SystemExit, match="does not match the results files"):
        report.main(["--check", *arguments])
    report.main(arguments)
    report.main(["--check", *arguments])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("between\n") == len(SECTIONS) - 1
    assert "old" not in text
    readme.write_text(text.replace("62 ms", "61 ms"))
    with pytest.raises(SystemExit, match="does not match the results files"):
        report.main(["--check", *arguments])


def test_the_memory_of_segmentation(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    report.main(arguments)
    assert "| fc-tiny | 18x24 | float32 | 80 | 20 | 4.0x |" in readme.read_text().splitlines()


def test_the_memory_of_converted_networks(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    report.main(arguments)
    assert "| volumes | 64x64x64 | 90.0 | 6.0 | 15.0x |" in readme.read_text().splitlines()


def test_conversion_measures_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of each library, here small ones by a stand-in for the memory; what is measured already is kept."""
    asked = []

    def memory(factory: str, arguments: dict[str, Any], image: tuple[int, ...], *_: Any, **options: Any) -> float:
        assert factory == "benchmarks.conversion:build"
        model = conversion.build(**arguments)
        assert any(isinstance(module, ConvertedBlock) for module in model.modules()) == arguments["converted"]
        asked.append((arguments["source"], arguments["converted"]))
        small = (image[0], *[32] * (len(image) - 1))
        assert make_step(model, small, 2, channels_last=options["channels_last"])().isfinite()
        return 8.0 if arguments["converted"] else 160.0

    monkeypatch.setattr(conversion, "peak_memory_per_image", memory)
    factory, arguments, image = conversion.SOURCES["MONAI, volumes"]
    small = factory.replace("DenseNet201", "DenseNet121"), arguments, image
    monkeypatch.setattr(conversion, "SOURCES", {"MONAI, volumes": small})
    path = tmp_path / "machine-conversion.json"
    for _ in range(2):
        conversion.main(["--output", str(path)])
    assert asked == [("MONAI, volumes", False), ("MONAI, volumes", True)]
    assert json.loads(path.read_text())["rows"] == [
        {"source": "MONAI, volumes", "image": [1, 64, 64, 64], "original": 160.0, "converted": 8.0}
    ]


@pytest.mark.parametrize("source", conversion.SOURCES)
def test_every_network_to_convert_is_a_densenet201(source: str) -> None:
    with torch.device("meta"):
        blocks = [module for module in conversion.build(source, True).modules() if isinstance(module, ConvertedBlock)]
    assert [len(block._modules) for block in blocks] == conversion.BLOCKS_OF_201


def test_segmentation_measures_both_implementations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory, here by a stand-in, per image of the size asked for; both take a step."""

    def memory(factory: str, arguments: Any, input_shape: tuple[int, int, int], *_: Any, **__: Any) -> float:
        assert make_step(build_model(factory, arguments), input_shape, 1)().isfinite()
        return {"NaiveFCDenseNet": 80.04, "FCDenseNet": 20.0}[factory.split(":")[1]]

    monkeypatch.setattr(segmentation, "peak_memory_per_image", memory)
    path = tmp_path / "machine-segmentation.json"
    segmentation.main(["--models", "fc-densenet56", "--size", "32", "64", "--output", str(path)])
    [row] = json.loads(path.read_text())["rows"]
    assert (row["model"], row["size"], row["naive"], row["ours"]) == ("fc-densenet56", [32, 64], 80.0, 20.0)


def test_the_tables_compare_with_the_best_of_torchvision(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    report.main(arguments)
    lines = readme.read_text().splitlines()
    assert "| torchvision | contiguous | 125 ms | 1.25 | 31 ms | 64.0 | 210.0 | 1.0x |" in lines
    assert "| torchvision-checkpoint | channels-last | 150 ms | 1.50 | 38 ms | 53.3 | 100.0 | 2.0x |" in lines
    assert "| ours-none | channels-last | 62 ms | 0.62 | 16 ms | 129.0 | 25.0 | 8.0x |" in lines
    assert "| ours-bottleneck | channels-last | 72 ms | 0.72 | 18 ms | 111.1 |  |  |" in lines
    figures = next(line for line in lines if line.startswith("Some CPU"))
    for fact in ("2 cores", "AVX512", "torch 2.14.1", "0123456789ab", "2026-01-31", "ours-none 3.2 s"):
        assert fact in figures
    assert lines.count("Not measured yet on a GPU.") == 4
    # The fixture has neither an inference nor the planner, the trainer, the soak, the coverage.
    assert lines.count("Not measured yet on a CPU.") == 5


WORKLOAD = f"{KEY['model']}, {KEY['dtype']}, batch {KEY['batch']}, {KEY['size']}x{KEY['size']}"


def report_with(
    published: tuple[Path, list[str]], task: str, step_ms: dict[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """The results with these times of implementations added, and the lines of the document written from them."""
    readme, arguments = published
    path = readme.parent / "results" / "machine.json"
    results = json.loads(path.read_text())
    for implementation, time in step_ms.items():
        results_file.record(results, KEY | {"task": task, "implementation": implementation}, step_ms=time)
    results_file.save(path, results)
    report.main(arguments)
    return results, readme.read_text().splitlines()


def test_the_summary_has_a_line_per_workload(published: tuple[Path, list[str]]) -> None:
    _, lines = report_with(published, "infer", {"torchvision": 40.0, "openvino": 20.0, "ours-none": 15.0})
    assert f"| {WORKLOAD} | 100 ms | 62 ms | 0.62 | 72 ms | 0.72 | 200.0 | 25.0 (8.0x less) |  |" in lines
    assert f"| {WORKLOAD} | 40 ms | 20 ms (openvino) | 15 ms | 0.75 |" in lines


def test_what_a_cuda_graph_replays_has_a_line_of_its_own(published: tuple[Path, list[str]]) -> None:
    results, lines = report_with(published, "train", {"torchvision-graph": 80.0, "ours-none-graph": 20.0})
    assert f"| {WORKLOAD} | 100 ms | 62 ms | 0.62 | 72 ms | 0.72 | 200.0 | 25.0 (8.0x less) |  |" in lines
    assert f"| {WORKLOAD}, in a CUDA graph | 80 ms | 20 ms | 0.25 |  |  |  |  |  |" in lines
    replayed = [
        row for rows in panels_of(results).values() for row in rows if row["implementation"] == "ours-none-graph"
    ]
    assert [row["mib_per_image"] for row in replayed] == [25.0]
    (backwards,) = panels_of(results | {"rows": results["rows"][::-1]}).values()
    (forwards,) = panels_of(results).values()
    assert backwards == forwards[::-1]


def test_where_ours_was_not_replayed_there_is_no_such_line(published: tuple[Path, list[str]]) -> None:
    _, lines = report_with(published, "train", {"torchvision-graph": 80.0})
    assert not any(line.startswith(f"| {WORKLOAD}, in a CUDA graph") for line in lines)


def test_the_roofline_stands_in_the_document(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    report.main(arguments)
    lines = readme.read_text().splitlines()
    assert "**tiny, float32, batch 2, 64x64, none: 100 ms, 38% of the roof**" in lines
    assert "Roof 200 GFLOP/s, copy rate 20 GB/s." in lines
    assert "| bn_relu_conv1x1 | 512 | 4 | 60.0 | 60.0% | 100 | 50% | 5 | 25% |" in lines
    assert "| operations below 1 % each |  | 1 | 0.5 | 0.5% |  |  |  |  |" in lines
    assert "| the rest |  |  | 39.5 | 39.5% |  |  |  |  |" in lines


def test_the_report_draws_the_picture_it_shows(published: tuple[Path, list[str]]) -> None:
    readme, arguments = published
    report.main(arguments)
    picture = readme.parent / "results" / "some-cpu-2-cores.png"
    assert f"](benchmarks/results/{picture.name})" in readme.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_no_picture_where_none_is_drawn(published: tuple[Path, list[str]]) -> None:
    """Times were measured, memory was not."""
    readme, arguments = published
    path = readme.parent / "results" / "machine.json"
    results = json.loads(path.read_text())
    for row in results["rows"]:
        row["mib_per_image"] = None
    results_file.save(path, results)
    report.main(arguments)
    assert "some-cpu-2-cores.png" not in readme.read_text()
    assert not (path.parent / "some-cpu-2-cores.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks:begin speed -->\n<!-- benchmarks:end -->", "unknown benchmarks section 'speed'"),
        ("<!-- benchmarks:begin training-cpu -->\n", "lacks its name or its"),
    ],
)
def test_a_broken_readme_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.fill(text, [])
