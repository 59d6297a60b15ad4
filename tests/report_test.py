"""The report on real runs, whole and killed, and on what is none."""

from __future__ import annotations

import io
import pathlib
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from dtrain import errors, report
from dtrain.record import goodput
from tests import runs
from tests.ledger_test import make

FLAGS = (
    *runs.SMALL,
    "--num_steps=100000000",
    "--checkpoint_every_steps=4000",
    "--steps_per_loop=10",
)


def train_until(run_dir: pathlib.Path, *, told: bool) -> float:
    """Trains until some steps are on record; returns when the process ended.

    The end is a kill, or a SIGTERM if it is to be told.
    """
    ledgers = run_dir / "ledger"
    before = len(list(ledgers.glob("*.json")))
    process = runs.start("dtrain.main", f"--run_dir={run_dir}", *FLAGS)
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, runs.finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if len(list(ledgers.glob("*.json"))) > before:
            attempt = sorted_attempts(run_dir)[-1]
            # Well behind a save and well before the next, so that what is on
            # record is done again.
            if 1000 < attempt.points[-1].step % 4000 < 3500:
                break
    if told:
        process.terminate()
    else:
        process.kill()
    code, output = runs.finish(process)
    assert code == (errors.RUN_AGAIN if told else -9), output
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def sorted_attempts(run_dir: pathlib.Path) -> list[goodput.Attempt]:
    attempts = report.read(str(run_dir))
    return sorted(attempts, key=lambda each: each.boot_started)


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pathlib.Path, float]:
    """A run that was killed twice, then told to stop; and its wall time."""
    run_dir = tmp_path_factory.mktemp("report") / "killed-twice"
    # The fork server's own start is none of the run's.
    runs.is_forked("dtrain.main", runs.environment())
    begun = time.clock_gettime(time.CLOCK_BOOTTIME)
    train_until(run_dir, told=False)
    train_until(run_dir, told=False)
    ended = train_until(run_dir, told=True)
    return run_dir, ended - begun


def test_the_kinds_add_up_to_the_wall_time(
    killed: tuple[pathlib.Path, float],
) -> None:
    run_dir, wall_secs = killed
    account = goodput.account(report.read(str(run_dir)))
    assert len(account.placed) == 3
    total = sum(account.seconds.values())
    assert total == pytest.approx(wall_secs, rel=0.01)
    assert account.wall_secs == pytest.approx(total, abs=1e-3)
    for kind in ("useful", "redone", "start", "compile", "save", "idle"):
        assert account.seconds[kind] > 0, kind
    assert account.num_redone > 0
    ends = [each.attempt.exit_code for each in account.placed]
    assert ends == [None, None, errors.RUN_AGAIN]
    # What is done for good is what metrics.jsonl has a line of.
    assert account.num_steps == len(runs.metrics(run_dir))


def test_the_report_says_it_and_draws_it(
    killed: tuple[pathlib.Path, float], tmp_path: pathlib.Path
) -> None:
    run_dir, _ = killed
    # The wrong end of a write must not spoil the rest.
    (run_dir / "ledger" / "20000101T000000Z-1.json").write_text("{")
    output = tmp_path / "picture.png"
    code, printed = runs.run(
        "dtrain.report", f"--run_dir={run_dir}", f"--output={output}"
    )
    assert code == errors.FINISHED, printed
    assert "20000101T000000Z-1.json is left out: " in printed
    assert (
        "attempts  3: 2 no end written (killed, or still running), "
        "1 saved and stopped (75): SIGTERM" in printed
    )
    shares = re.findall(r"^.+ \d+:\d\d:\d\d +([\d.]+)%$", printed, re.MULTILINE)
    *parts, whole = map(float, shares)
    assert (len(parts), whole) == (10, 100)
    assert sum(parts) == pytest.approx(100, abs=0.5)
    assert re.search(r"^goodput +[\d.]+%$", printed, re.MULTILINE)
    with Image.open(io.BytesIO(output.read_bytes())) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def write(run_dir: pathlib.Path, *attempts: goodput.Attempt) -> None:
    (run_dir / "ledger").mkdir(parents=True)
    for number, attempt in enumerate(attempts):
        path = run_dir / "ledger" / f"20260101T000000Z-{number}.json"
        path.write_bytes(goodput.dumps(attempt))


def test_a_run_of_a_hundred_attempts_and_one_of_none_are_drawn(
    tmp_path: pathlib.Path,
) -> None:
    step = 0
    attempts = []
    for number in range(100):
        points = [(30.0, step, 0.0), (40.0, step + 1, 0.0)]
        points += [
            (40.0 + each, step + 10 * each, each) for each in range(1, 600, 30)
        ]
        seconds = {"start": 30, "compile": 10, "train": points[-1][2]}
        attempts.append(make(700.0 * number, seconds, points))
        step += 5000
    write(tmp_path / "many", *attempts)
    (tmp_path / "many" / "metrics.jsonl").write_text(
        "".join(
            f'{{"step": {each}, "generator_loss": {1000 / each}}}\n'
            for each in range(1, step, 50)
        )
        + '{"step": 1e999, "generator_loss": 1}\n{"step": [9]}\n[[9\n'
        + f'{{"step": 9, "generator_loss": {10**400}}}\n{"[" * 100_000}\n'
        + '{"step": 9, "gener'
    )
    # Killed while it compiled, before there was a loss.
    write(tmp_path / "none", make(0, {"start": 9}, [(9, 0, 0)]))
    for name in ("many", "none"):
        run_dir = str(tmp_path / name)
        assert report.run(["report", f"--run_dir={run_dir}"]) == 0
        with Image.open(f"{run_dir}/report.png") as picture:
            assert picture.size == (1440, 840)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "run_dir is missing"),
        (["--run_dir=DIR/nothing"], "holds no run"),
        (["--run_dir=DIR/old"], "holds no ledger that can be read"),
        (["--run_dir=DIR/damaged"], "holds no ledger that can be read"),
        (["--run_dir=DIR/future"], "schema 3, and 2 is known"),
        (["--run_dir=DIR/sound", "--picture=x"], "picture"),
        (["--run_dir=DIR/sound", "more"], "more"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str],
    words: str,
    tmp_path: pathlib.Path,
) -> None:
    sound = make(0, {"train": 9}, [(0, 0, 0), (9, 9, 9)])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    for name in ("damaged", "future", "sound"):
        write(tmp_path / name, sound)
    [path] = (tmp_path / "damaged" / "ledger").iterdir()
    path.write_bytes(path.read_bytes()[:99])
    [path] = (tmp_path / "future" / "ledger").iterdir()
    path.write_bytes(path.read_bytes().replace(b'schema":2', b'schema":3'))
    with pytest.raises(errors.UserError, match=words) as caught:
        report.run(
            ["report", *(flag.replace("DIR", str(tmp_path)) for flag in flags)]
        )
    assert "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_written_is_one_line(
    tmp_path: pathlib.Path,
) -> None:
    write(tmp_path / "run", make(0, {"train": 9}, [(0, 0, 0), (9, 9, 9)]))
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "picture.png"
    code, printed = runs.run(
        "dtrain.report", f"--run_dir={tmp_path}/run", f"--output={output}"
    )
    assert code == errors.USER_ERROR
    last = printed.splitlines()[-1]
    assert last == (
        f"error: output ({tmp_path}/file) cannot be made: {tmp_path}/file is "
        "no directory; name another one"
    )


def test_a_report_of_a_disk_needs_no_tensorflow(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "run", make(0, {"train": 9}, [(0, 0, 0), (9, 9, 9)]))
    program = (
        "import sys; from dtrain import report; "
        f"report.run(['report', {f'--run_dir={tmp_path}/run'!r}]); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=runs.ROOT,
        env=runs.environment(),
        check=True,
    )


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.run(["report", "--help"]) == errors.FINISHED
    assert "--output=FILE" in capsys.readouterr().out
