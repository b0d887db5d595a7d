"""The rules of the house, from source text to violations, so that each can be tested."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

KERNELS = frozenset({"fused_moe", "gather_reduce", "gla", "ragged_attention"})
PACKAGES = KERNELS | {"adapters", "microbench", "reference", "tpukit"}
HOUSE = PACKAGES | {"tests"}

_ARRAYS = frozenset({"jax", "jaxlib", "numpy", "ml_dtypes"})
# What each package may import besides itself and the standard library.
MAY_IMPORT = {
    "reference": _ARRAYS,
    "tpukit": _ARRAYS | {"libtpu"},
    "gla": _ARRAYS | {"reference", "tpukit"},
    "gather_reduce": _ARRAYS | {"reference", "tpukit"},
    "ragged_attention": _ARRAYS | {"reference", "tpukit"},
    "fused_moe": _ARRAYS | {"reference", "tpukit", "gather_reduce"},
    "adapters": _ARRAYS | {"reference", "tpukit"} | KERNELS,
    "microbench": _ARRAYS | {"absl", "reference", "tpukit"} | KERNELS,
}
ONLY_IN = {
    "tpukit/pytest_plugin.py": frozenset({"pytest"}),
    "tpukit/predict/timeline.py": frozenset({"matplotlib"}),
    "microbench/report.py": frozenset({"matplotlib"}),
    "microbench/peers.py": frozenset({"tokamax"}),
    "microbench/validation/peers.py": frozenset({"tokamax"}),
}
PRIVATE_JAX = "tpukit/_private.py"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
MAX_NESTING = 4

# Text that means something on one machine, or to the people of one day, only.
_LOCAL_TEXT = {
    "a path of one machine": r"(?<![\w.])/(?:work|root|home|Users|mnt)/\w",
    "a path of one machine's index": r"/opt/(?:pypi|wheels)",
    "how the work was organised": (
        r"(?i)\b(?:sub-?agent|work-?place|helper [a-z]\b(?=[.,:;)]|$)|this session|next session"
        r"|previous session|issue \d+\b)"
    ),
}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, also of those by name with importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def import_violations(path: str, source: str, stdlib: frozenset[str]) -> list[str]:
    """Imports against the arrows. `path` is relative to the checkout."""
    package = path.split("/")[0]
    allowed = MAY_IMPORT[package] | ONLY_IN.get(path, frozenset()) | {package} | stdlib
    return [
        f"{path}:{line}: {package} must not import {module}"
        for line, module in imported_modules(ast.parse(source))
        if module.split(".")[0] not in allowed
    ]


def private_jax_violations(path: str, source: str) -> list[str]:
    """Uses of names of JAX that begin with an underscore, outside the one file for them."""
    if path == PRIVATE_JAX:
        return []
    tree = ast.parse(source)
    found = [
        (line, module)
        for line, module in imported_modules(tree)
        if module.split(".")[0] in ("jax", "jaxlib") and _has_private_part(module)
    ]
    aliases = set(_jax_aliases(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in aliases:
                found.append((node.lineno, ast.unparse(node)))
    return [f"{path}:{line}: {name} is private to JAX" for line, name in sorted(set(found))]


def _jax_aliases(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("jax", "jaxlib"):
                    yield alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "jax",
            "jaxlib",
        ):
            yield from (alias.asname or alias.name for alias in node.names)


def _has_private_part(module: str) -> bool:
    return any(_is_private(part) for part in module.split("."))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def size_violations(path: str, source: str) -> list[str]:
    """Files, functions and nestings that do not fit a reader."""
    found = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                where = f"{path}:{node.lineno}: {node.name}"
                found.append(f"{where} has {length} lines, more than {MAX_FUNCTION_LINES}")
            depth = _nesting(node)
            if depth > MAX_NESTING:
                where = f"{path}:{node.lineno}: {node.name}"
                found.append(f"{where} nests {depth} deep, more than {MAX_NESTING}")
    return found


_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def _nesting(node: ast.AST) -> int:
    """Depth of nested control flow below `node`; an elif is as deep as its if."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            is_elif = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            inside = isinstance(child, _BLOCKS) and not is_elif
            deepest = max(deepest, _nesting(child) + inside)
    return deepest


def text_violations(path: str, text: str) -> list[str]:
    """Text that no reader elsewhere or later can use."""
    return [
        f"{path}:{number}: {what}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in _LOCAL_TEXT.items()
        if re.search(pattern, line)
    ]
