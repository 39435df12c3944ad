"""Arrows go one way (docs/architecture.md): the imports of every file, read without running them."""

import ast
from pathlib import Path

import pytest

import fedcodec

ROOT = Path(fedcodec.__file__).parent

# A file may import from earlier rows, and in its own row from its own folder only.
LAYERS = [
    ["errors", "dtypes", "limits", "digests", "accounting"],
    ["reader"],
    ["ops"],
    ["spec"],
    ["gpu"],
    ["arrays"],
    ["shared", "state"],
    ["codec", "body"],
    ["registry"],
    ["codecs", "text"],
    ["frame"],
    ["pipeline"],
    ["feedback", "aggregate", "information"],
    ["__init__"],
    ["testing", "adapters"],
    ["sim"],
    ["bench"],
    ["cli"],
]
# Upward on purpose, inside functions: what a user calls on a low thing hands over to the rooms above.
FACADES = {
    ("codec", "pipeline", "encode"),
    ("spec", "arrays", "of"),
    ("codecs", "frame", "_read"),  # a residual holds whole pipelines
    ("codecs", "pipeline", "read"),  # a decoder comes in a payload
    ("shared", "codecs", "add_decoder"),
}
# Who may know a library besides NumPy and the standard one.
GUESTS = {
    "zstandard": ["codecs"],
    "ml_dtypes": ["arrays", "testing"],
    "hypothesis": ["testing"],
    "cupy": ["arrays"],
    "torch": ["arrays", "codecs", "sim", "adapters", "bench", "cli"],
    "jax": ["arrays", "adapters"],
    "flwr": ["adapters", "sim"],
    "nvflare": ["adapters"],
    "openfl": ["adapters"],
    "click": ["cli"],
    "rich": ["cli", "codecs", "sim"],
    "safetensors": ["cli"],
    "jinja2": ["sim"],
    "matplotlib": ["sim", "bench"],
    "cycler": ["sim"],
    "sklearn": ["sim"],
    "scipy": ["sim"],
}
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


class Imports(ast.NodeVisitor):
    """Collects (room imported or library, function it happens in or None)."""

    def __init__(self, package):
        self.package = package
        self.function = None
        self.own = []
        self.foreign = []

    def visit_FunctionDef(self, node):
        outer, self.function = self.function, self.function or node.name
        self.generic_visit(node)
        self.function = outer

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name.split("."))

    def visit_ImportFrom(self, node):
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        path = base + (node.module.split(".") if node.module else [])
        if path == ["fedcodec"]:
            for alias in node.names:
                self.add([*path, alias.name])
        else:
            self.add(path)

    def add(self, path):
        if path[0] != "fedcodec":
            self.foreign.append((path[0], self.function))
        elif len(path) == 1 or path[1] not in RANK:
            if path[1:] != ["_native"]:
                self.own.append(("__init__", self.function))
        else:
            self.own.append((path[1], self.function))


def files():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield pytest.param(path, parts, id="/".join(parts))


def imports_of(path, parts):
    found = Imports(["fedcodec", *parts[:-1]])
    found.visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def upward(found, room):
    return {
        (room, target, function)
        for target, function in found.own
        if target != room and RANK[target] >= RANK[room]
    }


@pytest.mark.parametrize(("path", "parts"), list(files()))
def test_no_arrow_goes_up(path, parts):
    assert parts[0] in RANK, "a new room: give it a row in LAYERS"
    assert len(parts) <= 2, "folders are not deeper than two"
    found = imports_of(path, parts)
    assert upward(found, parts[0]) - FACADES == set()
    for library, _ in found.foreign:
        assert parts[0] in GUESTS.get(library, [parts[0]]), (
            f"{library} is none of {parts[0]}'s business"
        )


def test_every_facade_is_still_there():
    found = set()
    for path, parts in (param.values for param in files()):
        found |= upward(imports_of(path, parts), parts[0])
    assert found == FACADES


def test_every_room_has_one_row():
    assert sum(map(len, LAYERS)) == len(RANK)
    rooms = {param.values[1][0] for param in files()}
    assert rooms == set(RANK)


def test_frameworks_are_not_imported_at_the_top():
    for path, parts in (param.values for param in files()):
        if parts[0] in ("sim", "adapters", "cli"):
            continue
        for library, function in imports_of(path, parts).foreign:
            assert function is not None or library not in ("torch", "jax", "cupy"), parts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .pipeline import decode", {("ops", "pipeline", None)}),
        ("from . import frame", {("ops", "frame", None)}),
        ("import fedcodec.sim.data", {("ops", "sim", None)}),
        ("import fedcodec as fc", {("ops", "__init__", None)}),
        ("def f():\n    from fedcodec.codecs.raw import Raw", {("ops", "codecs", "f")}),
        ("from .errors import DecodeError\nfrom . import reader", set()),
        ("if TYPE_CHECKING:\n    from .spec import Spec", set()),
    ],
)
def test_the_test_sees_arrows(source, expected):
    found = Imports(["fedcodec"])
    found.visit(ast.parse(source))
    assert upward(found, "ops") == expected
