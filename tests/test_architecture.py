"""The rules that docs/architecture.md states about the code, enforced."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shmloader"

# From the bottom to the top; a module imports only from lower ranks or its own.
RANKS = [
    {"errors"},
    {
        "column_path",
        "catalog",
        "registry",
        "options",
        "policy",
        "config",
        "checksum",
        "sample",
        "union",
        "keys",
        "permutation",
        "mixture",
        "weighting",
        "order",
        "sizes",
    },
    {"sources", "processors", "_native"},
    {"files", "spill_file", "log_pipe", "deaths", "quarantine", "outages"},
    {"guest"},
    {"ring"},
    {"writer"},
    {"prefetch"},
    {"live_orders"},
    {"stand_ins"},
    {"reader"},
    {"iteration"},
    {"views"},
    {"packed"},
    {"tokens"},
    {"opening", "selection", "made_up", "collate", "stats", "sampler", "seeding", "worker_errors"},
    {"base_dataset"},
    {"dataset", "iterable"},
    {"compat"},
    {"cli", "__main__"},
]
DATASETS = {"base_dataset", "dataset", "iterable"}
RANK = {name: i for i, names in enumerate(RANKS) for name in names}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports when it runs (not those for type checkers)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(dotted: str) -> str | None:
    """The part of the package that a dotted name belongs to."""
    match = re.match(r"shmloader\.(\w+)", dotted)
    return match[1] if match and match[1] in RANK else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_list_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no rank: add it here and to docs/architecture.md"
    above = {part for name in imports(path) if (part := part_of(name)) and RANK[part] > RANK[own]}
    assert not above


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sources_processors_and_ring_do_not_see_one_another(path):
    camps = [{"sources"}, {"processors"}, {"files", "guest", "ring", "writer"}]
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if any(own in camp for camp in camps):
        others = set().union(*(camp for camp in camps if own not in camp))
        assert not {part_of(name) for name in imports(path)} & others


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_readers_do_not_write(path):
    """Only services have a `Writer`: the ring is read-only for all others."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in ("writer", "prefetch"):
        assert "writer" not in {part_of(name) for name in imports(path)}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("datasets", {"sources", "cli"}),
        (
            "torch",
            {
                "views",
                "made_up",
                "packed",
                "tokens",
                "opening",
                "collate",
                "sampler",
                "seeding",
                "worker_errors",
                *DATASETS,
                "compat",
                "cli",
            },
        ),
    ],
)
def test_heavy_libraries_are_imported_only_where_they_belong(library, homes):
    users = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for path in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert users <= homes


def test_only_the_binding_includes_python():
    users = {p.name for p in PACKAGE.rglob("*.[ch]") if re.search(r"#\s*include\s*<Python\.h>", p.read_text())}
    assert users == {"_native.c"}


def test_the_public_names_are_those_that_exist():
    import shmloader

    for name in shmloader.__all__:
        assert getattr(shmloader, name) is not None
    assert set(dir(shmloader)) == set(shmloader.__all__)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "_native.c"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_module_can_be_held_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 400
