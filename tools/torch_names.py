"""What qmove uses of PyTorch, and what each release has of it: read from sources, none of them run.

    python -m tools.torch_names torch-2.6.0-*.whl torch-2.8.0-*.whl torch-2.14.1-*.whl

writes `tests/torch_releases.json` from wheels of releases (any platform's: their Python sources and
stubs are the same), with every name that the code uses now.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "torch_releases.json"
OURS = ("qmove_core", "nodes")
# Of these the table also says what came later than the oldest release: all else that is public
# there was always there, so that most new uses need no new table.
PUBLIC = (
    "torch",
    "torch.Tensor",
    "torch.accelerator",
    "torch.cuda",
    "torch.nn.functional",
    "torch.nn",
)
_ABSENT = ("AttributeError", "ImportError", "ModuleNotFoundError")


@dataclass(frozen=True)
class Use:
    """One use of a name of PyTorch's.

    Attributes:
        name: in full, for example `torch.cuda.host_memory_stats`.
        where: file and line.
        is_guarded: whether the code goes on where the name is missing.
        keywords: those that a call passes; None where it is not called.
    """

    name: str
    where: str
    is_guarded: bool
    keywords: tuple[str, ...] | None = None


def uses(files: Iterable[Path] | None = None) -> list[Use]:
    """Every use of a name of PyTorch's in our code, or in these files."""
    if files is None:
        files = [file for room in OURS for file in sorted((ROOT / room).rglob("*.py"))]
    found = []
    for file in files:
        looking = _Looking(file)
        looking.visit(ast.parse(file.read_text(encoding="utf-8")))
        found += looking.found
    return found


class _Looking(ast.NodeVisitor):
    """Collects what one file uses."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, list[Use]()
        self._names = dict[str, str]()  # local name: name in full
        self._guards = 0
        self._known = list[set[str]]()  # names that were asked for with hasattr

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "torch":
                self._names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                self._note(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] != "torch":
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._names[alias.asname or alias.name] = name
            self._note(name, node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        whole = self._full_name(node.args[0]) if len(node.args) > 1 else None
        if whole is not None and isinstance(name := node.args[1], ast.Constant):
            # getattr, hasattr and our own functions of that kind
            asked = ast.unparse(function)
            guarded = asked == "hasattr" or (asked == "getattr" and len(node.args) > 2)
            if isinstance(name.value, str) and name.value.isidentifier():
                self._note(f"{whole}.{name.value}", node, guarded)
        called = self._full_name(function)
        if called is not None:
            keywords = tuple(each.arg for each in node.keywords if each.arg is not None)
            self._note(called, node, keywords=keywords)
            for child in [*node.args, *node.keywords]:
                self.visit(child)
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._full_name(node)
        if name is None:
            self.generic_visit(node)
        elif isinstance(node.ctx, ast.Load):
            self._note(name, node)

    def visit_Try(self, node: ast.Try) -> None:
        catches = [each.type for each in node.handlers]
        names = {ast.unparse(n) for c in catches if c is not None for n in _one_or_more(c)}
        guarded = not names.isdisjoint(_ABSENT)
        self._guards += guarded
        for statement in node.body:
            self.visit(statement)
        self._guards -= guarded
        for rest in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(rest)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._visit_where(node.test, node.body)
        for statement in node.orelse:
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._visit_where(node.test, [node.body])
        self.visit(node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        if isinstance(node.op, ast.And):
            self._visit_where(node.values[0], node.values[1:])
        else:
            for value in node.values[1:]:
                self.visit(value)

    def _visit_where(self, test: ast.expr, body: Iterable[ast.AST]) -> None:
        """Visits what is reached only where a test was true."""
        known, for_types = set(), ast.unparse(test) == "TYPE_CHECKING"
        for node in ast.walk(test):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
                whole = self._full_name(node.args[0])
                name = node.args[1]
                if whole is not None and isinstance(name, ast.Constant):
                    known.add(f"{whole}.{name.value!s}")
        self._known.append(known)
        self._guards += for_types
        for each in body:
            self.visit(each)
        self._guards -= for_types
        self._known.pop()

    def _full_name(self, node: ast.AST) -> str | None:
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self._names:
            return None
        return ".".join([self._names[node.id], *reversed(parts)])

    def _note(
        self,
        name: str,
        node: ast.stmt | ast.expr,
        guarded: bool = False,
        keywords: tuple[str, ...] | None = None,
    ) -> None:
        if name.startswith("torch.ops."):  # made when it is asked for, from what is registered
            name = "torch.ops"
        known = any(name == each or name.startswith(f"{each}.") for k in self._known for each in k)
        file = self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file
        where = f"{file}:{node.lineno}"
        self.found.append(Use(name, where, guarded or known or self._guards > 0, keywords))


def _one_or_more(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


Parameters = list[list[str]]  # of each overload; "*" and "**" stand for whatever else there is


@dataclass
class Release:
    """The Python sources and stubs of one release of PyTorch.

    Args:
        folder: that of the package `torch`.
    """

    folder: Path
    _modules: dict[str, _Module | None] = field(default_factory=dict)

    def find(self, name: str) -> Parameters | None:
        """What a name in full takes where it is a function, and nothing where it is not ([]); None
        where the release has no such name."""
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            module = self._module(".".join(parts[:count]))
            if module is not None:
                return self._inside(module, parts[count:])
        return None

    def public_names(self, namespace: str) -> set[str]:
        """What is public in one of PUBLIC."""
        names = set[str]()
        if namespace == "torch.Tensor":
            for module_name, cls in (("torch._C", "TensorBase"), ("torch._tensor", "Tensor")):
                module = self._module(module_name)
                assert module is not None
                for node in module.names[cls]:
                    assert isinstance(node, ast.ClassDef)
                    names |= set(_names_in(node.body, module_name, is_package=False))
        else:
            module = self._module(namespace)
            assert module is not None
            stars = [star for each in module.stars if (star := self._module(each)) is not None]
            names = {name for each in (module, *stars) for name in each.names}
        return {name for name in names if not name.startswith("_")}

    def _inside(self, module: _Module, path: list[str]) -> Parameters | None:
        if not path:
            return []
        found = module.names.get(path[0])
        if found is None and module.name == "torch._C" and path[0] in self._of_c:
            found = []
        if found is None:
            for other in module.stars:
                if path[0].startswith("_") and other == "torch._C":
                    continue
                star = self._module(other)
                if star is not None and path[0] in star.names:
                    return self._inside(star, path)
            return None
        if isinstance(found, str):  # imported from elsewhere
            return self.find(".".join([found, *path[1:]]))
        if len(path) == 1:
            return _parameters(found)
        for node in found:
            if isinstance(node, ast.ClassDef):
                inside = self._in_class(module, node, path[1])
                if inside is not None:
                    return inside
        return None

    def _in_class(self, module: _Module, node: ast.ClassDef, name: str) -> Parameters | None:
        own = _names_in(node.body, module.name, is_package=False).get(name)
        if own is not None and not isinstance(own, str):
            return _parameters(own)
        for base in node.bases:
            of = self._inside_class_named(module, ast.unparse(base), name)
            if of is not None:
                return of
        return [] if hasattr(object, name) else None

    def _inside_class_named(self, module: _Module, base: str, name: str) -> Parameters | None:
        first, *rest = base.split(".")
        target = module.names.get(first)
        if isinstance(target, str):
            return self.find(".".join([target, *rest, name]))
        return self._inside(module, [first, *rest, name]) if target is not None else None

    @cached_property
    def _of_c(self) -> set[str]:
        """What the release's own lists say that `torch._C` has beside its stub."""
        rules = (self.folder / "_dynamo" / "trace_rules.py").read_text(encoding="utf-8")
        texts = [n.value for n in ast.walk(ast.parse(rules)) if isinstance(n, ast.Constant)]
        prefix = "torch._C."
        return {t[len(prefix) :] for t in texts if isinstance(t, str) and t.startswith(prefix)}

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = _read_module(self.folder, name)
        return self._modules[name]


@dataclass
class _Module:
    """What is defined at the top of a module: nodes, or the name in full of what is imported."""

    name: str
    names: dict[str, list[ast.AST] | str]
    stars: list[str]


def _read_module(folder: Path, name: str) -> _Module | None:
    base = folder.joinpath(*name.split(".")[1:])
    files = [base / "__init__.py", base / "__init__.pyi"]
    if base != folder:
        files += [base.with_suffix(".py"), base.with_suffix(".pyi")]
    texts = [(f, ast.parse(f.read_text(encoding="utf-8"))) for f in files if f.exists()]
    if not texts:
        return None
    module = _Module(name, {}, [])
    for file, tree in texts:
        is_package = file.stem == "__init__"
        module.names.update(_names_in(tree.body, name, is_package, module.stars))
    if base.is_dir():
        for child in base.iterdir():
            if child.suffix in (".py", ".pyi") or (child / "__init__.py").exists():
                module.names.setdefault(child.stem, f"{name}.{child.stem}")
    if name == "torch":
        # Its own loop takes these over, which no reader of the text could see.
        module.stars += ["torch._C._VariableFunctions", "torch._C"]
    return module


def _names_in(
    body: Iterable[ast.stmt], module: str, is_package: bool, stars: list[str] | None = None
) -> dict[str, list[ast.AST] | str]:
    names = dict[str, list[ast.AST] | str]()

    def add(name: str, node: ast.AST) -> None:
        before = names.get(name)
        names[name] = [*(before if isinstance(before, list) else []), node]

    for node in _statements(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            add(node.name, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in _one_or_more(target):
                    if isinstance(each, ast.Name):
                        add(each.id, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names.setdefault(alias.asname or alias.name.split(".")[0], alias.name)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            of = node.module or ""
            if node.level:
                of = f"{package}.{of}" if of else package
            for alias in node.names:
                if alias.name != "*":
                    names[alias.asname or alias.name] = f"{of}.{alias.name}"
                elif stars is not None:
                    stars.append(of)
    return names


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those at the top, also in branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _parameters(found: list[ast.AST]) -> Parameters:
    overloads = []
    for node in found:
        if isinstance(node, ast.FunctionDef):
            takes = node.args
            names = [each.arg for each in (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)]
            if takes.vararg is not None:
                names.append("*")
            if takes.kwarg is not None:
                names.append("**")
            overloads.append([name for name in names if name != "self"])
    return overloads


def table(wheels: Iterable[Path]) -> dict[str, object]:
    """The names that our code uses, and what each release has of them."""
    sources = dict[str, dict[str, str]]()
    names = dict[str, dict[str, Parameters | None]]()
    public = dict[str, dict[str, set[str]]]()
    wanted = sorted({use.name for use in uses()})
    for wheel in wheels:
        version = wheel.name.split("-")[1]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        sources[version] = {"wheel": wheel.name, "sha256": digest}
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if m.endswith((".py", ".pyi"))]
                archive.extractall(folder, [m for m in members if m.startswith("torch/")])
            release = Release(Path(folder) / "torch")
            for name in wanted:
                names.setdefault(name, {})[version] = release.find(name)
            for namespace in PUBLIC:
                public.setdefault(namespace, {})[version] = release.public_names(namespace)
    later = {
        namespace: {version: sorted(set().union(*of.values()) - of[version]) for version in of}
        for namespace, of in public.items()
    }
    return {"sources": sources, "later": later, "names": names}


def main() -> None:
    TABLE.write_text(as_text(table(map(Path, sys.argv[1:]))), encoding="utf-8")


def as_text(found: dict[str, object]) -> str:
    """JSON with one name a line."""
    names = found["names"]
    assert isinstance(names, dict)
    lines = [f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in names.items()]
    later = found["later"]
    assert isinstance(later, dict)
    lacking = [f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in later.items()]
    sources = json.dumps(found["sources"], indent=1).replace("\n", "\n ")
    parts = ['{\n "sources": ' + sources, ' "later": {\n' + ",\n".join(lacking) + "\n }"]
    return ",\n".join([*parts, ' "names": {\n' + ",\n".join(lines) + "\n }\n}\n"])


if __name__ == "__main__":
    main()
