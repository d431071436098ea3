"""The naive network exported to ONNX and run by other inference runtimes."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[Any], Any]  # numpy array in, numpy array out


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


class ExportedNetwork(nn.Module):
    """Runs ``network`` by ``make_run(path of the ONNX file, dtype)``, which is called once per shape and dtype."""

    def __init__(self, network: nn.Module, make_run: Callable[[Path, torch.dtype], Run]) -> None:
        super().__init__()
        self.network = network
        self.make_run = make_run
        self.runs: dict[tuple[torch.Size, torch.dtype], Run] = {}

    def forward(self, images: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        run = self.runs.get((images.shape, dtype))
        if run is None:
            run = self.runs[images.shape, dtype] = self._export(images, dtype)
        return torch.from_numpy(np.asarray(run(images.numpy())))

    def _export(self, images: Tensor, dtype: torch.dtype) -> Run:
        with tempfile.TemporaryDirectory() as folder, torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's advice to its own users
            path = Path(folder, "network.onnx")
            example = torch.zeros(images.shape, dtype=images.dtype)
            torch.onnx.export(self.network, (example,), str(path), dynamo=False, verbose=False)
            return self.make_run(path, dtype)


def onnxruntime_run(path: Path, dtype: torch.dtype) -> Run:
    """ONNX Runtime with torch's number of threads.

    Raises:
        ValueError: for another dtype than float32; its CPU kernels have no bfloat16.
    """
    import onnxruntime

    if dtype != torch.float32:
        raise ValueError(f"ONNX Runtime runs convolutions on the CPU in float32 only, not in {dtype}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino_run(path: Path, dtype: torch.dtype) -> Run:
    """OpenVINO with torch's number of threads, float32 or bfloat16."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda images: compiled([images])[0]
