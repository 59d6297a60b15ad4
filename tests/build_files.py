"""Writes the BUILD files from the imports, or says where the two differ.

    python -m tests.build_files            # prints the differences
    python -m tests.build_files --write    # writes the files

A module is a py_library, a test file a py_test. The deps are the modules of
this repository that the file imports, or names in a string, as in
`[sys.executable, "-m", "dtrain.main"]`, or imports in a string that is a
program of several lines. The data are the files beside it that it names.
Packages from PyPI are no deps: they come from the Python that Bazel finds on
PATH.
"""

from __future__ import annotations

import ast
import itertools
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("dtrain", "launch", "tests")

# Tests that reach one of these can be left out where it is not installed.
TENSORFLOW = frozenset({"tensorflow", "tensorflow_datasets", "keras"})
# A test that imports this reads the checkout, which Bazel's sandbox hides.
CHECKOUT = "tests.build_files"

CONFTEST = "tests.conftest"
RUNNER = "tests.pytest_main"


class Module(NamedTuple):
    """A Python file and what it reaches directly.

    Attributes:
        directory: where it is, as a path from the root with slashes.
        file: its name there.
        modules: the modules of the repository that it needs.
        packages: first names of the other modules that it imports.
        data: the files beside it that it names.
    """

    directory: str
    file: str
    modules: frozenset[str]
    packages: frozenset[str]
    data: frozenset[str]


class Target(NamedTuple):
    """One rule of a BUILD file: its kind and its attributes but the name."""

    rule: str
    attributes: Mapping[str, object]


Targets = dict[str, Target]


def read_modules(root: pathlib.Path) -> dict[str, Module]:
    """Reads every Python file below `SOURCES`.

    Args:
        root: the top of the repository.

    Returns:
        The modules by dotted name; `__init__.py` goes by its package's.
    """
    paths: dict[str, pathlib.Path] = {}
    for source in SOURCES:
        for path in sorted(root.glob(f"{source}/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            paths[".".join(parts)] = path
    return {
        name: _read_module(root, path, name, paths)
        for name, path in paths.items()
    }


def _read_module(
    root: pathlib.Path, path: pathlib.Path, name: str, known: Collection[str]
) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    strings = set(_strings(tree))
    modules = set()
    packages = set()
    programs = filter(None, map(_program, strings))
    for imported in itertools.chain(*map(_imports, [tree, *programs])):
        module = _enclosing_module(imported, known)
        if module:
            modules.add(module)
        else:
            packages.add(imported.partition(".")[0])
    if not name.startswith("launch"):
        # A launcher names what another process runs, and needs none of it.
        named = {string.partition(":")[0] for string in strings}
        modules |= {each for each in named if "." in each and each in known}
    beside = {
        file.name
        for file in path.parent.iterdir()
        if file.is_file() and file.suffix != ".py" and file.name != "BUILD"
    }
    return Module(
        path.parent.relative_to(root).as_posix(),
        path.name,
        frozenset(modules - {name}),
        frozenset(packages),
        frozenset(strings & beside),
    )


def _imports(node: ast.AST) -> Iterator[str]:
    """Yields what is imported at run time, `a.b.c` for `from a.b import c`."""
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        children = iter(node.orelse)
    for child in children:
        yield from _imports(child)


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _program(text: str) -> ast.Module | None:
    """Returns the syntax of a string of several lines that is a program."""
    if "\n" not in text:
        return None
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _enclosing_module(dotted: str, known: Collection[str]) -> str:
    """Returns the longest beginning of `dotted` that is a module, or ""."""
    while dotted and dotted not in known:
        dotted = dotted.rpartition(".")[0]
    return dotted


def expected_targets(modules: Mapping[str, Module]) -> dict[str, Targets]:
    """Returns the targets that the modules ask for, by directory and name."""
    directories: dict[str, Targets] = {}
    for name, module in sorted(modules.items()):
        targets = directories.setdefault(module.directory, {})
        targets[_target_name(module)] = _target(name, modules)
    return directories


def _target(name: str, modules: Mapping[str, Module]) -> Target:
    module = modules[name]
    needed = set(module.modules)
    # Importing a module runs the __init__.py of its package. One that imports
    # needs its modules itself; Bazel puts an empty one in its place.
    package = name.rpartition(".")[0]
    if package in modules and not modules[package].modules:
        needed.add(package)
    attributes: dict[str, object] = {"srcs": [module.file]}
    if module.data:
        attributes["data"] = sorted(module.data)
    rule = "py_library"
    if module.file.endswith("_test.py"):
        rule = "py_test"
        needed.add(CONFTEST)
        runner_file = _label(RUNNER, modules, module.directory) + ".py"
        runner_file = runner_file.removeprefix(":")
        attributes["args"] = [f"{module.directory}/{module.file}"]
        attributes["main"] = runner_file
        attributes["srcs"] = sorted([module.file, runner_file])
        tags = _tags(name, modules)
        if tags:
            attributes["tags"] = tags
        attributes["size"] = "large" if "tensorflow" in tags else "medium"
    elif module.directory.startswith("tests"):
        attributes["testonly"] = True
    deps = [_label(each, modules, module.directory) for each in needed]
    if deps:
        attributes["deps"] = sorted(deps, key=_label_order)
    return Target(rule, attributes)


def _tags(name: str, modules: Mapping[str, Module]) -> list[str]:
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each in modules and each not in reached:
            reached.add(each)
            waiting.extend(modules[each].modules)
    packages = set().union(*(modules[each].packages for each in reached))
    tags = []
    if CHECKOUT in reached:
        tags.append("checkout")
    if packages & TENSORFLOW:
        tags.append("tensorflow")
    return tags


def _target_name(module: Module) -> str:
    if module.file == "__init__.py":
        return module.directory.rpartition("/")[2]
    return module.file.removesuffix(".py")


def _label(name: str, modules: Mapping[str, Module], directory: str) -> str:
    """Returns the label of a module, as a file in `directory` writes it."""
    if name not in modules:
        directory_of, _, target = name.replace(".", "/").rpartition("/")
    else:
        directory_of = modules[name].directory
        target = _target_name(modules[name])
    if directory_of == directory:
        return f":{target}"
    if directory_of.rpartition("/")[2] == target:
        return f"//{directory_of}"
    return f"//{directory_of}:{target}"


def _label_order(label: str) -> tuple[bool, str]:
    """Sorts as buildifier does: those of the same directory first."""
    return label.startswith("//"), label.replace(":", " ")


def parse(text: str) -> Targets:
    """Reads a BUILD file, whose syntax is a part of Python's.

    Args:
        text: the file's contents.

    Returns:
        The targets by name; load and package make none.

    Raises:
        ValueError: the file holds anything but calls with literal arguments.
    """
    targets: Targets = {}
    for statement in ast.parse(text).body:
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call) or not isinstance(
            call.func, ast.Name
        ):
            raise ValueError(f"line {statement.lineno} is not a rule")
        if call.func.id in ("load", "package"):
            continue
        attributes = {
            keyword.arg or "": ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
        name = attributes.pop("name", "")
        if name in targets:
            raise ValueError(f"line {statement.lineno} repeats {name}")
        targets[name] = Target(call.func.id, attributes)
    return targets


def render(targets: Targets) -> str:
    """Returns the text of the BUILD file of one directory."""
    rules = "".join(
        f', "{rule}"'
        for rule in sorted({each.rule for each in targets.values()})
    )
    lines = [
        "# By `python -m tests.build_files --write`. Packages from PyPI are no",
        "# deps: they come from the Python on PATH.",
        f'load("@py_rules//python:defs.bzl"{rules})',
        "",
        'package(default_visibility = ["//visibility:public"])',
    ]
    for name, target in sorted(targets.items()):
        lines += ["", f"{target.rule}(", f'    name = "{name}",']
        for attribute in sorted(target.attributes, key=_attribute_order):
            lines += _render_value(attribute, target.attributes[attribute])
        lines.append(")")
    return "\n".join(lines) + "\n"


def _attribute_order(attribute: str) -> tuple[int, str]:
    """Sorts as buildifier does: what it is, what it does, what it needs."""
    order = ("size", "testonly", "srcs", "args", "data", "main", "tags", "deps")
    return order.index(attribute), attribute


def _render_value(attribute: str, value: object) -> list[str]:
    if not isinstance(value, list):
        text = f'"{value}"' if isinstance(value, str) else str(value)
        return [f"    {attribute} = {text},"]
    if len(value) == 1:
        return [f'    {attribute} = ["{value[0]}"],']
    items = [f'        "{item}",' for item in value]
    return [f"    {attribute} = [", *items, "    ],"]


def differences(
    actual: Mapping[str, Targets], expected: Mapping[str, Targets]
) -> list[str]:
    """Compares what the BUILD files say with what the imports ask for.

    Args:
        actual: the targets by directory and name, as parsed.
        expected: the same, from the imports.

    Returns:
        A line for each attribute, target or file that differs.
    """
    lines = []
    for directory in sorted({*actual, *expected}):
        has = actual.get(directory, {})
        wants = expected.get(directory, {})
        for name in sorted({*has, *wants}):
            label = f"//{directory}:{name}"
            if name not in has:
                lines.append(f"{label} is missing")
            elif name not in wants:
                lines.append(f"{label} has no module")
            else:
                lines += _target_differences(label, has[name], wants[name])
    return lines


def _target_differences(label: str, has: Target, wants: Target) -> list[str]:
    lines = []
    if has.rule != wants.rule:
        lines.append(f"{label} is a {has.rule} and should be a {wants.rule}")
    for attribute in sorted({*has.attributes, *wants.attributes}):
        value = has.attributes.get(attribute)
        wanted = wants.attributes.get(attribute)
        if isinstance(value, list) and isinstance(wanted, list):
            value, wanted = sorted(value), sorted(wanted)
        if value != wanted:
            lines.append(f"{label} has {attribute} {value}, not {wanted}")
    return lines


def read_build_files(root: pathlib.Path) -> dict[str, Targets]:
    """Parses the BUILD files below `SOURCES`, by directory."""
    return {
        path.parent.relative_to(root).as_posix(): parse(
            path.read_text(encoding="utf-8")
        )
        for source in SOURCES
        for path in root.glob(f"{source}/**/BUILD")
    }


def main(arguments: list[str]) -> int:
    """Writes the files or prints the differences; returns the exit code."""
    expected = expected_targets(read_modules(ROOT))
    if arguments == ["--write"]:
        for directory, targets in expected.items():
            path = ROOT / directory / "BUILD"
            path.write_text(render(targets), encoding="utf-8")
        return 0
    lines = differences(read_build_files(ROOT), expected)
    print("\n".join(lines) or "The BUILD files are those of the imports.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
