"""Uploads and downloads over HTTP by the libraries' own clients, from a server that stands in for theirs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from cases import assert_close, randomise
from hub_server import serving
from torchvision.models import DenseNet121_Weights

from densenet_efficient import EfficientDenseNet121

SETTING = """
import timm, torch
from cases import SMALL, assert_close, randomise
from densenet_efficient import EfficientDenseNet, EfficientDenseNet121
"""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as hub:
        yield hub


def run(code, hub, tmp_path):
    """In a process of its own, since huggingface_hub reads its address when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "huggingface"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", SETTING + code]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
    code = """
model = EfficientDenseNet(**SMALL)
randomise(model)
model.push_to_hub("me/mine", token="hf_secret")
for _ in range(2):
    assert_close(EfficientDenseNet.from_pretrained("me/mine").state_dict(), model.state_dict(), 0)
"""
    run(code, hub, tmp_path)
    assert set(hub.files) == {
        f"/me/mine/resolve/main/{name}" for name in ("README.md", "config.json", "model.safetensors")
    }
    assert hub.requests.count("GET /me/mine/resolve/main/model.safetensors") == 1  # then it is in the cache


def test_a_tag_of_timm_is_what_timm_downloads(hub, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("densenet121")
    randomise(theirs)
    description = {"architecture": "densenet121", "num_classes": 1000, "pretrained_cfg": theirs.pretrained_cfg}
    hub.put("timm/densenet121.ra_in1k", "main", "config.json", json.dumps(description).encode())
    hub.put("timm/densenet121.ra_in1k", "main", "model.safetensors", safetensors.torch.save(theirs.state_dict()))
    code = """
theirs = timm.create_model("densenet121.ra_in1k", pretrained=True)
ours = EfficientDenseNet121.from_pretrained("densenet121.ra_in1k")
assert_close(ours.state_dict(), theirs.state_dict(), 0)
"""
    run(code, hub, tmp_path)


@pytest.fixture
def published(hub, monkeypatch, tmp_path):
    """torchvision's weights at an address of ours, whose name ends with the checksum of what is put there."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = torchvision.models.densenet121()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    path = f"/densenet121-{hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(DenseNet121_Weights.IMAGENET1K_V1.value, "url", hub.address + path)
    hub.files[path] = file.getvalue()
    return path, theirs


def test_weights_of_torchvision(hub, published, tmp_path):
    path, theirs = published
    for _ in range(2):
        model = EfficientDenseNet121(weights="IMAGENET1K_V1")
        assert_close(model.state_dict(), theirs.state_dict(), 0)
    assert hub.requests == [f"GET {path}"]
    assert (tmp_path / "checkpoints" / path[1:]).read_bytes() == hub.files[path]


def test_a_download_that_went_wrong_leaves_no_file(hub, published, tmp_path):
    path, _ = published
    hub.files[path] = hub.files[path][:-100]
    with pytest.raises(RuntimeError, match="invalid hash value"):
        EfficientDenseNet121(weights="IMAGENET1K_V1")
    del hub.files[path]
    with pytest.raises(RuntimeError, match=rf"cannot download .*; put {path[1:]} into {tmp_path}"):
        EfficientDenseNet121(weights="IMAGENET1K_V1")
    assert not any((tmp_path / "checkpoints").iterdir())
