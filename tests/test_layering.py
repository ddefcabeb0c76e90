"""The arrows between the rooms: who may import whom, and where the heavy libraries may appear."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convlstm_fish

ROOT = Path(convlstm_fish.__file__).parent

# What the files of a room may import from this package, besides their own room.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "ops": {"errors", "progress"},
    "layers": {"errors", "progress", "ops"},
    "models": {"errors", "progress", "ops", "layers"},
    "tasks": {"errors", "files", "progress", "ops", "layers", "models", "evaluate"},  # evaluate: scores of frames
    "data": {"errors", "progress"},
    "evaluate": {"errors", "files", "progress", "data"},
    "interop": {"errors", "progress", "ops", "layers", "models"},
}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}


def room_of(path: Path) -> str:
    """The room: "ops" for ops/reference.py, "cli" for cli.py and what belongs to it, "package" for the package."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if first.startswith(("cli", "tensorboard", "__main__")):
        return "cli"
    return "package" if first == "__init__" else first


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, except for type checkers only."""
    found: set[str] = set()
    package = ".".join(("convlstm_fish", *path.relative_to(ROOT).parent.parts))

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update({module} | {f"{module}.{alias.name}" for alias in node.names})
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
        ):
            found.add(str(node.args[0].value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = {path: imports_of(path) for path in FILES}


def offenders(libraries: set[str]) -> set[Path]:
    return {path for path in FILES if any(module.split(".")[0] in libraries for module in IMPORTS[path])}


def test_the_scan_sees_imports() -> None:
    assert "torch" in IMPORTS[ROOT / "ops" / "reference.py"]
    assert "convlstm_fish.ops.compiled" in IMPORTS[ROOT / "ops" / "reference.py"], "also inside functions"
    assert "convlstm_fish.ops" in IMPORTS[ROOT / "layers" / "conv_lstm_cell.py"]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_one_way(room: str) -> None:
    files = [path for path in FILES if room_of(path) == room]
    assert files, f"no file in {room}"
    for path in files:
        for module in IMPORTS[path]:
            parts = module.split(".")
            if parts[0] == "convlstm_fish" and len(parts) > 1:
                assert parts[1] in ALLOWED[room] | {room}, f"{path.relative_to(ROOT)} imports {module}"


def test_only_the_command_line_is_above_the_commands() -> None:
    for path in FILES:
        above = {
            module for module in IMPORTS[path] if module.startswith(("convlstm_fish.cli", "convlstm_fish.commands"))
        }
        if room_of(path) == "commands":
            assert not any(module.startswith("convlstm_fish.cli.") or module == "convlstm_fish.cli" for module in above)
        elif room_of(path) != "cli":
            assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_tasks_and_data_meet_in_the_batch_only() -> None:
    for path in FILES:
        rooms = {"tasks": "convlstm_fish.data", "data": "convlstm_fish.tasks"}
        if other := rooms.get(room_of(path)):
            assert not any(module.startswith(other) for module in IMPORTS[path]), path


def test_lightning_is_in_tasks_datamodules_and_the_command_line() -> None:
    for path in offenders(LIGHTNING):
        where = path.relative_to(ROOT)
        assert room_of(path) in ("tasks", "cli", "commands") or where.parts[:2] == ("data", "modules"), where


def test_triton_and_cuda_are_in_the_kernels() -> None:
    places = {path.relative_to(ROOT).parts[:2] for path in offenders({"triton", "cuda"})}
    assert places == {("ops", "triton_kernels"), ("ops", "hopper_kernels")}


def test_opencv_is_in_one_file() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in offenders({"cv2"})} <= {"data/video.py"}


def test_evaluation_and_pure_data_need_no_datamodules() -> None:
    for path in FILES:
        where = path.relative_to(ROOT)
        if room_of(path) == "evaluate" or (room_of(path) == "data" and where.parts[:2] != ("data", "modules")):
            assert not any(module.startswith("convlstm_fish.data.modules") for module in IMPORTS[path]), where


@pytest.mark.parametrize(
    "statement",
    [
        "import convlstm_fish",
        "from convlstm_fish import ConvLSTM, ConvLSTMCell, TimeDistributed, conv_lstm, ClipClassifier",
    ],
)
def test_the_package_is_light(statement: str) -> None:
    heavy = sorted(LIGHTNING | {"cv2", "torchvision", "torchmetrics", "triton", "keras", "tensorboard", "sklearn"})
    script = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_promised_is_there() -> None:
    for name in convlstm_fish.__all__:
        assert getattr(convlstm_fish, name).__name__ == name
    assert set(convlstm_fish.__all__) <= set(dir(convlstm_fish))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = convlstm_fish.nothing
