"""The directory of a run, and the files in it that say what the run is.

It holds:

    run_dir/config.json     the settings, the shape of the data, the versions
    run_dir/generator.json  its layers, for `keras.models.model_from_json`
    run_dir/discriminator.json
    run_dir/metrics.jsonl   a line for each step
    run_dir/events/         for TensorBoard: losses now and then, and the grids
    run_dir/samples/        grids of images
    run_dir/checkpoints/    kept history
    run_dir/backup/         the newest state of a run that is not finished
    run_dir/saved.json      the directories that the run has saved to
    run_dir/figures.jsonl   what was measured of its states, and how
    run_dir/evaluation.safetensors  of one that a notice has ended
    run_dir/nearest/        samples beside the images that are nearest to them
    run_dir/ledger/         where the time of each attempt went; see `goodput`
    run_dir/stacks/         of the threads of workers that were stuck or crashed
    run_dir/reals.png       the first images of the data, as the run sees them
    run_dir/init_from.json  what --init_from took
    run_dir/launch/         the job of a cluster
    run_dir/stop            made by a person who wants the run to end
    run_dir/.lock           held by the process that trains; or lease.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.checkpoint import listing, manifest
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.config import Config, further
from dtrain.data.sources import Source
from dtrain.errors import UserError
from dtrain.run import places
from dtrain.storage import access, files, sealed


class Input(NamedTuple):
    """What config.json holds of a data set beside the images.

    Attributes:
        shape: of one example, as a model sees it.
        dtype: its type, by name: float32 or int32.
        num_examples: how many there are.
        num_classes: number of classes; 0 if it gives no labels.
        files: as that of a `Description`.
    """

    shape: tuple[int, ...]
    dtype: str
    num_examples: int
    num_classes: int
    files: str

    def __str__(self) -> str:
        """Says it in words, for an error."""
        shape = "x".join(map(str, self.shape)) or "one"
        return (
            f"{self.num_examples:,} of {shape} {self.dtype}"
            + (f", {self.num_classes} classes" if self.num_classes else "")
            + (f" (a digest of {self.files})" if self.files else "")
        )


def describe_input(source: Source) -> Input:
    """Returns what config.json holds of a data set."""
    spec = source.spec
    return Input(
        tuple(spec.shape),
        spec.dtype.name,
        source.num_images,
        source.num_classes,
        source.digest,
    )


@dataclasses.dataclass(frozen=True)
class Description:
    """What config.json holds: enough to rebuild the networks without the data.

    Attributes:
        config: the settings.
        image_shape: height, width and channels of an image.
        num_classes: number of classes; 0 if there are no labels.
        num_images: images of the data set.
        run_id: drawn when the run began, for the backups of a run that was
            here before are not of this one; empty in those of dtrain 0.1.0,
            and where no run is there yet.
        files: a digest of the names and labels of its pictures; empty where
            these are no files of their own, or the run is of a version that
            did not write it.
        inputs: the data sets beside the images, by name.
    """

    config: Config
    image_shape: tuple[int, int, int]
    num_classes: int
    num_images: int
    run_id: str = ""
    files: str = ""
    inputs: Mapping[str, Input] = dataclasses.field(default_factory=dict)

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        """Shape and type of what one example has; as those of `Data`."""
        own = {
            each.name for each in further.of(self.config) if not each.is_paired
        }
        return {
            name: tf.TensorSpec(each.shape, each.dtype)
            for name, each in self.inputs.items()
        } | {
            f"{name}_labels": tf.TensorSpec((), tf.int32)
            for name, each in self.inputs.items()
            if each.num_classes and name in own
        }


def read(run_dir: str) -> Description:
    """Reads what a run is.

    Raises:
        UserError: there is no run, or what it is cannot be read any more.
    """
    with files.storage_errors(run_dir):
        description, _ = _read(run_dir, [])
    if description is None:
        raise UserError(
            f"{run_dir} holds no run: there is no config.json in it"
        )
    return description


def settings(config: Config) -> Config | None:
    """Reads the settings that a run has begun with; None if none is there.

    Args:
        config: what it is told now; run_dir and checkpoint_dir count.

    Raises:
        UserError: they cannot be read any more.
    """
    with files.storage_errors(config.run_dir):
        before, _ = _read(config.run_dir, [places.checkpoint_dir(config)])
    return before and before.config


def _read(run_dir: str, more: Sequence[str]) -> tuple[Description | None, str]:
    """Reads what a run is, from its checkpoints if config.json is damaged.

    `more` are directories that may hold checkpoints, beside the usual ones.
    Returns None if there is no run; and a note if config.json is damaged.

    Raises:
        UserError: it is damaged, and no checkpoint says what the run is.
    """
    path = os.path.join(run_dir, "config.json")
    data = files.read(path)
    why = f"{path} is missing"
    if data is not None:
        try:
            return _describe(sealed.loads(data), path), ""
        except sealed.DamagedError as error:
            why = f"{path} is damaged ({error})"
    usual = [f"{run_dir}/checkpoints", f"{run_dir}/backup"]
    for path in (*more, *usual, *(listing.recorded(run_dir) or ())):
        directory = CheckpointDirectory(path)
        for step in reversed(directory.steps()):
            with contextlib.suppress(sealed.DamagedError):
                run = directory.manifest(step).run
                prefix = directory.prefix(step)
                if run:
                    note = f"{why}; taken from {prefix}.json"
                    return _describe(run, prefix), note
    if data is None:
        return None, ""
    raise UserError(f"{why}; bring it back, or name another run_dir")


def _describe(values: Mapping[str, Any], path: str) -> Description:
    """Reads what `to_dict` returned.

    Raises:
        DamagedError: it is something else.
        UserError: it is of another version of dtrain.
    """
    settings = sealed.field(values, "config", _is_mapping)
    data = sealed.field(values, "data", _is_mapping)
    image_shape = sealed.field(data, "image_shape", _is_image_shape)
    num_classes = sealed.field(data, "num_classes", sealed.is_count)
    num_images = sealed.field(data, "num_images", sealed.is_count)
    run_id = ""
    if "id" in values:
        run_id = sealed.field(values, "id", sealed.is_name)
    names = ""
    if "files" in data:
        names = sealed.field(data, "files", sealed.is_name)
    inputs = {}
    if "inputs" in data:
        inputs = sealed.field(data, "inputs", _are_inputs)
    try:
        return Description(
            config=config_lib.from_dict(settings),
            image_shape=tuple(image_shape),
            num_classes=num_classes,
            num_images=num_images,
            run_id=run_id,
            files=names,
            inputs={
                name: Input(**{**each, "shape": tuple(each["shape"])})
                for name, each in inputs.items()
            },
        )
    except UserError as error:
        raise UserError(
            f"{path}: {error}; use the version of dtrain that wrote it, or "
            "name another run_dir"
        ) from error


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_image_shape(value: Any) -> bool:
    return _is_shape(value) and len(value) == 3


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(
        sealed.is_count(side) and side for side in value
    )


def _are_inputs(value: Any) -> bool:
    """Tells whether a value is what `to_dict` makes of `inputs`."""
    return _is_mapping(value) and all(
        _is_mapping(each)
        and set(each) == set(Input._fields)
        and _is_shape(each["shape"])
        and each["dtype"] in ("float32", "int32")
        and sealed.is_count(each["num_examples"])
        and sealed.is_count(each["num_classes"])
        and isinstance(each["files"], str)
        for each in value.values()
    )


def check(
    description: Description, *, is_chief: bool, is_alone: bool = True
) -> tuple[Description, str]:
    """Checks that the run's directory is of this run, or free for it.

    Every worker calls this. Nothing is written, so that a mistake which is
    found later, such as one in the model, leaves everything as it was.

    Args:
        description: what the run is told now.
        is_chief: whether this worker writes.
        is_alone: whether nobody else can have the state of the run.

    Returns:
        The description with the id of the run that is there; and a note if
        config.json is damaged and a checkpoint has what was in it, otherwise
        empty.

    Raises:
        UserError: the directory belongs to another run, or holds something
            else, or holds no run although `resume` is must. (`resuming` looks
            whether `resume` is never.)
        StorageError: it cannot be read.
    """
    config = description.config
    run_dir = config.run_dir
    with files.storage_errors(run_dir):
        before, note = _read(run_dir, [places.checkpoint_dir(config)])
    if config.resume == "must" and before is None and is_alone:
        raise UserError(
            f"resume (must): {run_dir} holds no run to go on with; name "
            "its directory, or use --resume=auto"
        )
    if before is not None:
        _check_same(description, before, run_dir)
        description = dataclasses.replace(description, run_id=before.run_id)
    # Another worker may find what the chief has just begun to write.
    elif is_chief and files.exists(run_dir):
        _check_empty(run_dir)
    return description, note


def _holds_only(path: str, names: set[str]) -> bool:
    return files.is_directory(path) and set(files.names(path)) <= names


def check_restored(
    description: Description, values: Mapping[str, Any], prefix: str
) -> None:
    """Checks that a checkpoint is of this run.

    It may not be: a backup outlives a run directory that was removed.

    Args:
        description: what the run is told now.
        values: what `to_dict` returned for the run that was saved.
        prefix: of the checkpoint.

    Raises:
        UserError: it is another run's.
    """
    if values:
        directory = os.path.dirname(prefix)
        remedy = (
            f"name another run_dir, or remove {directory} if that run is over"
        )
        try:
            saved = _describe(values, prefix)
        except sealed.DamagedError as error:
            raise UserError(
                f"{prefix} is of no run that can be told ({error}); {remedy}"
            ) from error
        _check_same(description, saved, prefix, remedy)


def _check_same(
    now: Description,
    before: Description,
    where: str,
    remedy: str = "or name another run_dir",
) -> None:
    differences = before.config.differences(now.config)
    for name in ("image_shape", "num_classes", "num_images"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            differences[name] = (old, new)
    for name in sorted({*before.inputs, *now.inputs}):
        old, new = before.inputs.get(name), now.inputs.get(name)
        # Which there are, the flags say.
        if old and new and old != new:
            differences[name] = (old, new)
    if differences:
        listed = config_lib.describe(differences)
        same, preset = "use the same settings", before.config.preset
        if preset != now.config.preset:
            same = f"use --preset={preset}" if preset else "leave out --preset"
            same += ", as it began"
        raise UserError(
            f"{where} belongs to another run: {listed}; {same}, {remedy}"
        )
    if before.files and now.files and before.files != now.files:
        raise UserError(
            f"{where} belongs to another run: the pictures of "
            f"{now.config.dataset}, or their labels, have other names than "
            f"when it began (a digest of {before.files}, now {now.files}); "
            f"bring them back, {remedy}"
        )


def _check_empty(run_dir: str) -> None:
    if not files.is_directory(run_dir):
        raise UserError(f"run_dir ({run_dir}) is a file; name a directory")
    # What a run that was killed at its very start leaves behind, and the job
    # that starts it.
    ours = {"config.json.tmp", ".lock", "lease.json", "launch"}
    names = [
        name
        for name in files.names(run_dir)
        if name not in ours and not _holds_only(f"{run_dir}/{name}", ours)
    ]
    if names:
        raise UserError(
            f"run_dir ({run_dir}) is not empty and holds no run: "
            f"{', '.join(names[:3])}; name another one"
        )


def write(
    description: Description, networks: Mapping[str, keras.Model]
) -> None:
    """Writes what the run is into its directory. The chief calls this.

    A network is described if it can be rebuilt from a description: functional
    ones of any layers, and subclassed ones with `get_config`.

    Args:
        description: what the run is told now, and `check` found to fit.
        networks: those of the run, by name.

    Raises:
        UserError: the directory cannot be written to.
        StorageError: its disk is full, or has failed.
    """
    run_dir = description.config.run_dir
    access.make("run_dir", run_dir)
    try:
        content = {**to_dict(description), "versions": manifest.versions()}
        _write(os.path.join(run_dir, "config.json"), sealed.dumps(content))
        for name, network in networks.items():
            text = _architecture(network)
            if text:
                path = os.path.join(run_dir, f"{name}.json")
                _write(path, f"{text}\n".encode())
    except OSError as error:
        failure = access.refusal("run_dir", run_dir, "written to", error)
        raise failure from error


def _architecture(network: keras.Model) -> str:
    """Returns the layers of a network as JSON; empty if it does not say."""
    try:
        return network.to_json(indent=2)
    except (NotImplementedError, TypeError, ValueError):
        return ""


def to_dict(description: Description) -> dict[str, Any]:
    """Returns what config.json and each manifest say of a run."""
    data: dict[str, Any] = {
        "image_shape": list(description.image_shape),
        "num_classes": description.num_classes,
        "num_images": description.num_images,
    }
    if description.files:
        data["files"] = description.files
    if description.inputs:
        data["inputs"] = {
            name: {**each._asdict(), "shape": list(each.shape)}
            for name, each in description.inputs.items()
        }
    named = {"id": description.run_id} if description.run_id else {}
    return {**named, "config": description.config.to_dict(), "data": data}


def _write(path: str, data: bytes) -> None:
    """Writes a file, unless it is that already."""
    if files.read(path) != data:
        files.write(path, data)
