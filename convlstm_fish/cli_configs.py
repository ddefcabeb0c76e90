"""Config files: where the shipped ones lie, and how one is found and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from convlstm_fish.errors import UserError


def config_folder() -> Path:
    """Where the shipped configs lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name: str) -> str:
    """A config file by path, or one of the shipped ones by name, with or without ``configs/`` and ``.yaml``.

    Raises:
        UserError: when there is no such file.
    """
    if Path(name).is_file():
        return name
    shipped = config_folder()
    inner = name.removeprefix("configs/")
    for candidate in (shipped / inner, shipped / f"{inner}.yaml"):
        if candidate.is_file():
            return str(candidate)
    known = ", ".join(shipped_configs())
    raise UserError(f"--config {name}: no such file, and no shipped config of that name ({known})")


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: not readable, not YAML, not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: must hold keys such as model, data and trainer, got {type(content).__name__}"
        )
    return content


def class_options(path: str, section: str) -> dict[str, Any]:
    """The options that a config file gives the class of its section "model" or "data"."""
    found = read_config(path).get(section)
    return (found.get("init_args") or {}) if isinstance(found, dict) else {}
