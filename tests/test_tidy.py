"""The rules of the house that a reader can rely on: machines are pure, floors are kept, rooms stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("ha_core", "transports", "storage", "benchmarks")

# What a machine may import, besides the lower floors: nothing that acts, waits, tells the time or draws at random.
PURE = {
    "__future__", "abc", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools", "hashlib", "heapq", "hmac",
    "ipaddress", "fnmatch", "itertools", "math", "operator", "re", "struct", "types", "typing", "zlib", "attrs", "msgpack",
}  # fmt: skip
PURE_OURS = (
    "ha_core.errors",
    "ha_core.ids",
    "ha_core.config",
    "ha_core.events",
    "ha_core.interfaces",
    "ha_core.machines",
    "ha_core.guard",
)

# Floors from the bottom; a module imports from its own floor or below.
FLOORS = [
    ("errors", "ids", "_version"),
    ("config", "events"),
    ("machines",),
    ("interfaces",),
    ("storage", "transports", "hypervisors", "fencing", "security"),
    ("registry",),
    ("runtime",),
    ("roles", "center", "testing"),
    ("demo",),
    ("cli",),
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}

MODULE_LINES = 800
FUNCTION_LINES = 70
TEST_MODULE_LINES = 1200


def modules(*folders: str) -> list[Path]:
    """Every module below the folders, each once (ha_core/transports and ha_core/storage are links)."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any((ROOT / part).is_symlink() for part in _parents(path))]


def _parents(path: Path) -> Iterator[Path]:
    yield from (path.relative_to(ROOT)).parents


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("transports", "storage"):
        parts = ("ha_core", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            if node.module == "ha_core":
                yield from ((node.lineno, f"ha_core.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def test_machines_import_nothing_that_acts() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules("ha_core/machines")
        for line, name in imports(path)
        if name.split(".")[0] not in PURE and not name.startswith(PURE_OURS)
    ]

    assert bad == []


def test_machines_have_no_coroutines_and_no_unordered_sets() -> None:
    bad = []
    for path in modules("ha_core/machines"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: async")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hash", "id", "open", "print")
            ):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.func.id}()")
            if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Set | ast.SetComp):
                bad.append(f"{path.relative_to(ROOT)}: iterates a set")

    assert bad == []


def test_guard_needs_nothing_but_the_standard_library() -> None:
    import sys

    siblings = {path.stem for path in modules("ha_core/guard")}
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules("ha_core/guard")
        for line, name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | siblings and not name.startswith("ha_core.guard")
    ]

    assert bad == []


def test_imports_point_down() -> None:
    bad = []
    for path in modules("ha_core", "transports", "storage"):
        room = (name_of(path).split(".") + [""])[1]
        if room not in FLOOR_OF:
            continue
        for line, name in imports(path):
            other = (name.split(".") + [""])[1]
            if name.startswith("ha_core.") and other in FLOOR_OF and FLOOR_OF[other] > FLOOR_OF[room]:
                bad.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {other}, which stands above it")

    assert bad == []


@pytest.mark.parametrize("folder", [*CODE, "tests"])
def test_rooms_are_small(folder: str) -> None:
    limit = TEST_MODULE_LINES if folder == "tests" else MODULE_LINES
    bad = []
    for path in modules(folder):
        text = path.read_text()
        if text.count("\n") > limit:
            bad.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    bad.append(
                        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {size} lines, at most {FUNCTION_LINES}"
                    )

    assert bad == []


def test_no_bare_except_and_nobody_catches_bugs() -> None:
    bad = []
    for path in modules(*CODE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                reraised = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
                if re.search(r"everything|InvariantError|Cancelled", caught) and not reraised:
                    bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: catches {caught}")

    assert bad == []


@pytest.mark.parametrize("folder", CODE)
def test_every_module_says_what_it_is_for(folder: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(folder)
        if path.name not in ("__main__.py", "_version.py") and not ast.get_docstring(ast.parse(path.read_text()))
    ]

    assert silent == []


def test_rooms_that_the_map_names_are_there() -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_*]*(?:\.py)?)`", (ROOT / "docs/architecture.md").read_text())
    missing = [name for name in named if not any(list(base.glob(name.rstrip("/"))) for base in (ROOT, ROOT / "ha_core"))]

    assert missing == []
    assert len(named) > 30
