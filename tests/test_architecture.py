"""The layout's own tests: which way imports point, and how large a file may grow."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "gigatok_ds"

# Each room may import itself and the rooms named here; the arrows point one way.
ALLOWED = {
    "config": set(),
    "kernels": {"config"},
    "parallel": {"config"},
    "models": {"config", "kernels", "parallel"},
    "losses": {"config", "kernels", "parallel", "models"},
    "cluster": {"config", "parallel"},
    "data": {"config", "parallel"},
    "checkpoint": {"config", "models", "parallel"},
    "evaluation": {"config", "models", "losses", "data", "checkpoint", "parallel", "kernels"},
    "sampling": {"config", "models", "data", "checkpoint", "parallel", "kernels", "evaluation"},
    "training": {"config", "models", "losses", "data", "checkpoint", "parallel", "kernels", "evaluation"},
    "app": {"models", "data", "checkpoint", "evaluation", "sampling"},
    "planning": {"config", "models", "losses", "parallel", "training"},
    # Runs the others as commands.
    "studies": {"config", "data", "checkpoint", "evaluation"},
    "demo": {"config", "models", "losses", "data", "checkpoint", "parallel", "evaluation", "sampling", "training", "studies"},
    "cli": {"kernels", "config", "models", "losses", "data", "checkpoint", "parallel", "evaluation", "sampling", "training",
            "demo", "cluster", "studies", "app", "planning"},
}


def imports(path):
    """Dotted names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def test_imports_point_one_way():
    wrong = []
    for path in files():
        for name in imports(path):
            parts = name.split(".")
            if room(path) and parts[0] == "gigatok_ds" and parts[1] in ALLOWED and parts[1] != room(path):
                if parts[1] not in ALLOWED[room(path)]:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_deepspeed_and_megatron_are_imported_in_one_place_each():
    for path in files():
        roots = {name.split(".")[0] for name in imports(path)}
        if "deepspeed" in roots:  # the one calls it, the other asks whether it takes its settings
            assert path.relative_to(PACKAGE).as_posix() in ("training/engine.py", "training/deepspeed_schema.py")
        if "megatron" in roots:
            assert room(path) == "parallel"


def test_every_room_is_known():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms - {"recipes"} <= set(ALLOWED)  # recipes holds YAML only


def test_files_stay_small():
    long = {path.name: count for path in files() if (count := len(path.read_text().splitlines())) > 400}
    assert not long
