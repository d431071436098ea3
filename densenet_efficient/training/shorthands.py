"""What may be said shorter on the command line: a recipe by its name, a folder or a table as the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from densenet_efficient.training.recipes import recipe_path

DATA_NAMES = {
    "digits": "DigitsData",
    "cifar": "CIFARData",
    "svhn": "SVHNData",
    "medmnist": "MedMNISTData",
    "folder": "FolderData",
    "csv": "CSVData",
}

FORMS_OF_DATA = f"a folder of images, a table ending in .csv, or one of {', '.join(DATA_NAMES)}"
CLASS_PATH = re.compile(r"(\w+\.)+[A-Z]\w*")


def expand_shorthands(arguments: Sequence[str]) -> list[str]:
    """`--config NAME` of a recipe, `--data NAME`, `--data FOLDER` and `--data TABLE.csv`, in full."""
    expanders: dict[str, Callable[[str], list[str]]] = {
        "--config": lambda value: ["--config", recipe_path(value)],
        "-c": lambda value: ["--config", recipe_path(value)],
        "--data": _expand_data,
    }
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in expanders:
            result.append(argument)
            continue
        given = value if equals else next(rest, None)
        result += [argument] if given is None else expanders[flag](given)
    return result


def _expand_data(value: str) -> list[str]:
    if value and Path(value).is_dir():
        return ["--data", "FolderData", "--data.folder", value]
    if value.lower().endswith(".csv"):
        return ["--data", "CSVData", "--data.table", value]
    name = DATA_NAMES.get(value.lower(), value)
    if name in DATA_NAMES.values() or CLASS_PATH.fullmatch(name) or _is_config(Path(value)):
        return ["--data", name]
    if Path(value).exists():
        raise ValueError(f"--data {value}: not such a file; expected {FORMS_OF_DATA}")
    raise FileNotFoundError(f"--data {value}: no such folder; expected {FORMS_OF_DATA}")


def _is_config(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml", ".json") and path.is_file()
