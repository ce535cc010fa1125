"""The layout's own tests: which way imports point, how large files and rooms may grow, and that names are unique."""

import ast
from collections import Counter
from graphlib import TopologicalSorter

from places import HELPERS, PACKAGE, TESTS

# Each room may import itself and the rooms named here; the arrows point one way.
ALLOWED = {
    "config": set(),
    "kernels": {"cluster", "config"},
    "parallel": {"cluster", "config", "kernels"},
    "cluster": {"config"},
    "transport": {"config"},
    "shards": {"cluster", "config", "transport"},
    "models": {"config", "kernels", "parallel"},
    "cpu": {"kernels", "models"},
    "losses": {"config", "parallel", "models"},
    "checkpoint": {"config", "models", "parallel"},
    "data": {"cluster", "config", "cpu", "shards"},
    "packing": {"cluster", "config", "data", "parallel", "shards"},
    "engine": {"config", "checkpoint", "cpu", "kernels", "models", "parallel"},
    "evaluation": {"config", "models", "losses", "data", "shards", "checkpoint", "parallel"},
    "monitoring": {"config", "checkpoint", "evaluation", "losses", "models", "parallel"},
    "resilience": {"config", "checkpoint", "engine", "monitoring", "parallel"},
    "training": {"cluster", "config", "checkpoint", "cpu", "data", "engine", "evaluation", "losses", "models",
                 "monitoring", "parallel", "resilience", "shards"},
    "sampling": {"cluster", "config", "checkpoint", "cpu", "data", "evaluation", "models", "packing", "parallel",
                 "shards"},
    "measurements": {"checkpoint", "data", "evaluation", "losses", "models", "parallel", "sampling", "shards"},
    "app": {"models", "data", "checkpoint", "evaluation", "sampling"},
    "replay": {"checkpoint", "cluster", "config", "monitoring", "training"},
    "dry_run": {"config", "engine", "losses", "models", "monitoring", "parallel", "training"},
    "planning": {"cluster", "config", "dry_run", "monitoring"},
    # Runs the others as commands.
    "studies": {"cluster", "config", "data", "shards", "checkpoint", "evaluation"},
    "demo": {"cluster", "config", "data", "packing", "shards", "checkpoint", "parallel", "evaluation", "measurements",
             "monitoring", "sampling", "training", "studies"},
    "cli": {"kernels", "config", "models", "losses", "data", "packing", "shards", "checkpoint", "parallel",
            "evaluation", "measurements", "resilience", "sampling", "training", "demo", "cluster", "studies", "app",
            "planning", "replay"},
}
MOST_FILES = 15  # of a directory
MOST_TEST_FILES = 20


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
            of_a_room = room(path) and parts[0] == "gigatok_ds" and parts[1] in ALLOWED and parts[1] != room(path)
            if of_a_room and parts[1] not in ALLOWED[room(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_deepspeed_and_megatron_are_imported_in_one_place_each():
    for path in files():
        roots = {name.split(".")[0] for name in imports(path)}
        if "deepspeed" in roots:  # the one calls it, the other asks whether it takes its settings
            assert path.relative_to(PACKAGE).as_posix() in ("engine/engine.py", "engine/deepspeed_schema.py")
        if "megatron" in roots:
            assert room(path) == "parallel"


def test_every_room_is_known():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms - {"recipes"} <= set(ALLOWED)  # recipes holds YAML only


def module_of(path):
    return ".".join(["gigatok_ds", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def test_no_circle_between_files():
    """Imports inside of functions and for type checkers count, too."""
    modules = {module_of(path): path for path in files()}
    graph = {}
    for module, path in modules.items():
        named = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = (named & modules.keys()) - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_rooms_stay_small():
    count = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in files() if path.name != "__init__.py")
    assert not {room: number for room, number in count.items() if number > MOST_FILES}


def test_no_function_has_more_than_eight_parameters():
    """But for kernels, to which everything is handed one by one."""
    wrong = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and room(path) != "kernels":
                found = node.args
                names = [each.arg for each in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 8:
                    wrong.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert not wrong


def test_no_two_files_or_classes_share_a_name():
    names = Counter(path.name for path in files() if path.name != "__init__.py")
    classes = Counter(node.name for path in files() for node in ast.parse(path.read_text()).body
                      if isinstance(node, ast.ClassDef))
    assert not {name: number for name, number in (names | classes).items() if number > 1}


def test_files_stay_small():
    long = {path.name: count for path in files() if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def prints_to_stderr(path):
    return any(isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
               and any(option.arg == "file" and "stderr" in ast.unparse(option.value) for option in node.keywords)
               for node in ast.walk(ast.parse(path.read_text())))


def test_what_is_no_result_goes_through_logging():
    """A command's last word is the command line's own."""
    assert [path.name for path in files() if prints_to_stderr(path)] == ["main.py"]


def test_tests_lie_in_the_rooms_of_what_they_test():
    """Modules of tests are imported by their names alone, so no two share one."""
    tests = list(TESTS.rglob("test_*.py"))
    count = Counter(path.parent.relative_to(TESTS).as_posix() for path in tests)
    assert count.keys() <= ALLOWED.keys() | {"repository"}
    assert not {room: number for room, number in count.items() if number > MOST_TEST_FILES}
    names = Counter(path.name for path in [*tests, *HELPERS.glob("*.py")])
    assert not {name: number for name, number in names.items() if number > 1}


def test_no_test_imports_another():
    """What several of them need is in tests/helpers, or a fixture of a conftest.py."""
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    assert not [f"{path.name} imports {name}" for path in TESTS.rglob("*.py") for name in imports(path)
                if name.partition(".")[0] in modules]
