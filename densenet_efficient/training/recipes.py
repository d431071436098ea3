"""The ready configs that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def describe_recipes() -> str:
    """One line per recipe: its name and the first line of its file."""
    lines = [(name, (FOLDER / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")) for name in recipe_names()]
    return "\n".join(f"  {name:<20} {text}" for name, text in lines)


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `--config NAME` of a recipe as the path of its file, unless a file has this name."""
    result = list(arguments)
    for index, argument in enumerate(result):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            result[index] = f"{flag}={_recipe_path(value)}"
        elif index + 1 < len(result):
            result[index + 1] = _recipe_path(result[index + 1])
    return result


def _recipe_path(name: str) -> str:
    if Path(name).exists():
        return name
    if name in recipe_names():
        return str(FOLDER / f"{name}.yaml")
    raise FileNotFoundError(f"--config {name}: no such file, and no such recipe; the recipes are\n{describe_recipes()}")
