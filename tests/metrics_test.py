"""Every step is recorded once, and a person sees one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import pathlib
import re
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.record import hparams, metrics
from dtrain.record.progress import Progress
from dtrain.storage import files
from tests import object_store, runs

NAMES = ("generator_loss", "discriminator_loss")


def rows(first_step: int, num_steps: int) -> dict[str, np.ndarray]:
    """Metrics that are a function of the step, as those of a run are."""
    steps = np.arange(first_step, first_step + num_steps, dtype=np.float32)
    return dict(zip(NAMES, (np.sin(steps), np.cos(steps)), strict=True))


def record(run_dir: pathlib.Path, done: int, ends: list[int]) -> None:
    """Records the steps after `done` in loops that end at `ends`."""
    recorder = metrics.RunRecorder(str(run_dir), done)
    for end in ends:
        recorder.write(done + 1, rows(done + 1, end - done))
        done = end
    recorder.close()


def read_lines(run_dir: pathlib.Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [
        json.loads(line, parse_constant=refuse) for line in text.splitlines()
    ]


def read_events(run_dir: pathlib.Path) -> list:
    """Returns the events of all files, in the order they were opened."""
    return [
        event
        for path in sorted((run_dir / "events").iterdir())
        for event in tf.compat.v1.train.summary_iterator(str(path))
    ]


@settings(max_examples=25)
@given(st.data())
def test_a_file_of_a_killed_run_ends_as_one_of_a_whole_run(
    data: st.DataObject,
) -> None:
    num_steps = data.draw(st.integers(2, 12))
    killed = data.draw(st.integers(1, num_steps))
    saved = data.draw(st.integers(0, killed))
    torn = data.draw(st.integers(0, 20))
    ends = (
        data.draw(st.sets(st.integers(1, killed - 1))) if killed > 1 else set()
    )
    with tempfile.TemporaryDirectory() as directory:
        whole, cut = (
            pathlib.Path(directory, "whole"),
            pathlib.Path(directory, "cut"),
        )
        for run_dir in (whole, cut):
            run_dir.mkdir()
        record(whole, 0, [num_steps])
        record(cut, 0, [*sorted(ends), killed])
        with open(cut / "metrics.jsonl", "a") as file:
            file.write('{"step": 13, "generator_loss": 0.5}'[:torn])
        record(cut, saved, [num_steps] if saved < num_steps else [])
        expected = (whole / "metrics.jsonl").read_bytes()
        assert (cut / "metrics.jsonl").read_bytes() == expected
        steps = [line["step"] for line in read_lines(cut)]
        assert steps == list(range(1, num_steps + 1))


def test_line_that_lost_its_end_is_written_again(
    tmp_path: pathlib.Path,
) -> None:
    record(tmp_path, 0, [3])
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    record(tmp_path, 2, [3])
    assert path.read_bytes() == content


def test_what_is_no_number_becomes_null(tmp_path: pathlib.Path) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    values = np.array([[np.nan, np.inf], [-np.inf, 0.1]], np.float32)
    recorder.write(1, dict(zip(NAMES, values.T, strict=True)))
    recorder.close()
    first, second = read_lines(tmp_path)
    assert first == {"step": 1, NAMES[0]: None, NAMES[1]: None}
    assert second[NAMES[0]] is None
    # The float32, to its last bit.
    assert np.float32(second[NAMES[1]]) == np.float32(0.1)


def test_lines_can_be_read_before_the_end(tmp_path: pathlib.Path) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    recorder.write(1, rows(1, 3))
    assert len(read_lines(tmp_path)) == 3
    assert read_events(tmp_path)[-1].step == 3
    recorder.close()
    recorder.close()


def test_events_begin_again_at_the_step_of_a_resume(
    tmp_path: pathlib.Path,
) -> None:
    record(tmp_path, 0, [2, 4])
    record(tmp_path, 2, [5])
    events = read_events(tmp_path)
    starts = [
        event.step
        for event in events
        if event.session_log.status == tf.compat.v1.SessionLog.START
    ]
    # TensorBoard drops what it has of this step and of all after it.
    assert starts == [1, 3]
    versions = [event.file_version for event in events if event.file_version]
    assert versions == ["brain.Event:2"] * 2
    values = {
        event.step: {
            value.tag: value.simple_value for value in event.summary.value
        }
        for event in events
        if event.summary.value
    }
    assert sorted(values) == [2, 4, 5]
    expected = {
        f"losses/{name}": float(column[0])
        for name, column in rows(5, 1).items()
    }
    assert values[5] == expected


def test_figures_stand_in_the_line_of_their_step(
    tmp_path: pathlib.Path,
) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    recorder.write(1, rows(1, 3), {"distance": 0.1})
    assert recorder.last["distance"] == pytest.approx(0.1)
    recorder.write(4, rows(4, 1))
    assert "distance" not in recorder.last, "it is of another step"
    recorder.close()
    lines = read_lines(tmp_path)
    assert ["distance" in line for line in lines] == [False, False, True, False]
    events = read_events(tmp_path)
    tags = {value.tag for event in events for value in event.summary.value}
    assert tags == {*(f"losses/{name}" for name in NAMES), "figures/distance"}


# Of what TensorBoard 2.21.0 itself encodes of these settings.
HPARAMS = "5dabf7c8a51cfd28cc6d9b1eed838a8c85b2a4e74c956eec13208f641c6ca9b7"


def test_settings_are_what_tensorboard_encodes(tmp_path: pathlib.Path) -> None:
    settings = {"long": "x" * 200, "loss": "hinge", "mirror": True}
    settings |= {"model_flag": ["a=1", "b=2"], "r1_gamma": 0.5, "seed": 7}
    summary = hparams.summary(settings, 1e9)
    [value] = summary.value
    assert value.tag == "_hparams_/session_start_info"
    assert value.metadata.plugin_data.plugin_name == "hparams"
    content = value.metadata.plugin_data.content
    assert hashlib.sha256(content).hexdigest() == HPARAMS
    recorder = metrics.RunRecorder(str(tmp_path), 0, settings=settings)
    recorder.write(1, rows(1, 1), images_per_sec=8.5)
    recorder.close()
    values = [v for each in read_events(tmp_path) for v in each.summary.value]
    # But for the time.
    assert values[0].metadata.plugin_data.content[:-8] == content[:-8]
    speeds = {v.tag: v.simple_value for v in values if "speed" in v.tag}
    assert speeds == {"speed/images_per_sec": 8.5}
    # It is another one each time, and the file the same.
    assert "images_per_sec" not in read_lines(tmp_path)[0]


def test_picture_in_the_events(tmp_path: pathlib.Path) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    recorder.write_image(7, "samples", b"bytes of a PNG")
    recorder.close()
    event = read_events(tmp_path)[-1]
    assert event.step == 7
    [value] = event.summary.value
    assert value.tag == "samples"
    assert value.image.encoded_image_string == b"bytes of a PNG"


def test_other_workers_write_nothing(tmp_path: pathlib.Path) -> None:
    recorder = metrics.Recorder()
    recorder.write(1, rows(1, 3))
    recorder.write_image(3, "samples", b"")
    recorder.flush()
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_knows_of_the_lines(tmp_path: pathlib.Path) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    states = {0: recorder.state_of(0)}
    for step in range(1, 7):
        recorder.write(step, rows(step, 1))
        states[step] = recorder.state_of(step)
    recorder.sync()
    recorder.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert states[6] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    for step in (6, 3, 0):
        again = metrics.RunRecorder(str(tmp_path), step, states[step])
        assert again.notice == ""
        assert again.state_of(step) == states[step]
        again.close()
        assert len(read_lines(tmp_path)) == step
    assert not (tmp_path / "quarantine").exists()


def test_damaged_lines_are_put_aside(tmp_path: pathlib.Path) -> None:
    recorder = metrics.RunRecorder(str(tmp_path), 0)
    recorder.write(1, rows(1, 5))
    expected = recorder.state_of(5)
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'"step": 2', b'"step" 2')
    path.write_bytes(damaged)
    again = metrics.RunRecorder(str(tmp_path), 5, expected)
    assert again.notice == (
        f"{path} is not what it was at step 5: it was moved to "
        f"{tmp_path}/quarantine/metrics.jsonl; 4 of its lines are kept"
    )
    again.write(6, rows(6, 1))
    known = again.state_of(6)
    again.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3, 4, 5, 6]
    assert (tmp_path / "quarantine/metrics.jsonl").read_bytes() == damaged
    path.unlink()
    last = metrics.RunRecorder(str(tmp_path), 6, known)
    assert last.notice.endswith("it is gone; 0 of its lines are kept")
    last.close()


def test_a_disk_that_fails_stops_nobody(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        del arguments
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = metrics.RunRecorder(str(tmp_path), 0)
    recorder.write(1, rows(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", fail)
        patch.setattr(tf.io, "TFRecordWriter", fail)
        recorder._events._abandon()
        recorder.write(2, rows(2, 2))
        recorder.write_image(3, "samples", b"PNG")
        recorder.flush()
        assert "wait in memory: No space left" in recorder.failure()
        assert recorder.failure() == "", "said once"
        for durable in (recorder.sync, recorder.publish):
            with pytest.raises(OSError, match="No space left"):
                durable()
    recorder.write(4, rows(4, 1))
    assert recorder.failure() == ""
    recorder.sync()
    recorder.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    steps = {event.step for event in read_events(tmp_path) if event.summary}
    assert steps >= {1, 4}


# Of a run on an object store.


def record_remotely(run_dir: str, step: int, last: int, how: str) -> dict:
    """Records the steps after `step`; returns what was said and seen."""
    recorder = metrics.RunRecorder(run_dir, step)
    for each in range(step + 1, last + 1):
        recorder.write(each, rows(each, 1))
    recorder.write_image(last, "samples", b"bytes of a PNG")
    recorder.flush()
    if how != "killed":
        getattr(recorder, how)()
    return recorder.state_of(last) if how != "close" else {}


def resume_remotely(run_dir: str, step: int, expected: dict) -> str:
    recorder = metrics.RunRecorder(run_dir, step, expected)
    recorder.close()
    return recorder.notice


def list_events(run_dir: str) -> list[int]:
    return [
        event.step
        for path in sorted(tf.io.gfile.glob(f"{run_dir}/events/*"))
        for event in tf.compat.v1.train.summary_iterator(path)
    ]


def test_a_run_on_an_object_store(tmp_path: pathlib.Path) -> None:
    run_dir = "gs://bucket/run"

    with object_store.ObjectStore() as store:
        environment = runs.environment(
            **store.environment(), TMPDIR=str(tmp_path)
        )

        def held_steps() -> list[int]:
            text = store.read("run/metrics.jsonl").decode()
            return [json.loads(line)["step"] for line in text.splitlines()]

        with object_store.Client(environment) as client:
            client.call(record_remotely, run_dir, 0, 3, "publish")
            assert held_steps() == [1, 2, 3]
            # The start, the three steps and the picture.
            assert client.call(list_events, run_dir) == [0, 1, 1, 2, 3, 3]
            num_requests = len(store.requests)
            known = client.call(record_remotely, run_dir, 2, 40, "killed")
            # Looking for what was there, and not a request for each line.
            assert len(store.requests) < num_requests + 10
        assert held_steps() == [1, 2, 3]
        with object_store.Client(environment) as client:
            # What the killed one had written is on this host.
            assert client.call(resume_remotely, run_dir, 40, known) == ""
            assert held_steps() == list(range(1, 41))
            assert not list(tmp_path.glob("dtrain-*"))
            damaged = store.read("run/metrics.jsonl")[10:]
            store.write("run/metrics.jsonl", damaged)
            notice = client.call(resume_remotely, run_dir, 40, known)
            assert f"moved to {run_dir}/quarantine/metrics.jsonl" in notice
            assert held_steps() == list(range(2, 41))
            assert store.read("run/quarantine/metrics.jsonl") == damaged


# The progress line.


class Terminal(io.StringIO):
    """A terminal that keeps all that was written to it."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.secs = 1000.0

    def __call__(self) -> float:
        return self.secs


def follow(
    stream: io.StringIO, num_updates: int, secs: float, **more: object
) -> None:
    """Trains 1000 steps of 64 images in steps of 10, `secs` for each ten."""
    clock = Clock()
    progress = Progress(1000, 64, stream=stream, clock=clock, **more)
    for number in range(num_updates):
        clock.secs += secs
        progress.update(
            10 * (number + 1), {"generator_loss": np.array([0.5, 0.125])}
        )
    progress.say("saved")


def test_a_terminal_shows_one_line_that_rewrites_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    terminal = Terminal()
    follow(terminal, 20, secs=1.0)
    shown, said = terminal.getvalue().split("\n", 1)
    assert said == "saved\n"
    before, *lines = shown.split("\r")
    assert before == ""
    assert len(lines) == 20
    # Each covers the one before it, and the cursor stays on the line.
    assert all(line.endswith("\x1b[K") for line in lines)
    assert lines[-1].removesuffix("\x1b[K") == (
        "step 200/1,000  640 images/s  0:01:20 left  G loss 0.125"
    )
    assert "images/s" not in lines[0], "compiling is no training"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_line_is_never_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    follow(terminal, 5, secs=1.0)
    lines = re.split("[\r\n]", terminal.getvalue().replace("\x1b[K", ""))
    assert 0 < max(map(len, lines)) <= columns - 1


def test_a_file_gets_a_line_every_ten_seconds() -> None:
    stream = io.StringIO()
    follow(stream, 25, secs=1.0)
    assert "\r" not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    steps = [int(line.split("/")[0].split()[1]) for line in lines[:-1]]
    assert steps == [100, 200]
    assert lines[-1] == "saved"


def test_a_terminal_is_written_to_five_times_a_second() -> None:
    terminal = Terminal()
    follow(terminal, 100, secs=0.05)
    assert terminal.getvalue().count("\r") in range(20, 27)


@pytest.mark.parametrize(
    ("secs", "left"),
    [(0.1, "0:00:05"), (10.0, "0:08:20"), (3600.0, "50:00:00")],
)
def test_time_left(secs: float, left: str) -> None:
    terminal = Terminal()
    follow(terminal, 50, secs=secs)
    assert f"  {left} left" in terminal.getvalue().split("\r")[-1]


def test_time_left_follows_a_machine_that_slows_down() -> None:
    clock, terminal = Clock(), Terminal()
    progress = Progress(1000, 64, stream=terminal, clock=clock)
    for number in range(1, 41):
        clock.secs += 1.0 if number <= 20 else 4.0
        progress.update(10 * number, {})
    line = terminal.getvalue().split("\r")[-1]
    minutes, seconds = re.search(r"0:(\d\d):(\d\d) left", line).groups()
    # 600 steps are left, of which ten take 4 s; at first they took 1 s.
    assert 230 <= int(minutes) * 60 + int(seconds) <= 245


def test_an_update_without_time_is_no_error() -> None:
    terminal = Terminal()
    follow(terminal, 3, secs=0.0)
    assert terminal.getvalue() == "saved\n"


def test_only_the_chief_is_heard() -> None:
    stream = io.StringIO()
    follow(stream, 25, secs=1.0, is_chief=False)
    assert stream.getvalue() == ""
