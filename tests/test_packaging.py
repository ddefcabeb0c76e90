"""What is installed is what is in the repository, and what is pinned is what is allowed."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def lines(section: str, key: str) -> list[str]:
    return [line for line in SETUP[section][key].splitlines() if line and not line.startswith("#")]


def test_every_package_is_listed() -> None:
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "convlstm_fish").rglob("__init__.py")}
    assert set(lines("options", "packages")) == {".".join(f.parts) for f in folders} | {"convlstm_fish.configs"}


def test_every_data_file_is_covered() -> None:
    patterns = {package: lines("options.package_data", package) for package in SETUP["options.package_data"]}
    for package, folder in (("convlstm_fish", "convlstm_fish"), ("convlstm_fish.configs", "configs")):
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or path.suffix in (".py", ".pyc"):
                continue
            home, inside = package, path.relative_to(ROOT / folder)
            while len(inside.parts) > 1 and f"{home}.{inside.parts[0]}" in lines("options", "packages"):
                home, inside = f"{home}.{inside.parts[0]}", Path(*inside.parts[1:])
            assert any(inside.match(pattern) for pattern in patterns.get(home, [])), f"{path} is not installed"


def requirements() -> dict[str, str]:
    found = {}
    extras = list(SETUP["options.extras_require"])
    texts = lines("options", "install_requires") + [t for e in extras for t in lines("options.extras_require", e)]
    for text in texts:
        match = re.match(r"([\w-]+)(?:\[\w+\])?(.*)", text)
        if match and match[1] != "convlstm-fish":
            found[match[1].lower()] = match[2]
    return found


def test_constraints_pin_what_is_required_of_users_and_developers() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {m[1].lower(): m[2] for m in re.finditer(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE)}
    unpinned = set(requirements()) - set(pinned)
    # Extras that the tests do not install, and one that only carries types.
    assert unpinned <= {"onnx", "onnxscript", "onnxruntime", "safetensors", "wandb", "types-pyyaml", "jinja2"}
    for name, rule in requirements().items():
        least = re.search(r">=([\d.]+)", rule)
        if least and name in pinned:
            assert tuple(map(int, pinned[name].split("."))) >= tuple(map(int, least[1].split("."))), name


def test_malicious_releases_are_excluded() -> None:
    rule = requirements()["pytorch-lightning"]
    assert {"!=2.6.2", "!=2.6.3", ">=2.6.6"} <= set(rule.split(","))
