"""No file from outside is a crash, a hang or a lot of memory."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re

import h5py
import pytest

from dtrain import errors
from dtrain.tensorfiles import containers
from tests import hostile_files, runs

NUM_FUZZ = int(os.environ.get("DTRAIN_NUM_FUZZ", "150"))


def read(path: pathlib.Path) -> None:
    with containers.open_file(str(path)) as file:
        for name in file.entries:
            file.read(name)


def refusal(path: pathlib.Path) -> str:
    """Returns what is said to the user of what is refused."""
    with pytest.raises(errors.UserError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("kind", hostile_files.LIES)
def test_lies_and_damage_in_little_memory(kind: str) -> None:
    # The memory of threads that do nothing counts, too.
    process = runs.start(
        "tests.hostile_files",
        *(kind, str(NUM_FUZZ), "0"),
        OPENBLAS_NUM_THREADS="1",
    )
    # HDF5 reads each in a process of its own.
    code, output = runs.finish(process, timeout=300 + NUM_FUZZ // 5)
    assert code == 0, output
    outcome = json.loads(output)
    print(
        f"{kind}: {outcome['read']} read, {outcome['refused']} refused, "
        f"{outcome['secs']} s, {outcome['peak_mib']} MiB"
    )
    assert outcome["read"] + outcome["refused"] == NUM_FUZZ
    # Or what is changed is nothing that matters, or everything.
    assert outcome["read"] >= NUM_FUZZ / 50
    assert outcome["refused"] >= NUM_FUZZ / 50
    for case, (why, _) in hostile_files.LIES[kind].items():
        said = outcome["lies"][case]
        assert re.search(why, said), f"{case}: {said!r}"


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("safetensors", "a length of 2^63"),
        ("safetensors", "a bool of 2"),
        ("npz", "10 TB in little"),
        ("npz", "another checksum"),
        *(
            ("h5", case)
            for case, (why, _) in hostile_files.H5.items()
            if why != "^$"
        ),
    ],
)
def test_the_user_reads_one_line(
    tmp_path: pathlib.Path, kind: str, case: str
) -> None:
    why, make = hostile_files.LIES[kind][case]
    path = tmp_path / f"x.{kind}"
    path.write_bytes(make())
    said = refusal(path)
    assert re.search(why, said)
    assert "; " in said


def test_hdf5_reads_in_a_process_of_its_own(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(hostile_files.sound("h5"))
    with containers.open_file(str(path)) as file:
        assert len(file.entries) == 6
    said = []
    for data in itertools.islice(hostile_files.mutations("h5", 12, 5), 12):
        path.write_bytes(data)
        try:
            read(path)
        except errors.UserError as error:
            said.append(str(error))
    assert 0 < len(said) < 12
    assert not any("\n" in line for line in said)


def test_hdf5_in_a_circle(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("a/b")
        group["circle"] = file["a"]
        group["soft"] = h5py.SoftLink("/a/b")
        group["c"] = 1.5
        group["again"] = group["c"]
    with containers.open_file(str(path)) as file:
        [name] = file.entries
        assert file.read(name) == 1.5
    with h5py.File(path, "a") as file:
        file["a/b/outside"] = h5py.ExternalLink("/etc/passwd", "/")
    # What is in another file is not left out without a word.
    assert "'a/b/outside' is in another file, '/etc/passwd'" in refusal(path)


def test_what_is_no_file(tmp_path: pathlib.Path) -> None:
    for suffix in ("safetensors", "npz", "h5"):
        path = tmp_path / f"x.{suffix}"
        assert "is not there" in refusal(path)
        path.mkdir()
        assert "is no file" in refusal(path)
        path.rmdir()
        # Nobody writes into it.
        os.mkfifo(path)
        assert "is no file" in refusal(path)
        path.unlink()
    assert "must end in one of" in refusal(tmp_path / "x.pt")
