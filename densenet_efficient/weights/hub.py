"""Networks on the Hugging Face Hub or in a folder: a description, ``config.json``, beside the weights.

The layout is that of huggingface_hub's ``PyTorchModelHubMixin``, which also writes and uploads it; timm's is read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..optional import needed
from .checkpoints import read_file
from .preprocessing import Preprocessing

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREPROCESSING = "preprocessing"  # what is in the description besides constructor arguments
_HUB_NAME = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_TIMM_TAG = re.compile(r"\w+\.\w+")
_TIMM_ARGUMENTS = {"num_classes": "num_classes", "in_chans": "in_channels", "proj_drop_rate": "drop_rate"}
_TIMM_WITHOUT_WEIGHTS = {"drop_rate", "memory_efficient", "checkpointing"}  # of no effect on a trained network

Fetch = Callable[[str], Path | None]  # the path of a file of this name, None where there is none


def hub_name(source: str) -> tuple[str, str | None] | None:
    """(repository, revision) in a text: "owner/name", "owner/name@revision", or a tag of timm's."""
    match = _HUB_NAME.fullmatch(source)
    if match:
        return match[1], match[2]
    return (f"timm/{source}", None) if _TIMM_TAG.fullmatch(source) else None


def folder_fetch(folder: Path) -> Fetch:
    """Files of a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def hub_fetch(repository: str, **options: Any) -> Fetch:
    """Files of a repository on the Hub, from huggingface_hub's cache or, once, from the network.

    ``options`` are those of ``huggingface_hub.hf_hub_download``. A fetch raises a RuntimeError where the file is not in
    the cache and cannot be downloaded; it says where to put which file.
    """
    hub, errors = needed("huggingface_hub", "hub"), needed("huggingface_hub.errors", "hub")

    def fetch(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repository, name, **options))
        except errors.LocalEntryNotFoundError as error:
            cached = hub.try_to_load_from_cache(repository, name, options.get("cache_dir"), options.get("revision"))
            if isinstance(cached, str):  # put there by hand
                return Path(cached)
            raise RuntimeError(_where_to_put(name, repository, options)) from error
        except errors.EntryNotFoundError:
            return None

    return fetch


def _where_to_put(name: str, repository: str, options: Mapping[str, Any]) -> str:
    revision = options.get("revision") or "main"
    cache = Path(options.get("cache_dir") or needed("huggingface_hub.constants", "hub").HF_HUB_CACHE)
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    url = needed("huggingface_hub", "hub").hf_hub_url(repository, name, revision=revision)
    return f"cannot download {url}, and it is not in the cache; put {CONFIG} and {WEIGHTS[0]} into {folder}"


def read_config(name: str, fetch: Fetch) -> dict[str, Any] | None:
    """The description of the network ``name``; None where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    path = fetch(CONFIG)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG} of {name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} of {name} holds a {type(config).__name__}; expected the arguments of a DenseNet")
    return config


def read_weights(name: str, fetch: Fetch) -> Any:
    """The checkpoint of the network ``name``: safetensors, or else what torch.save wrote.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it cannot be downloaded; says where to put it.
    """
    offline: RuntimeError | None = None
    for filename in WEIGHTS:
        try:
            path = fetch(filename)
        except RuntimeError as error:
            offline = offline or error
            continue
        if path is not None:
            return read_file(path)
    raise offline or FileNotFoundError(f"{name} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")


def is_timms(config: Mapping[str, Any]) -> bool:
    """Whether timm wrote this description."""
    return "architecture" in config


def from_timm(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], Preprocessing]:
    """(architecture, constructor arguments, preprocessing) of a network that timm described.

    Raises:
        ValueError: the description is incomplete, or the network has a part that an EfficientDenseNet has not.
    """
    architecture = str(config["architecture"]).removeprefix("efficient_")
    settings = config.get("pretrained_cfg", config)  # older descriptions are flat
    try:
        arguments = {"num_classes": config.get("num_classes", settings.get("num_classes"))}
        arguments["in_channels"] = settings["input_size"][0]
        preprocessing = Preprocessing.of_timm(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} of {name} is not as timm writes it: {error}") from error
    unknown = [f"global_pool={config['global_pool']!r}"] if config.get("global_pool", "avg") != "avg" else []
    for key, value in (config.get("model_args") or {}).items():
        if key in _TIMM_ARGUMENTS:
            arguments[_TIMM_ARGUMENTS[key]] = value
        elif key not in _TIMM_WITHOUT_WEIGHTS and (key, value) != ("global_pool", "avg"):
            unknown.append(f"{key}={value!r}")
    if unknown:
        remedy = f"timm.create_model('hf-hub:{name}', pretrained=True) and convert(model) have it"
        raise ValueError(f"{name} has {', '.join(unknown)}, which EfficientDenseNet has not; {remedy}")
    return architecture, arguments, preprocessing


def split_preprocessing(name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], Preprocessing | None]:
    """(constructor arguments, preprocessing) of a network that this package described."""
    arguments = {key: value for key, value in config.items() if key not in (PREPROCESSING, "weights")}
    settings = config.get(PREPROCESSING)
    if settings is None:
        return arguments, None
    try:
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        return arguments, Preprocessing(**settings | {"mean": mean, "std": std})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{CONFIG} of {name} has no valid preprocessing: {error}") from error


def published(model: nn.Module, config: Mapping[str, Any], weights: Any) -> Any:
    """``model`` as huggingface_hub's ``PyTorchModelHubMixin`` takes it, with its ``save_pretrained`` and others."""
    for package in ("huggingface_hub", "safetensors"):
        needed(package, "hub")
    from .publishing import Published

    description = dict(config)
    if weights is not None:
        own = weights if isinstance(weights, Preprocessing) else Preprocessing.of_transforms(weights.transforms())
        description[PREPROCESSING] = asdict(own)
    return Published(model, description)
