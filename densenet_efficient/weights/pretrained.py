"""`PretrainedNetwork`: networks that come from torchvision's, timm's or the Hub's weights, and that go to the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from . import hub
from .checkpoints import SUFFIXES, described_network, read_file
from .from_torchvision import architecture_of, download, find_weights, names_torchvision_weights
from .loading import load_weights

Network = TypeVar("Network", bound="PretrainedNetwork")
EXPECTED = (
    "a name of torchvision's weights (IMAGENET1K_V1), a file, a folder of save_pretrained, a tag of timm's "
    "(densenet121.ra_in1k), or a repository of the Hugging Face Hub (owner/name)"
)
# What a class with an architecture sets itself, in the constructor's arguments.
OF_ARCHITECTURE = ("growth_rate", "block_config", "num_init_features")


@dataclass
class Found:
    """What a source says about a network before its weights are read."""

    name: str
    read: Callable[[], Any]  # the checkpoint
    architecture: str | None = None  # None: the arguments decide
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor
    weights: Any = None  # what has the preprocessing, transforms()
    needs_description: bool = False  # which it should have, and has not


class PretrainedNetwork(nn.Module):
    """A network whose weights may come from elsewhere.

    Attributes:
        architecture: its name in torchvision, "densenet121"; None where the constructor's arguments decide.
        config: the constructor's arguments.
        weights: where the weights came from, whose ``transforms()`` are the preprocessing to use: a member of
            torchvision's enum, or a `Preprocessing`; None where nobody says.
    """

    architecture: ClassVar[str | None] = None
    config: dict[str, Any]
    weights: Any = None

    @classmethod
    def from_pretrained(
        cls: type[Network],
        source: Any,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Network:
        """A network with the weights of ``source``, in eval mode.

        The classes with a number build that network; ``EfficientDenseNet`` itself builds what the source describes, as
        files alone do not, but for checkpoints of ``densenet-efficient fit``.
        Another number of classes or of input channels is adapted to as `load_weights` does, and a warning says so.

        Args:
            source: torchvision's weights ("IMAGENET1K_V1", or a member of the enum); a file (.pth, .safetensors,
                .h5 and .keras of Keras); a folder of ``save_pretrained``; a tag of timm's ("densenet121.ra_in1k", with
                or without "timm/"); a repository of the Hugging Face Hub ("owner/name", "owner/name@revision").
            revision, cache_dir, token, force_download, local_files_only: as in ``huggingface_hub.hf_hub_download``.
            kwargs: arguments of the constructor, which win over what the source says.

        Raises:
            ImportError: a package that this source needs is not installed.
            FileNotFoundError: there is no such file.
            RuntimeError: a file cannot be downloaded; says where to put it.
            TypeError, ValueError: there are no such weights, or they are of another network.
        """
        options = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        found = find(source, cls.architecture, options)
        model = cls._class_for(found)._build(found, kwargs)
        model._load(found.read())
        model.weights = found.weights
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Writes ``config.json``, ``model.safetensors`` and a model card into a folder, for `from_pretrained`.

        ``kwargs`` are those of huggingface_hub's ``PyTorchModelHubMixin.save_pretrained``: ``repo_id``,
        ``push_to_hub``, ``model_card_kwargs``.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        return hub.published(self, self.config, self.weights).save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes to the repository ``repo_id`` of the Hugging Face Hub, made if need be.

        ``kwargs`` are those of huggingface_hub's ``PyTorchModelHubMixin.push_to_hub``: ``private``, ``token``,
        ``branch``, ``commit_message``, ``create_pr`` and others. Returns the address of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        return hub.published(self, self.config, self.weights).push_to_hub(repo_id, **kwargs)

    def load_torchvision(self, choice: Any, progress: bool = True) -> None:
        """Loads the weights that ``choice`` names in torchvision; None loads nothing. ``progress`` shows a bar."""
        if choice is None:
            return
        if self.architecture is None:
            raise ValueError(
                f"torchvision has no weights of a plain {type(self).__name__}; build one with a number in its name"
            )
        dims = self.config["spatial_dims"]
        if dims != 2:
            raise ValueError(
                f"torchvision's weights are for images alone, and spatial_dims is {dims}: give weights=None"
            )
        weights = find_weights(self.architecture, choice)
        self._load(download(weights, progress))
        self.weights = weights

    def _load(self, checkpoint: Any) -> None:
        notes = load_weights(self, checkpoint)
        if notes:
            warnings.warn("; ".join(notes), stacklevel=4)

    @classmethod
    def _class_for(cls: type[Network], found: Found) -> type[Network]:
        """The class that builds the network of ``found``: this one, or one of its subclasses with an architecture."""
        if cls.architecture is None and found.needs_description:
            raise ValueError(f"{found.name} has no {hub.CONFIG}; call from_pretrained of a class with a number")
        if found.architecture in (None, cls.architecture):
            return cls
        classes = [cls] if cls.architecture else list(_subclasses(cls))
        for candidate in classes:
            if candidate.architecture == found.architecture:
                return candidate
        known = ", ".join(candidate.architecture for candidate in classes if candidate.architecture)
        raise ValueError(f"{found.name} is a {found.architecture}; {cls.__name__}.from_pretrained builds {known}")

    @classmethod
    def _build(cls: type[Network], found: Found, kwargs: dict[str, Any]) -> Network:
        arguments = dict(found.arguments)
        if "memory_efficient" in kwargs:
            arguments.pop("checkpointing", None)
        own = OF_ARCHITECTURE if cls.architecture else ()
        described = {name: arguments.pop(name) for name in own if name in arguments}
        try:
            model = cls(**(arguments | kwargs))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{found.name} cannot be built: {error}") from error
        other = [f"{name}={value}" for name, value in described.items() if model.config[name] != value]
        if other:
            raise ValueError(f"{found.name} is no {cls.__name__}: it has {', '.join(other)}")
        return model


def _subclasses(network: type[Network]) -> Iterator[type[Network]]:
    for subclass in network.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def find(source: Any, architecture: str | None, options: dict[str, Any]) -> Found:
    """What ``source`` is, for a class that builds ``architecture``, or any network (None); see `from_pretrained`.

    Raises:
        as `PretrainedNetwork.from_pretrained`.
    """
    if names_torchvision_weights(source):
        return _in_torchvision(source, architecture)
    if not isinstance(source, str | Path):
        raise TypeError(f"expected {EXPECTED}; got a {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        return _described(str(source), hub.folder_fetch(path))
    if path.is_file() or isinstance(source, Path) or path.suffix in SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        checkpoint = read_file(path)
        return Found(str(source), lambda: checkpoint, arguments=described_network(checkpoint))
    name = hub.hub_name(source)
    if name is None:
        raise ValueError(f"unknown weights {source!r}; expected {EXPECTED}")
    repository, revision = name
    return _described(repository, hub.hub_fetch(repository, **options | {"revision": revision or options["revision"]}))


def _in_torchvision(source: Any, architecture: str | None) -> Found:
    name = architecture or architecture_of(source)
    if name is None:
        raise ValueError(f"{source!r} names no network; call from_pretrained of a class with a number")
    weights = find_weights(name, source)
    return Found(str(weights), partial(download, weights), name, weights=weights)


def _described(name: str, fetch: hub.Fetch) -> Found:
    """A network with its description beside it."""
    config = hub.read_config(name, fetch)
    read = partial(hub.read_weights, name, fetch)
    if config is None:
        return Found(name, read, needs_description=True)
    if hub.is_timms(config):
        architecture, arguments, preprocessing = hub.from_timm(name, config)
        return Found(name, read, architecture, arguments, preprocessing)
    arguments, own_preprocessing = hub.split_preprocessing(name, config)
    return Found(name, read, None, arguments, own_preprocessing)
