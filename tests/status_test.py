"""What a worker tells its supervisor arrives whole, or not at all."""

from __future__ import annotations

import math
import pathlib
import threading

import pytest

from dtrain.resilience import status


def test_what_is_written_is_read(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "status.json")
    told = status.Status(7, 120, 100, 60.0, "SIGTERM", is_over=True)
    status.write(path, told)
    assert status.read(path) == told
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_limit_may_be_without_end(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "status.json")
    status.write(path, status.Status(7))
    read = status.read(path)
    assert read is not None
    assert read.limit_secs == math.inf


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"pid": 1, "nonsense": 2}',
        '{"pid": "1"}',
        '{"pid": true}',
        "[" * 100_000,
        '{"pid": 1, "saved_step": null}',
        "\udcff",
    ],
)
def test_what_cannot_be_understood_is_none(
    tmp_path: pathlib.Path, text: str
) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert status.read(str(path)) is None


def test_no_file_is_none(tmp_path: pathlib.Path) -> None:
    assert status.read(str(tmp_path / "status.json")) is None


def test_a_reader_finds_no_half(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "status.json")
    status.write(path, status.Status(0))

    def write() -> None:
        for step in range(2000):
            status.write(path, status.Status(1, step, notice="x" * step))

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert status.read(path) is not None
    writer.join()
