"""What a run is told: one frozen dataclass, one field per flag.

A field of `Config` is the absl flag of the same name, its default, its help
text and the rule its value must keep. The mains define the flags, parse them
and hand a validated `Config` on; nothing else in the package reads a flag.

    parsed = config.parse(sys.argv)         # in a main
    saved = config.from_dict(json_values)   # of run_dir/config.json
    saved.differences(parsed)               # {"seed": (1, 2)}

The fields stand in sections, a class each. A function that needs one section
alone says so by its type, as `optimizers.make` does; it takes any `Config`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain import flags
from dtrain.config import figures, further, presets
from dtrain.config.keeping import DivergenceSettings, SavingSettings
from dtrain.config.learning import (
    MODELS,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ScheduleSettings,
)
from dtrain.config.measuring import EvaluationSettings
from dtrain.config.running import DeviceSettings, RunSettings
from dtrain.errors import UserError

# Options of some kinds of data set, their defaults, and the kinds.
_OF_KINDS = (
    ("labels", "auto", ("folder:", "zip:")),
    ("skip_damaged", False, ("folder:", "zip:")),
    ("array_layout", "hwc", ("npz:",)),
)
# What changes pictures, and no points in the plane.
_OF_PICTURES = (
    *("image_size", "image_width", "image_fit", "background", "channels"),
    *("white_level", "mirror", "augment"),
)
_IN_JSON: Mapping[type, Sequence[type]] = {tuple: (list,), float: (int,)}
# 1, 2, 4 or 8 replicas can then share a batch with the same bits.
_ORDERED_MICRO_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Config(
    # A dataclass takes the fields of its last base first.
    DivergenceSettings,
    EvaluationSettings,
    SavingSettings,
    ScheduleSettings,
    OptimizerSettings,
    ObjectiveSettings,
    ModelSettings,
    DataSettings,
    DeviceSettings,
    RunSettings,
):
    """Everything that a run is a function of, in sections.

    Two runs of equal `Config` on the same number of replicas end with equal
    bits, however often either was killed.
    """

    def __post_init__(self) -> None:
        for name in ("run_dir", "checkpoint_dir", "backup_dir"):
            # To an object store a/b//c is another name than a/b/c.
            path = getattr(self, name)
            object.__setattr__(self, name, path.rstrip("/") or path[:1])
        if self.reduction == "ordered" and not self.micro_batches:
            object.__setattr__(self, "micro_batches", _ORDERED_MICRO_BATCHES)
        flags.check(self)
        _check_init(self)
        _check_evaluation(self)
        _check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as they are written to config.json."""
        return {
            # As JSON has it.
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Returns the values in `self` and `other` by the name of the field.

        Only fields that differ, and that a resumed run may not change, count.

        Args:
            other: what the run is told now; `self` is what it was told.
        """
        fixed = [
            field.name
            for field in dataclasses.fields(self)
            if not field.metadata.get("may_change")
        ]
        if self.learning_rate_schedule != "constant":
            fixed.append("num_steps")
        if self.reduction == "ordered":
            fixed.append("micro_batches")
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in fixed
            # None is not decided yet, and then is what it was.
            if getattr(other, name) not in (None, getattr(self, name))
        }


def _check_init(config: Config) -> None:
    """Refuses what says how a checkpoint is taken, and none is named.

    Raises:
        UserError: there is such an option.
    """
    for name, default in (
        ("init_parts", "networks"),
        ("init_map", ""),
        ("init_new", ""),
    ):
        value = getattr(config, name)
        if value != default and not config.init_from:
            raise UserError(
                f"{name} ({value}) is an option of --init_from; name a "
                "checkpoint there, or leave it out"
            )


def _check_evaluation(config: Config) -> None:
    """Checks what is measured as the run goes, and is kept by that.

    Raises:
        UserError: nothing is measured that is asked for, or not where
            checkpoints are saved.
    """
    figures.chosen("evaluate_figures", config.evaluate_figures)
    every_steps, metric = config.evaluate_every_steps, config.best_metric
    if not every_steps:
        for field in dataclasses.fields(EvaluationSettings):
            value = getattr(config, field.name)
            if value != field.default:
                raise UserError(
                    f"{field.name} ({value}) needs --evaluate_every_steps"
                )
    if not config.keep_best or metric not in figures.FIGURES:
        return
    if not every_steps:
        raise UserError(
            f"best_metric ({metric}) is measured by --evaluate_every_steps; "
            "give it, or name a loss"
        )
    saved = config.checkpoint_every_steps
    if not saved or every_steps % saved:
        raise UserError(
            f"evaluate_every_steps ({every_steps}) must be a multiple of "
            f"checkpoint_every_steps ({saved}), for --keep_best to keep what "
            f"{metric} was measured of"
        )


def _check_augmentation(config: ObjectiveSettings) -> None:
    """Checks that what is said of the changes of images has an effect.

    Raises:
        UserError: it has none.
    """
    fields = {
        field.name: field for field in dataclasses.fields(ObjectiveSettings)
    }
    names = ("augment_probability", "augment_target", "augment_ramp_images")
    given = [
        name for name in names if getattr(config, name) != fields[name].default
    ]
    if given and config.augment != "ada":
        raise UserError(
            f"{given[0]} ({getattr(config, given[0])}) is an option of "
            "--augment=ada; give that, or leave it out"
        )
    if len(given) > 1 and config.augment_probability:
        raise UserError(
            f"{given[1]} ({getattr(config, given[1])}) is of a probability "
            "that follows the discriminator, and --augment_probability fixes "
            "it; leave out one of them"
        )


def _check_schedules(config: ScheduleSettings) -> None:
    """Checks that an end of a schedule has a schedule.

    Raises:
        UserError: it has none.
    """
    for field in dataclasses.fields(ScheduleSettings):
        value = getattr(config, field.name)
        if value != field.default and not config.burn_in_images:
            raise UserError(
                f"{field.name} ({value}) needs --burn_in_images, the images "
                "over which it is reached"
            )


def _check_data(config: DataSettings) -> None:
    """Checks what is said of the form of the images.

    Raises:
        UserError: no image can have it, or a further data set is malformed.
    """
    if config.channels == 2:
        raise UserError(
            "channels (2) must be 1 (grey), 3 (RGB), 4 (RGB and alpha) or 0 "
            "(as is)"
        )
    for name, default in (("image_width", 0), ("image_fit", "crop")):
        value = getattr(config, name)
        if value != default and not config.image_size:
            raise UserError(
                f"{name} ({value}) needs --image_size, the height in pixels"
            )
    datasets = further.datasets(config)
    for name, default, kinds in _OF_KINDS:
        value = getattr(config, name)
        applies = any(dataset.startswith(kinds) for dataset in datasets)
        if value != default and not applies:
            raise UserError(
                f"{name} ({value}) is an option of --dataset="
                f"{'/path or '.join(kinds)}/path; leave it out"
            )
    if not re.fullmatch("[0-9a-fA-F]{6}", config.background):
        raise UserError(
            f"background ({config.background}) must be a colour as RRGGBB, "
            "such as ffffff or 000000"
        )


def _check_points(config: Config) -> None:
    """Refuses what changes pictures where there are points.

    Raises:
        UserError: it was given.
    """
    if not config.dataset.startswith("points:"):
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _OF_PICTURES and value != field.default:
            raise UserError(
                f"{field.name} ({value}) changes pictures, and "
                f"{config.dataset} is of points; leave it out"
            )


def _check_names(config: Config) -> None:
    """Checks what names a directory, a tracker, data or a model.

    Raises:
        UserError: a name is missing, or none of that kind.
    """
    if not config.run_dir:
        raise UserError("run_dir is empty; name a directory for the run")
    if config.checkpoint_dir and os.path.abspath(
        config.checkpoint_dir
    ) == os.path.abspath(config.run_dir):
        raise UserError(
            f"checkpoint_dir ({config.checkpoint_dir}) must not be the run_dir "
            "itself; leave it out, or name another directory"
        )
    if config.track and not re.fullmatch(r"mlflow:\S+", config.track):
        raise UserError(
            f"track ({config.track}) must be mlflow:URI, such as "
            "mlflow:http://localhost:5000"
        )
    if not config.dataset:
        raise UserError("dataset is empty; try --dataset=digits")
    if config.model not in MODELS and config.model.count(":") != 1:
        raise UserError(
            f"model ({config.model}) must be {', '.join(MODELS)} or "
            "package.module:make"
        )


def _check_together(config: Config) -> None:
    """Checks the rules between settings that need no data and no device.

    Raises:
        UserError: two settings contradict each other, or a name is missing.
    """
    _check_names(config)
    _check_points(config)
    _check_data(config)
    batch_size = config.batch_size or 0
    if config.micro_batches and batch_size % config.micro_batches:
        raise UserError(
            f"batch_size ({config.batch_size}) must be a multiple of "
            f"micro_batches ({config.micro_batches})"
        )
    if config.warmup_steps >= config.num_steps:
        raise UserError(
            f"warmup_steps ({config.warmup_steps}) must be below num_steps "
            f"({config.num_steps})"
        )
    if config.batch_norm and config.model != "dcgan":
        raise UserError(
            "batch_norm is an option of --model=dcgan; build it into "
            f"{config.model} instead"
        )
    if config.loss != "wgan_gp" and config.gradient_penalty != 10.0:
        raise UserError(
            f"gradient_penalty ({config.gradient_penalty}) is an option of "
            f"--loss=wgan_gp; with --loss={config.loss} use r1_gamma or "
            "r2_gamma"
        )
    _check_augmentation(config)
    _check_schedules(config)
    if config.xla_cache_dir and config.jit_compile == "off":
        raise UserError(
            f"xla_cache_dir ({config.xla_cache_dir}) keeps nothing with "
            "--jit_compile=off; leave out one of them"
        )
    if config.strategy in ("default", "one_device") and config.num_devices > 1:
        raise UserError(
            f"num_devices ({config.num_devices}) needs --strategy=mirrored; "
            f"{config.strategy} uses one"
        )


def from_dict(values: Mapping[str, Any]) -> Config:
    """Makes a `Config` of fields by name; a missing one takes its default.

    Raises:
        UserError: a name is not a field's, or a value is of another type or
            breaks its rule.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(
                f"{name} is not a setting of this version of dtrain"
            )
        wanted = type(fields[name].default)
        # JSON has neither tuples nor, at times, floats.
        known = {wanted, *_IN_JSON.get(wanted, ())}
        if type(value) not in known or not _are_texts(value):
            raise UserError(
                f"{name} ({value!r}) must be of type {wanted.__name__}"
            )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    }
    return Config(**given)


def _are_texts(value: Any) -> bool:
    """Tells whether a list holds texts alone, as that of a flag does."""
    return not isinstance(value, (list, tuple)) or all(
        isinstance(each, str) for each in value
    )


def parse(argv: Sequence[str]) -> Config:
    """Parses a command line into a `Config`.

    Raises:
        UserError: a flag is unknown, malformed, out of its range or
            contradicts another; or something that is no flag is left over.
    """
    values = flags.parse(Config, argv)
    preset = presets.of(values["preset"])
    if preset.settings:
        # Once more, for a flag that is given wins, if it is the default, too.
        others = {**preset.settings, **dict.fromkeys(preset.decided)}
        given = values["model_flag"]
        values = flags.parse(Config, argv, others)
        names = {text.partition("=")[0] for text in given}
        of_preset = preset.settings.get("model_flag", ())
        if values["model"] != preset.settings.get("model"):
            of_preset = ()
        values["model_flag"] = given + tuple(
            text for text in of_preset if text.partition("=")[0] not in names
        )
    for name in ("run_dir", "checkpoint_dir", "backup_dir", "xla_cache_dir"):
        values[name] = flags.expand_home(values[name])
    return Config(**values)


def undecided(config: Config) -> list[str]:
    """Names what a preset leaves open until data and devices are known."""
    return [
        name
        for name in presets.of(config.preset).decided
        if getattr(config, name) is None
    ]


def describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Lists what is another value now, for one line of an error.

    Args:
        differences: what `Config.differences` returned.
    """
    return ", ".join(
        f"{name} was {_shown(old)} and is now {_shown(new)}"
        for name, (old, new) in differences.items()
    )


def _shown(value: Any) -> Any:
    """Returns what a flag that may be given several times was given."""
    if type(value) is tuple and _are_texts(value):
        return " ".join(value) or "nothing"
    return value
