"""What must start in an instant, or where TensorFlow is not installed."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import dtrain
import launch

ROOT = pathlib.Path(dtrain.__path__[0]).parent
FREE = (
    *("dtrain.storage", "dtrain.resilience", "dtrain.tensorfiles"),
    *("dtrain.cluster.environment", "dtrain.cluster.hostlist"),
    *("dtrain.cluster.rendezvous", "dtrain.config", "dtrain.flags"),
    *("dtrain.errors", "dtrain.checkpoint.listing"),
    *("dtrain.checkpoint.retention", "dtrain.main", "dtrain.sample"),
    *("dtrain.report", "dtrain.stop", "dtrain.store", "dtrain.evaluate"),
    "dtrain.gallery",
    *("dtrain.page", "dtrain.record.reading"),
    *("dtrain.check_data", "dtrain.checkpoint_tool", "launch"),
)
PROGRAM = """\
import importlib, sys

for name in ("tensorflow", "tensorflow_datasets", "keras"):
    # An import of it raises ImportError.
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def modules_of(name: str) -> list[str]:
    """Returns a module, or all modules of a package."""
    path = ROOT.joinpath(*name.split("."))
    if not path.is_dir():
        return [name]
    return [
        name,
        *(
            ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for file in sorted(path.rglob("*.py"))
            if file.name != "__init__.py"
        ),
    ]


def test_these_modules_import_no_tensorflow() -> None:
    names = [module for name in FREE for module in modules_of(name)]
    assert "launch.backends.slurm" in names
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr


def private_imports(path: pathlib.Path) -> list[str]:
    """Returns the imports of TensorFlow's private modules in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node).replace("tf.", "tensorflow.", 1)]
        found += [
            name for name in names if name.startswith("tensorflow.python")
        ]
    return found


def test_only_the_bundle_knows_the_inside_of_tensorflow() -> None:
    users = {
        path.relative_to(ROOT).parts[1]
        for package in (dtrain, launch)
        for path in pathlib.Path(package.__path__[0]).rglob("*.py")
        if private_imports(path)
    }
    assert users == {"bundle"}
