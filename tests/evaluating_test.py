"""A run that measures itself: what is written, kept, and gone on with."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest

from dtrain import errors, evaluate, report
from dtrain import main as dtrain_main
from dtrain.bundle import tensors
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.quality import figure_log
from dtrain.record import metrics
from dtrain.run import best
from launch.keep import worker as worker_lib
from tests import runs
from tests.metrics_test import read_lines, rows

SETTINGS = (
    *runs.SMALL,
    "--num_steps=8",
    "--checkpoint_every_steps=4",
    "--max_rollbacks=0",
)
EVALUATION = (
    "--evaluate_every_steps=4",
    "--evaluate_num_images=48",
    "--evaluate_extractor=pixels",
)
# Two lines of metrics before the first figures, and a while with the latter.
SLOW = (
    *runs.SMALL,
    "--num_steps=6",
    "--checkpoint_every_steps=3",
    "--max_to_keep=1",
    "--max_rollbacks=0",
    "--keep_best=1",
    "--best_metric=recall",
    "--evaluate_every_steps=3",
    "--evaluate_num_images=64",
    "--evaluate_extractor=tests.slow_extractor:make",
    "--evaluate_figures=frechet_distance,recall",
)


def train(run_dir: pathlib.Path, *arguments: str) -> None:
    code = dtrain_main.run(["main", f"--run_dir={run_dir}", *arguments])
    assert code == errors.FINISHED


def steps_of(run_dir: pathlib.Path) -> list[int]:
    return sorted(
        int(path.stem.removeprefix("ckpt-"))
        for path in run_dir.glob("checkpoints/ckpt-*.index")
    )


def test_figures_of_a_run_and_what_they_decide(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train(
        run_dir,
        *SETTINGS,
        *EVALUATION,
        f"--evaluate_cache_dir={tmp_path}/cache",
        *("--max_to_keep=1", "--keep_best=1", "--best_metric=recall"),
    )
    output = capsys.readouterr().out
    assert "step 4: frechet_distance " in output
    assert output.count("evaluations are ") == 2
    lines = runs.metrics(run_dir)
    measured = {
        line["step"]: line for line in lines if "frechet_distance" in line
    }
    assert set(measured) == {4, 8}
    found = figure_log.read(str(run_dir))
    assert [(line.step, line.checkpoint) for line in found] == [
        (4, "ckpt-4"),
        (8, "ckpt-8"),
    ]
    for line in found:
        for name, value in line.figures.items():
            assert measured[line.step][name] == pytest.approx(value, rel=1e-6)
        assert (run_dir / f"nearest/step-{line.step:06}.png").exists()
    # More recall is better, which nobody has said; of two alike the later.
    wanted = max(measured, key=lambda step: (measured[step]["recall"], step))
    assert steps_of(run_dir) == sorted({wanted, 8})
    assert best.step_of(str(run_dir)) == wanted
    [attempt] = report.read(str(run_dir))
    assert attempt.seconds["evaluate"] > 0
    report.run(["report", f"--run_dir={run_dir}"])
    assert "evaluations" in capsys.readouterr().out
    # The training does not know that it was measured.
    train(tmp_path / "other", *SETTINGS)
    digests = {
        tensors.digest(f"{each}/checkpoints/ckpt-8")
        for each in (run_dir, tmp_path / "other")
    }
    assert len(digests) == 1
    for one, other in zip(lines, runs.metrics(tmp_path / "other"), strict=True):
        assert {name: one[name] for name in other} == other


def test_a_budget_leaves_evaluations_out(tmp_path: pathlib.Path) -> None:
    train(
        tmp_path / "run",
        *SETTINGS,
        *EVALUATION,
        "--evaluate_figures=frechet_distance",
        f"--evaluate_cache_dir={tmp_path}/cache",
        "--evaluate_budget_percent=0.001",
    )
    found = figure_log.read(str(tmp_path / "run"))
    # What the first one takes is known afterwards.
    assert [line.step for line in found] == [4]


def test_an_evaluation_that_fails_ends_no_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        tmp_path / "run",
        *SETTINGS,
        *EVALUATION,
        "--evaluate_extractor=tests.slow_extractor:odd",
        f"--evaluate_cache_dir={tmp_path}/cache",
    )
    output = capsys.readouterr().out
    assert output.count("is not evaluated: image 0 has features that are") == 2
    assert len(runs.metrics(tmp_path / "run")) == 8
    assert not figure_log.read(str(tmp_path / "run"))


def start(run_dir: pathlib.Path, workers: int) -> list[runs.Process]:
    """Starts the slow run, on as many workers."""
    flags = (
        *SLOW,
        f"--run_dir={run_dir}",
        f"--evaluate_cache_dir={run_dir}-cache",
    )
    if workers == 1:
        return [runs.start("dtrain.main", *flags)]
    ports = worker_lib.free_ports(workers)
    return [
        runs.start(
            "dtrain.main",
            "--strategy=multi_worker",
            *flags,
            **process.environment,
        )
        for process in worker_lib.plan(ports, [])
    ]


def finish(processes: list[runs.Process]) -> list[tuple[int, str]]:
    return [runs.finish(process) for process in processes]


def wait_for_evaluation(run_dir: pathlib.Path) -> None:
    """Waits until two steps are written and the third is being measured."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.7)
    assert path.read_bytes().count(b"\n") == 2, "it is over"


def test_told_to_end_in_an_evaluation(tmp_path: pathlib.Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    [process] = start(cut, 1)
    wait_for_evaluation(cut)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    [(code, output)] = finish([process])
    secs = time.monotonic() - told
    assert code == errors.RUN_AGAIN, output
    assert "saved at step 3" in output
    # A round of the extractor, a save, and the end of the process.
    assert secs < 5, output
    assert steps_of(cut) == [3]
    assert [line["step"] for line in runs.metrics(cut)] == [1, 2]
    [(code, output)] = finish(start(cut, 1))
    assert code == errors.FINISHED, output
    assert not (cut / "evaluation.safetensors").exists()
    train(whole, *SLOW, f"--evaluate_cache_dir={cut}-cache")
    assert (cut / "metrics.jsonl").read_bytes() == (
        whole / "metrics.jsonl"
    ).read_bytes()
    assert steps_of(cut) == steps_of(whole)
    for step in steps_of(whole):
        one, other = (
            tensors.digest(f"{run_dir}/checkpoints/ckpt-{step}")
            for run_dir in (cut, whole)
        )
        assert one == other
    found, expected = (
        [line._replace(secs=0.0) for line in figure_log.read(str(run_dir))]
        for run_dir in (cut, whole)
    )
    assert found == expected
    assert best.step_of(str(cut)) == best.step_of(str(whole))


def test_two_workers_killed_in_an_evaluation(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "run"
    processes = start(run_dir, 2)
    wait_for_evaluation(run_dir)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    for code, output in finish(start(run_dir, 2)):
        assert code == errors.FINISHED, output
    assert [line["step"] for line in runs.metrics(run_dir)] == [*range(1, 7)]
    lines = {line.step: line for line in figure_log.read(str(run_dir))}
    assert set(lines) == {3, 6}
    # One process, which nothing happens to, measures the same of what is kept.
    path = run_dir / "figures.jsonl"
    path.rename(tmp_path / "by_two")
    code = evaluate.run(
        [
            *("evaluate", f"--run_dir={run_dir}", "--checkpoint=all"),
            *("--num_images=64", "--extractor=tests.slow_extractor:make"),
            "--figures=frechet_distance,recall",
            f"--cache_dir={tmp_path}/cache",
        ]
    )
    assert code == errors.FINISHED
    for line in figure_log.read(str(run_dir)):
        if line.step:
            expected = lines[line.step]
            assert line.protocol == expected.protocol
            for name, value in line.figures.items():
                wanted = expected.figures[name]
                assert value == pytest.approx(wanted, rel=1e-6), name


def test_a_line_that_waits_for_its_figures(tmp_path: pathlib.Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run_dir in (whole, cut):
        run_dir.mkdir()
    figures = {"recall": 0.25}
    recorder = metrics.RunRecorder(str(whole), 0)
    recorder.write(1, rows(1, 4), figures)
    recorder.close()

    recorder = metrics.RunRecorder(str(cut), 0)
    recorder.hold(1, rows(1, 4))
    assert [line["step"] for line in read_lines(cut)] == [1, 2, 3]
    held, state = recorder.last, recorder.state_of(4)
    recorder.close()
    # Twice, for the first one may be killed before it has saved.
    for _ in range(2):
        recorder = metrics.RunRecorder(str(cut), 4, state, held)
        assert recorder.owes
        recorder.finish(figures)
        assert not recorder.owes
        recorder.close()
        assert (cut / "metrics.jsonl").read_bytes() == (
            whole / "metrics.jsonl"
        ).read_bytes()
    recorder = metrics.RunRecorder(str(whole), 4, None, held)
    assert not recorder.owes
    recorder.close()


MISTAKES = {
    "evaluate_figures=recall": "needs --evaluate_every_steps",
    "evaluate_num_images=9": "needs --evaluate_every_steps",
    "evaluate_figures=fid,evaluate_every_steps=2": "must be of frechet_dist",
    "keep_best=1,best_metric=recall": "is measured by --evaluate_every_steps",
    "keep_best=1,best_metric=recall,evaluate_every_steps=1500": (
        "must be a multiple of checkpoint_every_steps (1000), for --keep_best"
    ),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_settings_that_contradict_each_other(text: str) -> None:
    settings = dict(pair.split("=") for pair in text.split(","))
    values = {
        name: int(value) if value.isdecimal() else value
        for name, value in settings.items()
    }
    with pytest.raises(UserError) as raised:
        Config(**values)
    assert MISTAKES[text] in str(raised.value)


def test_mistakes_leave_nothing_behind(tmp_path: pathlib.Path) -> None:
    for arguments, said in (
        ("--evaluate_extractor=inception:none.pb", "there is none"),
        ("--best_metric=reverse_kl", "is not measured in this run"),
    ):
        with pytest.raises(UserError) as raised:
            train(
                tmp_path / "run",
                *SETTINGS,
                *EVALUATION,
                "--keep_best=1",
                arguments,
            )
        assert said in str(raised.value)
        assert not (tmp_path / "run").exists()
