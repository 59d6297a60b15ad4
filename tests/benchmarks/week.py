"""A week of a job that loses its nodes, in simulated time.

What is decided is decided by the real thing: the supervisors' `Record` says
what follows an end, `Checkpointer.due` when to save, and `goodput.account`
which steps were done for good. The rest is chance and `machines.Inputs`: nodes
are lost at random, independently of each other and at the same rate at any time
(an exponential distribution), by a crash of their worker or after a notice.

A crash takes all workers with it, and all start again where they are: from a
warm spare, where there is one, and from the newest save that was written by
then. A notice lets all save and end; the scheduler starts the job again with
another node, cold. Steps that overlap a save are slower. The week goes from
event to event, so a second is enough for many.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain import errors
from dtrain.cluster import environment
from dtrain.config import Config
from dtrain.record import goodput
from dtrain.resilience import status
from dtrain.run.checkpointer import Checkpointer
from launch import options as launch_options
from launch.keep import cycle, supervisor
from tests.benchmarks.machines import Inputs, Save

WEEK_SECS = 7 * 86_400.0
# Of a step, and of a loop of --steps_per_loop=50, after which the clock is
# looked at.
STEP_SECS = 0.1
LOOP_SECS = 50 * STEP_SECS
# How often a job that ends with 76 is queued again: --max_requeues.
MAX_REQUEUES = launch_options.Options().max_requeues
_NO_STATUS = status.Status(pid=1)


class Loss(NamedTuple):
    """Of a node.

    Attributes:
        secs: when it comes, since the job began.
        is_notice: whether a notice comes first, and not a crash at once.
    """

    secs: float
    is_notice: bool


def losses(
    inputs: Inputs, num_nodes: int, seed: int, secs: float = WEEK_SECS
) -> list[Loss]:
    """Draws what a job loses, the same for all ways to save.

    Args:
        inputs: the mean time, and the share of notices.
        num_nodes: of the job.
        seed: of the drawing.
        secs: how long the job is looked at.
    """
    chance = random.Random(f"{seed} {num_nodes}")
    drawn = []
    now = 0.0
    while True:
        now += chance.expovariate(1 / inputs.mean_secs(num_nodes))
        if now >= secs:
            return drawn
        drawn.append(Loss(now, chance.random() < inputs.notice_share))


class Outcome(NamedTuple):
    """What a job came to.

    Attributes:
        goodput: share of the time that the steps that stay would have taken
            without any save or loss.
        code: that it ended with for good; None if it did not.
        ended_secs: when that was; else the whole time.
        account: by the ledger of the run.
    """

    goodput: float
    code: int | None
    ended_secs: float
    account: goodput.Account


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job is like.

    Attributes:
        inputs: times of restarts and queues.
        save: what a save costs.
        interval: `--backup_every_secs`.
        num_nodes: of the job.
        has_spare: whether a warm spare waits beside each worker.
        secs: how long the job is looked at.
    """

    inputs: Inputs
    save: Save
    interval: float
    num_nodes: int
    has_spare: bool = False
    secs: float = WEEK_SECS


class Job:
    """A job of many starts, in simulated time.

    Attributes:
        now: seconds since it began.
        saved_step: the newest save that is written; -1 none.
    """

    def __init__(self, plan: Plan, drawn: Sequence[Loss]) -> None:
        """Begins nothing yet.

        Args:
            plan: what the job is like.
            drawn: what it loses, in the order of time.
        """
        self.now = 0.0
        self.saved_step = -1
        self._plan = plan
        self._losses = [*drawn, Loss(math.inf, False)]
        self._attempts: list[goodput.Attempt] = []
        self._requeues = 0
        self._records = self._supervisors()

    def _supervisors(self) -> list[supervisor.Record]:
        """Returns that of the node which is lost, and that of another one."""
        options = supervisor.Options(is_of_a_job=True)
        count = min(self._plan.num_nodes, 2)
        return [supervisor.Record(options) for _ in range(count)]

    def run(self) -> Outcome:
        """Lets the time pass; returns what the job came to."""
        plan, code = self._plan, None
        startup = cold = plan.inputs.restart_secs
        warm = cold * (plan.inputs.spare_share if plan.has_spare else 1.0)
        while self.now < plan.secs and code is None:
            loss = self._start(startup)
            if loss is None:
                break
            code, delay_secs = self._decide(loss)
            if code in (errors.RUN_AGAIN, errors.LOST_WORKER):
                code = self._requeue(code)
                delay_secs = plan.inputs.queue_secs
                startup = cold
            else:
                startup = warm
            if code is None:
                self.now += delay_secs
        account = goodput.account(self._attempts)
        useful_secs = account.num_steps * STEP_SECS
        return Outcome(
            useful_secs / plan.secs, code, min(self.now, plan.secs), account
        )

    def _start(self, startup: float) -> Loss | None:
        """Trains until a node is lost; returns None when the time is over."""
        while self._losses[0].secs <= self.now:
            # Between two starts: the next one has other nodes.
            self._losses.pop(0)
        loss = self._losses[0]
        start = _Start(self._plan, self.now, startup, self.saved_step)
        start.train_until(min(loss.secs, self._plan.secs))
        is_over = self._plan.secs <= loss.secs
        if loss.is_notice and not is_over:
            start.save_and_end()
        self.now, self.saved_step = start.now, start.saved_step
        self._restored = start.restored_step
        self._attempts.append(start.attempt(len(self._attempts)))
        return None if is_over else loss

    def _decide(self, loss: Loss) -> tuple[int | None, float]:
        """Asks the supervisors; returns a code that ends them, and a delay."""
        if loss.is_notice:
            ends = [errors.RUN_AGAIN, errors.RUN_AGAIN]
        else:
            ends = [-9, errors.LOST_WORKER]
        knows = self._restored is not None
        told = dataclasses.replace(
            _NO_STATUS,
            saved_step=self.saved_step if knows else -1,
            notice="a notice" if loss.is_notice else "",
            is_over=loss.is_notice,
        )
        decisions = [
            record.next(
                cycle.Result(
                    (cycle.Ending("worker", 0, code, status=told),),
                    restored_step=self._restored,
                    saved_step=told.saved_step,
                )
            )
            for record, code in zip(self._records, ends, strict=False)
        ]
        codes = [each.code for each in decisions if each.code is not None]
        delay_secs = max(each.delay_secs for each in decisions)
        # The scheduler sees one code: what is no reason to go on comes first.
        codes.sort(key=(errors.RUN_AGAIN, errors.LOST_WORKER).__contains__)
        return codes[0] if codes else None, cycle.LEAVE_SECS + delay_secs

    def _requeue(self, code: int) -> int | None:
        """Has the scheduler start the job again; returns its code if not."""
        self._requeues += code == errors.LOST_WORKER
        self._records = self._supervisors()
        return code if self._requeues > MAX_REQUEUES else None


class _Start:
    """One start of all workers.

    Attributes:
        now: seconds since the job began.
        saved_step: the newest save that is written; -1 none.
        restored_step: the one that it went on from; None before it looked.
    """

    def __init__(
        self, plan: Plan, now: float, startup: float, saved_step: int
    ) -> None:
        self.now = self._began = now
        self.saved_step = saved_step
        self.restored_step: int | None = None
        self._plan = plan
        self._startup = startup
        self._steps = float(max(saved_step, 0))
        self._train_secs = self._save_secs = 0.0
        self._points: list[goodput.Point] = []
        self._num_saves = 0
        # The step that is being written until when, and the one that waits.
        self._writing: tuple[int, float] | None = None
        self._waiting: int | None = None

    @property
    def step(self) -> int:
        return int(self._steps)

    def train_until(self, end: float) -> None:
        """Comes up and trains, until then."""
        ready = self._began + self._startup
        if ready >= end:
            self._startup = end - self._began
            self.now = end
            return
        self.now = ready
        self.restored_step = self.saved_step
        self._mark()
        saves = _Saves(self)
        while self.now < end:
            if saves.due(self.step):
                saves.save(self.step)
            # No earlier can a save be due; a loop is not cut in two.
            wait = saves.marked_secs + self._plan.interval - self.now
            num_loops = max(1, math.ceil(wait / LOOP_SECS))
            self._train(min(self.now + num_loops * LOOP_SECS, end))
        self._mark()

    def submit(self, step: int) -> None:
        """Is given a save; a newer one takes the place of one that waits."""
        self._num_saves += 1
        self._save_secs += self._plan.save.stall
        self.now += self._plan.save.stall
        if self._writing:
            self._waiting = step
        else:
            self._writing = step, self.now + self._plan.save.write

    def save_and_end(self) -> None:
        """Does what a notice asks for, in the time of grace."""
        if self.restored_step is None:
            return
        write = self._plan.save.write
        busy = self._writing[1] - self.now if self._writing else 0.0
        secs = min(busy + write, self._plan.inputs.grace_secs)
        if secs >= busy:
            self._written()
        if secs >= busy + write:
            self.saved_step = self.step
        self._save_secs += secs
        self.now += secs

    def attempt(self, number: int) -> goodput.Attempt:
        """Returns what the ledger has of it."""
        seconds = dict.fromkeys(goodput.KINDS, 0.0)
        seconds |= {
            "start": self._startup,
            "train": self._train_secs,
            "save": self._save_secs,
        }
        return goodput.Attempt(
            started=self._began,
            boot_id="",
            boot_started=0.0,
            host="",
            pid=1,
            num_workers=self._plan.num_nodes,
            num_replicas=self._plan.num_nodes,
            batch_size=1,
            attempt=number,
            num_saves=self._num_saves,
            seconds=seconds,
            points=self._points,
            exit_code=None,
            notice="",
        )

    def _mark(self) -> None:
        secs = self.now - self._began
        self._points.append(
            goodput.Point(secs, self.step, min(self._train_secs, secs))
        )

    def _written(self) -> None:
        if self._writing:
            self.saved_step = self._writing[0]
            self._writing = None

    def _train(self, end: float) -> None:
        """Does steps, slower ones while a save is written."""
        while self.now < end:
            until, step_secs = end, STEP_SECS
            if self._writing:
                until = min(end, self._writing[1])
                step_secs *= self._plan.inputs.inflation
            self._steps += (until - self.now) / step_secs
            self._train_secs += until - self.now
            self.now = until
            if self._writing and until >= self._writing[1]:
                self._written()
                if self._waiting is not None:
                    done = until + self._plan.save.write
                    self._writing, self._waiting = (self._waiting, done), None


class _Saves(Checkpointer):
    """Decides when to save as a run's chief does, by the simulated clock.

    Attributes:
        marked_secs: when it saved last, or began.
    """

    def __init__(self, start: _Start) -> None:
        config = Config(
            run_dir="nowhere",
            checkpoint_every_steps=0,
            backup_every_secs=start._plan.interval,
        )
        state = tf.train.Checkpoint()
        clock = lambda: start.now  # noqa: E731
        super().__init__(state, config, environment.ALONE, clock=clock)
        self._start = start
        self.marked_secs = start.now

    def _submit(self, step: int, *_: Any, **__: Any) -> bool:
        """Writes nothing; the simulated disk does."""
        self._start.submit(step)
        self.marked_secs = self._start.now
        return True
