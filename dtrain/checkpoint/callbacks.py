"""dtrain's saving for a `fit` of your own: two Keras callbacks.

`BackupAndRestore` has the arguments of `keras.callbacks.BackupAndRestore`, and
`CheckpointManagerCallback` keeps a history. Both save, in TensorFlow's format
and on another thread, the model, every optimizer that it holds, its seeds and
metrics, and the place in the data; both resume at that place, which may be in
the middle of an epoch. If both are given, `fit` goes on from whichever is
newer.

Keras tells a callback the numbers of epoch and batch, and nothing of the data.
That is taken from the frame of `fit`, where it is Keras' `EpochIterator`: to go
on, the epochs before are run on it once more, without the training, so that a
seeded order is in the same place as in a run that was never cut.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import keras
import tensorflow as tf

# Not public. The seeds of `keras.random` where no seed is given.
from keras.src.backend.common import global_state

from dtrain.bundle.objects import untracked_variables
from dtrain.checkpoint import going_on, manager, retention
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.snapshot import Plan, Snapshot
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files

SaveFreq = int | Literal["epoch"]

# Names in a directory of checkpoints; with anything else it is somebody's.
_OURS = (
    r"ckpt-\d+\..*|checkpoint(\.tmp)?|pending|quarantine|pins\.json(\.tmp)?"
    r"|lease\.json(\.tmp)?|\.lock"
)
# In the key of every variable, and not in that of TensorFlow's own graph.
_ATTRIBUTE = "/.ATTRIBUTES/"
# By directory: what is to be closed. A `fit` that ends by an exception tells
# its callbacks nothing, and the next one in this process closes it.
_OPEN: dict[str, contextlib.ExitStack] = {}


class _Tier(keras.callbacks.Callback):
    """Saves while `fit` trains; the first of these in a `fit` restores."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: SaveFreq,
        policies: Sequence[retention.Policy],
        *,
        verify: str,
        on_save_error: str,
        name: str,
        keep: bool,
    ) -> None:
        """Checks the arguments; nothing is touched before `fit`.

        Args:
            directory: where it saves.
            save_freq: epoch, or a number of batches.
            policies: which checkpoints stay.
            verify: full or sizes.
            on_save_error: continue or stop.
            name: of the argument that is the directory, for messages.
            keep: whether every save must be written, on a slow disk too.

        Raises:
            UserError: an argument is not of these.
        """
        super().__init__()
        self.directory = CheckpointDirectory(os.fspath(directory))
        if not self.directory.path:
            raise UserError(f"{name} ('') must be a path; try 'backup'")
        _check_save_freq(save_freq)
        _check_choice("verify", verify, ("full", "sizes"))
        _check_choice("on_save_error", on_save_error, ("continue", "stop"))
        self.save_freq: SaveFreq = save_freq
        self.verify = verify
        self._policies = tuple(policies)
        self._on_save_error = on_save_error
        self._name = name
        self._keep = keep
        self._fit: _Fit | None = None
        self._seen_step = self._saved_step = 0

    # What Keras calls, in this order.

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Finds where to go on, restores it and brings the data there."""
        del logs
        local = _locals_of_fit(self.model)
        tiers = [
            each
            for each in local["callbacks"].callbacks
            if isinstance(each, _Tier)
        ]
        if self is not tiers[0]:
            return
        places = [tier.directory for tier in tiers]
        _check_distinct(places)
        fit = _Fit(self.model, local["epoch_iterator"])
        how = "full" if any(t.verify == "full" for t in tiers) else "sizes"
        with contextlib.ExitStack() as stack:
            for tier in tiers:
                tier._open()
                stack.callback(tier._close)
            fit.restore(places, how, local["initial_epoch"])
            stack.pop_all()
        for tier in tiers:
            tier._fit = fit
            tier._seen_step = tier._saved_step = fit.step

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Restores the metrics, which Keras has just reset."""
        del logs
        assert self._fit
        self._fit.begin_epoch(epoch)

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Saves after as many batches as `save_freq` says."""
        assert self._fit
        with self._reporting():
            self._writer.raise_if_failed()
        self._fit.finish_batch(batch)
        # The last of an epoch is saved when Keras has evaluated: there is no
        # going on between the two.
        if self.save_freq != "epoch" and not self._fit.is_epoch_done:
            self._maybe_save(logs)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Saves after an epoch, or if its last batch was to be saved."""
        assert self._fit
        with self._reporting():
            self._writer.raise_if_failed()
        if logs is not None and not logs:
            # Of unknown length, and it went on where nothing was left of it.
            logs.update(_scalars(self.model.get_metrics_result()))
        self._fit.finish_epoch(epoch)
        self._maybe_save(logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written.

        Raises:
            StorageError: something was not.
        """
        del logs
        self._fit = None
        # Keras would begin the next `fit` of this model there.
        self.model._initial_epoch = None
        with files.storage_errors(self.directory.path):
            self._close()

    # How it saves.

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        path = self.directory.path
        foreign = [
            name for name in files.names(path) if not re.fullmatch(_OURS, name)
        ]
        if foreign:
            raise UserError(
                f"{self._name} ({path}) holds {foreign[0]}, which is no "
                "checkpoint of dtrain; name a directory of its own"
            )
        self._writer = Writer()
        with contextlib.ExitStack() as stack:
            self._claim = stack.enter_context(
                claim.claim(path, name=self._name)
            )
            stack.callback(self._writer.close)
            _OPEN[self._key] = stack.pop_all()
        self._manager = manager.CheckpointManager(
            # It is given its snapshots, and takes none itself.
            tf.train.Checkpoint(),
            path,
            self._policies,
            verify=self.verify,
            writer=self._writer,
        )

    @property
    def _key(self) -> str:
        path = self.directory.path
        return path if files.is_remote(path) else os.path.realpath(path)

    def _close(self) -> None:
        if self._key in _OPEN:
            _OPEN.pop(self._key).close()

    def _maybe_save(self, logs: Mapping[str, Any] | None) -> None:
        assert self._fit
        step, before = self._fit.step, self._seen_step
        self._seen_step = step
        if self.save_freq == "epoch" or (
            step // self.save_freq > before // self.save_freq
        ):
            self._save(logs)

    def _save(self, logs: Mapping[str, Any] | None) -> None:
        assert self._fit
        self._claim.raise_if_lost()
        self._saved_step = self._fit.step
        facts = manager.Facts(metrics=_scalars(logs or {}))
        write = self._manager.writing(self._fit.step, self._fit.take(), facts)
        is_done = False
        while not is_done:
            # Where it waits for an earlier one, it may be told that it failed.
            with self._reporting():
                self._writer.submit(write, keep=self._keep)
                is_done = True

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Tells of a save that failed, in the way that was asked for.

        Raises:
            StorageError: it was to stop.
        """
        try:
            with files.storage_errors(self.directory.path):
                yield
        except StorageError as error:
            if self._on_save_error == "stop":
                raise
            warnings.warn(
                f"{error}; training goes on from what was saved before",
                stacklevel=3,
            )


class BackupAndRestore(_Tier):
    """The newest state of a `fit` that is not finished, in two generations.

    A drop-in for `keras.callbacks.BackupAndRestore`. To be the last of the
    callbacks, or what those after it change at the end of an epoch is not in
    the backup of that epoch.

    Args:
        backup_dir: a directory of its own, local or any that `tf.io.gfile`
            writes; made at the start.
        save_freq: epoch, or a number of batches.
        double_checkpoint: changes nothing: there are always two generations.
        delete_checkpoint: whether the backups are removed when `fit` is
            finished.
        verify: full, which reads and sums a state before it is used, or
            sizes.
        on_save_error: continue, which warns and trains on, or stop, which
            raises `StorageError`.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: SaveFreq = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        verify: Literal["full", "sizes"] = "full",
        on_save_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        super().__init__(
            backup_dir,
            save_freq,
            (retention.Last(2),),
            verify=verify,
            on_save_error=on_save_error,
            name="backup_dir",
            keep=False,
        )
        self.backup_dir = self.directory.path
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written, and removes it."""
        if not self.delete_checkpoint:
            super().on_train_end(logs)
            return
        # What could not be written is not needed any more.
        with contextlib.suppress(StorageError):
            super().on_train_end(logs)
        try:
            with files.storage_errors(self.backup_dir):
                files.remove_tree(self.backup_dir)
        except StorageError as error:
            warnings.warn(
                f"{error}; remove it, or the next fit goes on from its end",
                stacklevel=2,
            )


class CheckpointManagerCallback(_Tier):
    """The kept history of a `fit`: `directory/ckpt-<batches done>`.

    What `keras.callbacks.ModelCheckpoint` is for, with the whole state, so that
    `fit` goes on from any of them. The end of the last epoch is always saved.

    Args:
        directory: a directory of its own, local or any that `tf.io.gfile`
            writes; made at the start.
        save_freq: epoch, or a number of batches.
        policies: what any of them keeps stays; see
            `dtrain.checkpoint.retention`. A `Best` sees the logs of the epoch
            or batch that is saved.
        verify: full, which reads and sums a state before it is used, or
            sizes.
        on_save_error: continue, which warns and trains on, or stop, which
            raises `StorageError`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: SaveFreq = "epoch",
        policies: Sequence[retention.Policy] = (retention.Last(3),),
        *,
        verify: Literal["full", "sizes"] = "full",
        on_save_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        super().__init__(
            directory,
            save_freq,
            policies,
            verify=verify,
            on_save_error=on_save_error,
            name="directory",
            keep=True,
        )

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Saves after an epoch, if that is due or it is the last."""
        self._check_metrics(logs or {})
        super().on_epoch_end(epoch, logs)
        assert self._fit
        is_last = epoch + 1 == (self.params or {}).get("epochs")
        is_last = is_last or self.model.stop_training
        if is_last and self._saved_step != self._fit.step:
            self._save(logs)

    def _check_metrics(self, logs: Mapping[str, Any]) -> None:
        """Refuses a policy that no value would ever reach.

        Raises:
            UserError: there is one.
        """
        for policy in self._policies:
            if isinstance(policy, retention.Best) and policy.metric not in logs:
                raise UserError(
                    f"Best.metric ({policy.metric!r}) must be among the logs "
                    f"of an epoch; there: {', '.join(sorted(logs)) or 'none'}"
                )


class _Position(NamedTuple):
    """Where a `fit` is.

    Attributes:
        epoch: the number that Keras gives to the epoch it is in.
        batch: batches of that epoch that are done.
        num_batches: of an epoch; -1 if that is not known yet.
    """

    epoch: int = 0
    batch: int = 0
    num_batches: int = -1


class _Fit:
    """One call of `fit`: all that it changes, and where it is.

    Attributes:
        step: batches done in all.
    """

    def __init__(self, model: keras.Model, data: Any) -> None:
        """Looks at one call of `fit`.

        Args:
            model: what it trains.
            data: Keras' `EpochIterator`.
        """
        self.step = 0
        self._model = model
        self._data = data
        self._position = _Position()
        self._resumed = _Position()
        self._counters = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
            for name in _Position._fields
        }
        self._step_variable = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._plan: Plan | None = None
        self._planned: list[int] = []
        # Of each variable of the metrics, which a checkpoint cannot hold.
        self._copies: list[tuple[tf.Variable, tf.Variable]] = []

    # Where it is.

    @property
    def is_epoch_done(self) -> bool:
        """Whether no batch of the epoch is left, as far as is known."""
        return self._position.batch == self._data.num_batches

    def begin_epoch(self, epoch: int) -> None:
        """Puts back what Keras reset, if the epoch is not a whole one."""
        resumed = self._resumed
        if resumed.batch and epoch == resumed.epoch:
            for copy, value in self._copies:
                value.assign(copy)
        self._resumed = _Position()

    def finish_batch(self, batch: int) -> None:
        """Notes that a batch is done; counted from 0 in its epoch."""
        # With `steps_per_execution`, the last number may be one too large.
        done = min(batch + 1, self._data.num_batches or math.inf)
        before = self._position.batch
        self._position = self._position._replace(batch=int(done))
        self.step += int(done) - before

    def finish_epoch(self, epoch: int) -> None:
        """Notes that an epoch is done."""
        self._position = self._position._replace(epoch=epoch + 1, batch=0)

    # What it changes.

    def take(self) -> Snapshot:
        """Takes a snapshot of all of it."""
        plan = self._current_plan()
        self._step_variable.assign(self.step)
        num_batches = self._data.num_batches or -1
        position = self._position._replace(num_batches=num_batches)
        for name, value in position._asdict().items():
            self._counters[name].assign(value)
        for copy, value in self._copies:
            copy.assign(value)
        return plan.take(self.step)

    def _current_plan(self) -> Plan:
        """Plans again if variables were made since, as at their first use."""
        parts = _parts(self._model)
        metrics = _metric_variables(self._model)
        planned = [
            id(variable)
            for owner in parts.values()
            for variable in getattr(owner, "variables", (owner,))
        ]
        planned += [id(variable) for variable in metrics]
        if self._plan is None or planned != self._planned:
            self._copies = [(_copy_of(value), value) for value in metrics]
            self._checkpoint = tf.train.Checkpoint(
                **parts,
                untracked=tf.train.Checkpoint(**untracked_variables(parts)),
                metrics=tf.train.Checkpoint(
                    **{
                        str(number): copy
                        for number, (copy, _) in enumerate(self._copies)
                    }
                ),
                fit=tf.train.Checkpoint(
                    step=self._step_variable, **self._counters
                ),
            )
            self._plan = Plan(self._checkpoint)
            self._planned = planned
        return self._plan

    # How it comes back.

    def restore(
        self,
        directories: Sequence[CheckpointDirectory],
        how: str,
        first_epoch: int,
    ) -> None:
        """Restores the newest state that verifies, if there is one.

        Args:
            directories: where it may be.
            how: full or sizes.
            first_epoch: the `initial_epoch` of `fit`.

        Raises:
            UserError: nothing verifies, or it is of another model or data.
            StorageError: a disk failed.
        """
        self._model._initial_epoch = None
        self._position = _Position(epoch=first_epoch)
        places = [going_on.Place(each, is_mine=True) for each in directories]
        with files.storage_errors(directories[0].path):
            for each in directories:
                each.clean()
            seen = going_on.search(places, how)
        for note in seen.notes:
            warnings.warn(note, stacklevel=2)
        if seen.found:
            self._restore(seen.found, first_epoch)
        elif seen.holds_something:
            raise UserError(
                f"{directories[0].path} holds checkpoints and none of them can "
                "be used; bring one back from a copy, or name another "
                "directory to start over"
            )

    def _restore(self, found: going_on.Found, first_epoch: int) -> None:
        if _difference(self._current_plan().take(0), found.manifest):
            # What is made at its first use is not there yet.
            self._trace()
        difference = _difference(self._current_plan().take(0), found.manifest)
        if difference:
            raise UserError(
                f"{found.prefix} is not of this model: {difference}; make the "
                "model as it was, or name another directory"
            )
        step = found.manifest.step
        with (
            files.storage_errors(found.prefix),
            found.directory.reading(step) as prefix,
        ):
            self._checkpoint.restore(prefix).assert_consumed()
        self.step = step
        self._position = self._resumed = _Position(
            **{
                name: int(variable.numpy())
                for name, variable in self._counters.items()
            }
        )
        self._check_data(found.prefix)
        epoch, batch, _ = self._position
        self._model._initial_epoch = epoch
        self._forward(epoch - first_epoch)
        if batch:
            self._skip(batch)
        print(f"fit goes on from {found.prefix}: epoch {epoch}, batch {batch}")

    def _trace(self) -> None:
        """Traces one step, without running it, for the variables it makes."""
        strategy = self._model.distribute_strategy
        step = tf.function(
            lambda data: strategy.run(self._model.train_step, args=(data,)),
            autograph=False,
        )
        step.get_concrete_function(self._data._distributed_dataset.element_spec)

    def _check_data(self, prefix: str) -> None:
        """Refuses data in which the place that was saved is another one.

        Raises:
            UserError: it is.
        """
        _, batch, saved = self._position
        there = self._data.num_batches or -1
        if batch and -1 != saved != there != -1:
            raise UserError(
                f"{prefix} was saved at batch {batch} of {saved}, and an epoch "
                f"has now {there}; give fit the data and the batch size that "
                "it had"
            )
        size = self._data.steps_per_execution
        if batch % size:
            raise UserError(
                f"{prefix} was saved at batch {batch}, which must be a "
                f"multiple of steps_per_execution ({size}); compile as it was"
            )

    def _forward(self, num_epochs: int) -> None:
        """Runs epochs on the data alone."""
        data = self._data
        # One iterator goes on through the epochs, or its length is not known:
        # to be somewhere in it is to have read what is before.
        reads = bool(data.steps_per_epoch) or not data.data_adapter.num_batches
        for _ in range(num_epochs):
            # Keras warns that data of unknown length ends, each time it does.
            with warnings.catch_warnings(), data.catch_stop_iteration():
                warnings.simplefilter("ignore")
                for _, _, iterator in data:
                    if reads:
                        _read(iterator, data.steps_per_execution)

    def _skip(self, batch: int) -> None:
        """Begins the next epoch, and only that, after some of its batches."""
        data = self._data
        whole_epoch = data._enumerate_iterator

        def rest_of_epoch() -> Iterator[tuple[int, int, Any]]:
            del data._enumerate_iterator
            for begin, end, iterator in whole_epoch():
                if begin < batch:
                    _read(iterator, data.steps_per_execution)
                else:
                    yield begin, end, iterator

        data._enumerate_iterator = rest_of_epoch


def _read(iterator: Iterator[Any], num_batches: int) -> None:
    """Reads batches and forgets them.

    Raises:
        OutOfRangeError: there are none left; Keras ends the epoch then.
    """
    for _ in range(num_batches):
        try:
            next(iterator)
        except StopIteration as error:
            raise tf.errors.OutOfRangeError(None, None, "no data") from error


def _locals_of_fit(model: keras.Model) -> dict[str, Any]:
    """Finds the local variables of the `fit` that calls this.

    Raises:
        UserError: there is none.
    """
    frame = inspect.currentframe()
    while frame is not None:
        local = frame.f_locals
        if local.get("self") is model and "epoch_iterator" in local:
            return dict(local)
        frame = frame.f_back
    raise UserError(
        f"dtrain's callbacks work in the fit of a Keras model on TensorFlow, "
        f"and this is Keras {keras.__version__} on {keras.backend.backend()}; "
        "use the versions of requirements.txt, or a loop with "
        "dtrain.CheckpointManager"
    )


def _parts(model: keras.Model) -> dict[str, Any]:
    """Finds the model, and what it holds where TensorFlow does not look.

    Those are optimizers and variables in lists and dicts. Keras' own generator
    of seeds is nobody's, and there if it was used.

    Returns:
        Each by the attributes that lead to it.
    """
    parts: dict[str, Any] = {"model": model}
    seen: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, keras.Optimizer | tf.Variable):
            if id(value) not in seen:
                seen.add(id(value))
                parts[name] = value
        elif isinstance(value, list | tuple):
            for number, each in enumerate(value):
                visit(f"{name}_{number}", each)
        elif isinstance(value, dict):
            for key, each in value.items():
                visit(f"{name}_{key}", each)

    for number, layer in enumerate(model._flatten_layers()):
        for name, value in vars(layer).items():
            # Those of TensorFlow's own, which name the same things again.
            if not name.startswith("_self_"):
                visit(f"layer_{number}_{name}" if number else name, value)
    seeds = global_state.get_global_attribute("global_seed_generator")
    if seeds is not None:
        parts["global_seed_generator"] = seeds.state.value
    return parts


def _metric_variables(model: keras.Model) -> list[tf.Variable]:
    """Lists the variables of the metrics, of each replica by itself.

    Under a strategy they are sums that are added up when they are read, which
    would lose how they are shared out.
    """
    metrics = {id(each): each for each in (*model.metrics, *model._metrics)}
    values = [
        variable.value
        for metric in metrics.values()
        for variable in metric.variables
    ]
    return [
        component
        for value in values
        for component in getattr(value, "values", (value,))
    ]


def _copy_of(variable: tf.Variable) -> tf.Variable:
    with tf.device(variable.device):
        return tf.Variable(variable.read_value(), trainable=False)


def _difference(snapshot: Snapshot, made: Manifest) -> str:
    """Says in what a state and a manifest differ; empty if they fit."""
    mine = {
        key: f"{tensor.dtype.name} {list(tensor.shape)}"
        for key, tensor in zip(snapshot.keys, snapshot.tensors, strict=True)
    }
    saved = {
        key: f"{tensor.dtype} {list(tensor.shape)}"
        for key, tensor in made.tensors.items()
        if _ATTRIBUTE in key
    }
    for key in sorted(mine.keys() | saved.keys()):
        there, here = saved.get(key, "nothing"), mine.get(key, "nothing")
        if there != here:
            name = key.partition(_ATTRIBUTE)[0]
            return f"as {name} it has {there}, and the model {here}"
    return ""


def _scalars(logs: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns those of the logs that are numbers; None if not finite."""
    scalars: dict[str, float | None] = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            scalars[name] = number if math.isfinite(number) else None
    return scalars


def _check_save_freq(save_freq: SaveFreq) -> None:
    """Refuses what says no moment.

    Raises:
        UserError: it says none.
    """
    is_whole = isinstance(save_freq, int) and not isinstance(save_freq, bool)
    if save_freq != "epoch" and (not is_whole or save_freq < 1):
        raise UserError(
            f"save_freq ({save_freq!r}) must be 'epoch' or a number of batches "
            "of at least 1; try 'epoch'"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses what is no choice.

    Raises:
        UserError: it is none.
    """
    if value not in choices:
        raise UserError(
            f"{name} ({value!r}) must be {' or '.join(choices)}; try "
            f"{choices[0]!r}"
        )


def _check_distinct(directories: Sequence[CheckpointDirectory]) -> None:
    """Refuses two callbacks in one directory.

    Raises:
        UserError: there are two.
    """
    paths = [os.path.abspath(each.path) for each in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(
                f"{path} is the directory of {paths.count(path)} callbacks; "
                "give each its own"
            )
