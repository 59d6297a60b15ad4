"""Whatever is damaged in a run directory is seen, and the run goes on.

One small real run is made. Its directory is then damaged again and again, one
file at a time and several, and a run is opened on it as the trainer does.
"""

from __future__ import annotations

import collections
import os
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from dtrain import errors
from dtrain.checkpoint import manager as checkpoint_lib
from dtrain.checkpoint import pins, retention
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.snapshot import SnapshotTaker
from dtrain.cluster.environment import ALONE
from dtrain.errors import UserError
from dtrain.gan import state as gan_lib
from dtrain.record import metrics
from dtrain.run import checkpointer as checkpointer_lib
from dtrain.run import identity
from tests import replicas, runs

NUM_DAMAGES = int(os.environ.get("DTRAIN_NUM_DAMAGES", "300"))


# The run.


class Opened(NamedTuple):
    """What a run sees when it starts on a directory.

    Attributes:
        prefix: of the state that it goes on from, below its directory.
        step: of that state.
        notes: all that it says.
    """

    prefix: str
    step: int
    notes: list[str]


class Run:
    """A real run that was stopped, and is opened as often as one likes."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.path = directory / "run"
        self._whole = directory / "whole"
        _train(self.path)
        shutil.copytree(self.path, self._whole)
        self.description = identity.read(str(self.path))
        config = self.description.config
        self._gan = gan_lib.GAN(
            config,
            tf.distribute.get_strategy(),
            self.description.image_shape,
            self.description.num_classes,
        )
        self._taker = SnapshotTaker(self._gan.checkpoint)
        self._checkpointer = checkpointer_lib.Checkpointer(
            self._gan.checkpoint, config, ALONE
        )
        tiers = [
            CheckpointDirectory(f"{self.path}/{name}")
            for name in ("checkpoints", "backup")
        ]
        # Newest first, as they are tried.
        self.states = sorted(
            ((step, tier) for tier in tiers for step in tier.steps()),
            key=lambda state: -state[0],
        )
        # By the reader of TensorFlow, which knows no manifests.
        self._tensors = {
            step: _read(tier.prefix(step)) for step, tier in self.states
        }

    def reset(self, newest: int = 0) -> None:
        """Undoes all damage, and removes the states above the n-th newest."""
        shutil.rmtree(self.path)
        shutil.copytree(self._whole, self.path)
        for step, tier in self.states[:newest]:
            for path in pathlib.Path(tier.path).glob(f"ckpt-{step}.*"):
                path.unlink()

    def open(self) -> Opened:
        """Does what the trainer does at its start, up to the first step.

        What it restores must be, to the bit, what was saved at that step.
        """
        _, note = identity.check(self.description, is_chief=True)
        restored = self._checkpointer.restore(replicas.alone())
        step = int(self._gan.step.numpy())
        assert restored.manifest.step == step
        self._check_state(restored.manifest.run, step)
        identity.write(self.description, self._gan.program.networks)
        recorder = metrics.RunRecorder(
            str(self.path), step, restored.manifest.log
        )
        recorder.close()
        notes = [note, *restored.notes, recorder.notice]
        prefix = os.path.relpath(restored.prefix, self.path)
        return Opened(prefix, step, [line for line in notes if line])

    def _check_state(self, run: object, step: int) -> None:
        assert run == identity.to_dict(self.description)
        keys, tensors, *_ = self._taker.take(step)
        assert {*keys} == self._tensors[step].keys()
        for key, tensor in zip(keys, tensors, strict=True):
            np.testing.assert_array_equal(tensor, self._tensors[step][key])


def _read(prefix: str) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(prefix)
    return {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        # It is no variable.
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def _train(run_dir: pathlib.Path) -> None:
    """Makes a run with three checkpoints and two backups, and stops it."""
    process = runs.start(
        "dtrain.main",
        *runs.SMALL,
        f"--run_dir={run_dir}",
        "--num_steps=100000",
        "--checkpoint_every_steps=100",
        "--backup_every_secs=0.001",
    )
    tiers = [
        CheckpointDirectory(f"{run_dir}/{name}")
        for name in ("checkpoints", "backup")
    ]
    deadline = time.monotonic() + 240
    while True:
        kept, backups = (tier.steps() for tier in tiers)
        # Backups newer than all checkpoints but the last, which is to come.
        if len(kept) >= 2 and len(backups) == 2 and backups[0] > kept[-1]:
            break
        assert time.monotonic() < deadline, (kept, backups)
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    newest = tiers[0].steps()[-1]
    pins.add(tiers[0].path, newest, "newest")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("damage"))


# The damage.


def flip(path: pathlib.Path, chance: random.Random) -> None:
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: pathlib.Path, chance: random.Random) -> None:
    """Cuts a file after a byte of it."""
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def delete(path: pathlib.Path, chance: random.Random) -> None:
    del chance
    path.unlink()


def empty(path: pathlib.Path, chance: random.Random) -> None:
    del chance
    os.truncate(path, 0)


DAMAGES: tuple[Callable[[pathlib.Path, random.Random], None], ...] = (
    flip,
    flip,
    truncate,
    delete,
    empty,
)


def files_below(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        os.path.relpath(path, directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def kind_of(name: str) -> str:
    """Tells which of the files that a run reads one is; "" is none."""
    kinds = {
        r".*/ckpt-\d+\.(data|index|json).*": r"\1 of a state",
        r".*/checkpoint": "pointer",
        r".*/pins\.json": "pins.json",
        r"saved\.json": "saved.json",
        r"(config|metrics)\.jsonl?": r"\g<0>",
        r"(generator|discriminator)\.json": "network",
    }
    for pattern, kind in kinds.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(kind)
    return ""


def check_state(run: Run, name: str, left: dict[str, bytes]) -> None:
    """A state that is damaged is put aside, and the one before is taken."""
    prefix = str(run.path / name.partition(".")[0])
    opened = run.open()
    older = [step for step, _ in run.states if step < state_of(name)]
    assert opened.step == older[0]
    [note] = opened.notes
    assert note.startswith(f"{prefix} does not verify: ")
    put_aside = run.path / os.path.dirname(name) / "quarantine"
    assert note.endswith(f"; moved to {put_aside}/{os.path.basename(prefix)}")
    reason = (put_aside / os.path.basename(prefix) / "reason.txt").read_text()
    assert f"does not verify: {reason.strip()};" in note
    # And all that was left of it is there as it was.
    kept = files_below(put_aside / os.path.basename(prefix))
    del kept["reason.txt"]
    assert kept == {
        os.path.basename(path): content
        for path, content in left.items()
        if path.startswith(f"{name.partition('.')[0]}.")
    }


def state_of(name: str) -> int:
    match = re.search(r"ckpt-(\d+)\.", name)
    return int(match[1]) if match else -1


def check_other(run: Run, name: str, whole: bytes) -> None:
    """Anything else is made good, or told of; the newest state is taken."""
    path = run.path / name
    kind = kind_of(name)
    opened = run.open()
    assert opened.step == run.states[0][0]
    said = {
        "config.json": rf"{path} is (missing|damaged \(.*\)); taken from ",
        "metrics.jsonl": rf"{path} is not what it was at step ",
        "pins.json": rf"{path} is damaged \(.*\); all are kept",
    }
    # A list of pins that is removed cannot be told from none.
    if kind in said and (kind != "pins.json" or path.exists()):
        [note] = opened.notes
        assert re.match(said[kind], note)
    else:
        assert not opened.notes
    if kind in ("config.json", "network"):
        assert path.read_bytes() == whole
    if kind == "metrics.jsonl" and path.exists():
        # What is kept is whole lines, but for a bit that is another number.
        steps = [line["step"] for line in runs.metrics(run.path)]
        assert steps == sorted(set(steps))
        assert f"; {len(steps):,} of its lines are kept" in opened.notes[0]


def test_every_damage_is_seen_and_made_good(run: Run) -> None:
    chance = random.Random(3)
    counts: collections.Counter[str] = collections.Counter()
    run.reset()
    names = sorted(name for name in files_below(run.path) if kind_of(name))
    # Below the oldest state there is none to go on from; see below.
    names = [name for name in names if state_of(name) != run.states[-1][0]]
    order = [step for step, _ in run.states]
    for number in range(NUM_DAMAGES):
        name = names[number % len(names)]
        damage = DAMAGES[number // len(names) % len(DAMAGES)]
        step = state_of(name)
        # The damaged state is the newest: others are not looked at.
        run.reset(order.index(step) if step >= 0 else 0)
        path = run.path / name
        whole = path.read_bytes()
        damage(path, chance)
        left = files_below(run.path)
        if left.get(name) == whole:
            counts["the same bytes"] += 1
            continue
        counts[f"{kind_of(name)}: {damage.__name__}"] += 1
        try:
            if step >= 0:
                check_state(run, name, left)
            else:
                check_other(run, name, whole)
        except BaseException:
            print(f"{number}: {damage.__name__} of {name}")
            raise
    for kind, count in sorted(counts.items()):
        print(f"{count:>5} {kind}")
    assert counts.total() == NUM_DAMAGES
    assert not counts["the same bytes"]


def test_several_states_are_damaged(run: Run) -> None:
    chance = random.Random(4)
    for _ in range(NUM_DAMAGES // 15):
        run.reset()
        good = chance.randrange(1, len(run.states))
        bad = run.states[:good] + [
            state for state in run.states[good + 1 :] if chance.random() < 0.5
        ]
        for step, tier in bad:
            paths = sorted(pathlib.Path(tier.path).glob(f"ckpt-{step}.*"))
            for path in chance.sample(paths, chance.randint(1, 2)):
                chance.choice(DAMAGES)(path, chance)
        opened = run.open()
        assert opened.step == run.states[good][0]
        assert [
            int(re.search(r"ckpt-(\d+) does not verify", note)[1])
            for note in opened.notes
        ] == [step for step, _ in run.states[:good]]


def test_all_states_are_damaged(run: Run) -> None:
    """One clear error, and everything stays where it is."""
    chance = random.Random(5)
    for _ in range(10):
        run.reset()
        for step, tier in run.states:
            paths = sorted(pathlib.Path(tier.path).glob(f"ckpt-{step}.*"))
            chance.choice(DAMAGES)(chance.choice(paths), chance)
        before = files_below(run.path)
        with pytest.raises(UserError) as caught:
            run.open()
        said = str(caught.value)
        newest, tier = run.states[0]
        assert "\n" not in said
        assert said.startswith(
            "there are checkpoints and none of them can be used "
            f"({tier.prefix(newest)} does not verify: "
        )
        assert said.endswith("or name another run_dir to start over")
        assert files_below(run.path) == before


def test_all_states_are_in_quarantine(run: Run) -> None:
    run.reset()
    for step, tier in run.states:
        tier.quarantine(step, "a test says so")
    before = files_below(run.path)
    with pytest.raises(UserError, match="all there was is in quarantine/"):
        run.open()
    assert files_below(run.path) == before


def test_a_damaged_list_of_pins_lets_nothing_go(run: Run) -> None:
    """What is pinned cannot be told, so everything is."""
    run.reset()
    directory = f"{run.path}/checkpoints"
    steps = CheckpointDirectory(directory).steps()
    flip(pathlib.Path(directory, "pins.json"), random.Random(6))
    state = tf.train.Checkpoint(weight=tf.Variable(0.0))
    manager = checkpoint_lib.CheckpointManager(
        state, directory, (retention.Last(1),)
    )
    manager.save(10**6, wait=True)
    manager.close()
    assert CheckpointDirectory(directory).steps() == [*steps, 10**6]
