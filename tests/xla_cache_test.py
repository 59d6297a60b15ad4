"""What XLA has compiled is kept from start to start, and trusted if sound."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterator

import pytest

from dtrain import config as config_lib
from dtrain import errors
from dtrain.bundle import tensors
from dtrain.cluster import xla_cache
from dtrain.errors import UserError
from tests import disk_test, runs

STRATEGIES = {
    "default": ("dtrain.main",),
    "multi_worker": ("launch.main", "--num_workers=2", "--"),
}


def train(
    run_dir: pathlib.Path,
    cache: pathlib.Path,
    num_steps: int = 2,
    told: tuple[str, ...] = STRATEGIES["default"],
) -> tuple[int, str]:
    process = runs.start_anew(
        *told,
        *runs.SMALL,
        *("--jit_compile=on", f"--num_steps={num_steps}"),
        *(f"--run_dir={run_dir}", f"--xla_cache_dir={cache}"),
    )
    return runs.finish(process)


def entries(cache: pathlib.Path) -> dict[pathlib.Path, int]:
    """What is kept, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*/*.pb")}


def notes(cache: pathlib.Path) -> pathlib.Path:
    [path] = cache.glob("*/*/sound.json")
    return path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_comes_back_compiles_nothing(
    strategy: str, tmp_path: pathlib.Path
) -> None:
    """And ends with the same bits; what is cut short is compiled again."""
    # In a variable of TensorFlow's own.
    cache, told = tmp_path / 'it\'s "kept" here', STRATEGIES[strategy]
    code, output = train(tmp_path / "run", cache, 2, told)
    assert code == errors.FINISHED, output
    compiled = entries(cache)
    # One for each phase, of each worker.
    assert len(compiled) == (4 if strategy == "multi_worker" else 2)
    code, output = train(tmp_path / "run", cache, 4, told)
    assert code == errors.FINISHED, output
    assert "resumed from" in output
    assert entries(cache) == compiled

    cut, *others = compiled
    os.truncate(cut, cut.stat().st_size // 2)
    code, output = train(tmp_path / "whole", cache, 4, told)
    assert code == errors.FINISHED, output
    again = entries(cache)
    assert again.keys() == compiled.keys()
    assert again[cut] != compiled[cut]
    assert all(again[other] == compiled[other] for other in others)
    digests = {
        tensors.digest(f"{tmp_path / name}/checkpoints/ckpt-4")
        for name in ("run", "whole")
    }
    assert len(digests) == 1


def config_of(cache: str | pathlib.Path, *more: str) -> config_lib.Config:
    return config_lib.parse(["main", f"--xla_cache_dir={cache}", *more])


@pytest.fixture(autouse=True)
def _flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", "")


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    """A place that a process has used, with three entries since."""
    with xla_cache.used(config_of(tmp_path)):
        pass
    place = notes(tmp_path).parent
    for name in ("a.pb", "b.pb", "c.pbhost-1-2.tmp"):
        (place / name).write_bytes(name.encode())
    return place


def names(place: pathlib.Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"sound.json"}


def use(place: pathlib.Path) -> set[str]:
    """Names what is left for a process."""
    with xla_cache.used(config_of(place.parent.parent)):
        return names(place)


def crash(place: pathlib.Path) -> None:
    """Has the machine boot again, as the notes see it."""
    noted = json.loads((place / "sound.json").read_text())
    (place / "sound.json").write_text(json.dumps({**noted, "boot": "before"}))


def test_a_killed_process_leaves_whole_entries(place: pathlib.Path) -> None:
    assert use(place) == {"a.pb", "b.pb"}


def test_a_crashed_machine_may_not(place: pathlib.Path) -> None:
    crash(place)
    assert use(place) == set()


def test_what_is_noted_outlives_a_crash(place: pathlib.Path) -> None:
    use(place)
    (place / "d.pb").write_bytes(b"since then")
    crash(place)
    assert use(place) == {"a.pb", "b.pb"}


def test_what_has_changed_is_removed(place: pathlib.Path) -> None:
    use(place)
    (place / "a.pb").write_bytes(b"")
    assert use(place) == {"b.pb"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', "null"])
def test_damaged_notes_vouch_for_nothing(
    place: pathlib.Path, text: str
) -> None:
    (place / "sound.json").write_text(text)
    assert use(place) == set()


def test_two_processes_of_a_machine_have_a_place_each(
    tmp_path: pathlib.Path,
) -> None:
    told = []
    for _ in range(2):
        with (
            xla_cache.used(config_of(tmp_path)),
            pytest.MonkeyPatch.context() as other,
        ):
            told.append(os.environ["TF_XLA_FLAGS"])
            other.setenv("TF_XLA_FLAGS", "")
            with xla_cache.used(config_of(tmp_path)):
                told.append(os.environ["TF_XLA_FLAGS"])
    [found] = {path.parent for path in tmp_path.glob("*/0")}
    assert [re.findall('="(.*)"', text) for text in told] == [
        [str(found / "0")],
        [str(found / "1")],
    ] * 2


def test_other_settings_of_xla_have_other_places(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in ("", "--xla_cpu_enable_fast_math=true"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        with xla_cache.used(config_of(tmp_path)):
            pass
    with xla_cache.used(config_of(tmp_path, "--nodeterministic")):
        pass
    assert len(list(tmp_path.iterdir())) == 3


def test_a_dry_run_keeps_nothing(tmp_path: pathlib.Path) -> None:
    with xla_cache.used(config_of(tmp_path / "none", "--dry_run")):
        assert not os.environ["TF_XLA_FLAGS"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "cache", "words"),
    [
        ("", "gs://bucket/kept", "name a local directory"),
        ("--tf_xla_persistent_cache_directory=/x", "/kept", "leave out one"),
        ("/a/file/of/flags", "/kept", "leave out one"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    given: str, cache: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", given)
    with (
        pytest.raises(UserError, match=rf"^xla_cache_dir \({cache}\).*{words}"),
        xla_cache.used(config_of(cache)),
    ):
        pass


def test_without_xla_nothing_is_kept() -> None:
    with pytest.raises(UserError, match="keeps nothing with"):
        config_of("kept", "--jit_compile=off")


def test_no_directory_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    code, output = train(tmp_path / "run", tmp_path / "file" / "kept")
    assert code == errors.STORAGE_FAILED
    assert output.splitlines() == [
        f"error: xla_cache_dir ({tmp_path}/file/kept): {tmp_path}/file is no "
        "directory"
    ]
    assert not (tmp_path / "run").exists()


def test_another_error_is_none_of_its() -> None:
    config = config_of("xla")
    assert not xla_cache.fault(config, "xla/gpu.cc; Out of memory while xla; x")
    assert not xla_cache.fault(config_of(""), "/0123456789abcdef/0/x; y")


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    with disk_test.mounted(tmp_path / "disk", "32k") as disk:
        yield disk.path


def test_a_full_disk_is_one_line(
    tmp_path: pathlib.Path, small_disk: pathlib.Path
) -> None:
    """TensorFlow says of it that a resource is exhausted, as of memory."""
    code, output = train(tmp_path / "run", small_disk)
    assert code == errors.STORAGE_FAILED
    assert output.splitlines()[-1] == (
        f"error: xla_cache_dir ({small_disk}): No space left on device; make "
        "room, or leave it out"
    )
