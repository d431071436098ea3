"""The ready configs that come with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def describe_recipes() -> str:
    """One line per recipe: its name and the first line of its file."""
    lines = [(name, (FOLDER / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")) for name in recipe_names()]
    return "\n".join(f"  {name:<20} {text}" for name, text in lines)


def recipe_path(name: str) -> str:
    """The path of a config file: this one, if there is such a file, else that of the recipe of this name.

    A folder is none, but a pipe is, such as that of a shell's <(...).
    """
    if Path(name).exists() and not Path(name).is_dir():
        return name
    if name in recipe_names():
        return str(FOLDER / f"{name}.yaml")
    raise FileNotFoundError(
        f"--config {name}: no such file, and no such recipe; the recipes are {', '.join(recipe_names())}"
    )
