from __future__ import annotations

import copy
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from tests import build_files
from tests.build_files import Target, Targets

TREE = {
    "dtrain/__init__.py": "",
    "dtrain/errors.py": "import sys",
    "dtrain/losses.py": "import tensorflow as tf\nfrom dtrain import errors",
    "dtrain/main.py": "def main():\n    from dtrain.losses import mean",
    "dtrain/sources/__init__.py": "from dtrain.sources import idx",
    "dtrain/sources/idx.py": "",
    "dtrain/digits/make.py": "PATH = HERE / 'digits.npz'",
    "dtrain/digits/digits.npz": "",
    "dtrain/digits/README.md": "",
    "launch/job.py": "COMMAND = ['python', '-m', 'dtrain.main']",
    "tests/conftest.py": "import hypothesis",
    "tests/pytest_main.py": "import pytest",
    "tests/build_files.py": "",
    "tests/errors_test.py": "import dtrain.errors",
    "tests/main_test.py": "COMMAND = ['python', '-m', 'dtrain.main']",
    "tests/model_test.py": "MODEL = 'dtrain.losses:make'",
    "tests/program_test.py": "P = 'import sys\\nfrom dtrain import errors'",
    "tests/tree_test.py": "from tests import build_files",
    "tests/typed_test.py": (
        "if TYPE_CHECKING:\n    from dtrain import losses\n"
        "else:\n    from dtrain import errors\n"
    ),
}


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def expected(tree: pathlib.Path) -> dict[str, Targets]:
    return build_files.expected_targets(build_files.read_modules(tree))


def test_build_files_are_those_of_the_imports() -> None:
    actual = build_files.read_build_files(build_files.ROOT)
    wanted = expected(build_files.ROOT)
    assert wanted["dtrain"].keys() > {"flags", "errors"}
    lines = build_files.differences(actual, wanted)
    assert not lines, "run `make format`:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("directory", "name", "attribute", "value"),
    [
        ("dtrain", "dtrain", "srcs", ["__init__.py"]),
        ("dtrain", "errors", "deps", [":dtrain"]),
        ("dtrain", "losses", "deps", [":dtrain", ":errors"]),
        ("dtrain", "main", "deps", [":dtrain", ":losses"]),
        ("dtrain/sources", "sources", "deps", [":idx", "//dtrain"]),
        ("dtrain/sources", "idx", "deps", None),
        ("dtrain/digits", "make", "data", ["digits.npz"]),
        ("launch", "job", "deps", None),
        ("tests", "errors_test", "deps", [":conftest", "//dtrain:errors"]),
        ("tests", "errors_test", "srcs", ["errors_test.py", "pytest_main.py"]),
        ("tests", "errors_test", "args", ["tests/errors_test.py"]),
        ("tests", "errors_test", "tags", None),
        ("tests", "errors_test", "size", "medium"),
        ("tests", "main_test", "deps", [":conftest", "//dtrain:main"]),
        ("tests", "main_test", "tags", ["tensorflow"]),
        ("tests", "main_test", "size", "large"),
        ("tests", "model_test", "deps", [":conftest", "//dtrain:losses"]),
        ("tests", "program_test", "deps", [":conftest", "//dtrain:errors"]),
        ("tests", "tree_test", "tags", ["checkout"]),
        ("tests", "typed_test", "deps", [":conftest", "//dtrain:errors"]),
        ("tests", "conftest", "testonly", True),
    ],
)
def test_targets_follow_the_imports(
    tree: pathlib.Path,
    directory: str,
    name: str,
    attribute: str,
    value: object,
) -> None:
    target = expected(tree)[directory][name]
    assert target.attributes.get(attribute) == value


def test_each_file_has_one_target(tree: pathlib.Path) -> None:
    rules = [
        target.rule
        for targets in expected(tree).values()
        for target in targets.values()
    ]
    num_tests = sum(name.endswith("_test.py") for name in TREE)
    num_files = sum(name.endswith(".py") for name in TREE)
    assert rules.count("py_test") == num_tests
    assert rules.count("py_library") == num_files - num_tests


def test_a_rendered_file_is_read_back(tree: pathlib.Path) -> None:
    for targets in expected(tree).values():
        assert build_files.parse(build_files.render(targets)) == targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "line 1 is not a rule"),
        ("load('a', 'b')\n[f(n) for n in c]", "line 2 is not a rule"),
        ("f(name = 'a')\nf(name = 'a')", "line 2 repeats a"),
        ("f(name = 'a', srcs = glob(['*']))", "malformed"),
    ],
)
def test_what_is_no_list_of_rules_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_files.parse(text)


def test_writing_then_checking_finds_no_difference(
    tree: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_files, "ROOT", tree)
    assert build_files.main([]) == 1
    assert "//dtrain:losses is missing" in capsys.readouterr().out
    assert build_files.main(["--write"]) == 0
    assert build_files.main([]) == 0
    (tree / "dtrain/errors.py").write_text("from dtrain import losses")
    (tree / "tests/main_test.py").unlink()
    capsys.readouterr()
    assert build_files.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "//dtrain:errors has deps [':dtrain'], not [':dtrain', ':losses']",
        "//tests:errors_test has size medium, not large",
        "//tests:errors_test has tags None, not ['tensorflow']",
        "//tests:main_test has no module",
        "//tests:program_test has size medium, not large",
        "//tests:program_test has tags None, not ['tensorflow']",
        "//tests:typed_test has size medium, not large",
        "//tests:typed_test has tags None, not ['tensorflow']",
    ]


@hypothesis.given(data=st.data())
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_one_change_is_found(
    tree: pathlib.Path, data: st.DataObject
) -> None:
    wanted = expected(tree)
    actual = copy.deepcopy(wanted)
    targets = actual[data.draw(st.sampled_from(sorted(actual)))]
    name = data.draw(st.sampled_from(sorted(targets)))
    attributes = dict(targets[name].attributes)
    change = data.draw(
        st.sampled_from(["drop", "rename", "rule", "attribute", "extra_dep"])
    )
    if change == "drop":
        del targets[name]
    elif change == "rename":
        targets[f"{name}_2"] = targets.pop(name)
    elif change == "rule":
        targets[name] = Target("py_binary", attributes)
    elif change == "attribute":
        del attributes[data.draw(st.sampled_from(sorted(attributes)))]
        targets[name] = Target(targets[name].rule, attributes)
    else:
        deps = attributes.get("deps", [])
        assert isinstance(deps, list)
        attributes["deps"] = [*deps, "//dtrain:extra"]
        targets[name] = Target(targets[name].rule, attributes)
    text = {
        directory: build_files.parse(build_files.render(each))
        for directory, each in actual.items()
    }
    assert build_files.differences(text, wanted)
    assert not build_files.differences(wanted, wanted)
