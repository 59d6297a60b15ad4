"""What a run is told: one frozen dataclass, one field per flag.

A field of `Config` is the absl flag of the same name, its default, its help
text and the rule its value must keep. The mains define the flags, parse them
and hand a validated `Config` on; nothing else in the package reads a flag.

    parsed = config.parse(sys.argv)         # in a main
    saved = config.from_dict(json_values)   # of run_dir/config.json
    saved.differences(parsed)               # {"seed": (1, 2)}
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain import flags
from dtrain.errors import UserError

RUN = "Run"
DEVICES = "Devices"
DATA = "Data"
MODEL = "Model"
OBJECTIVE = "Objective"
OPTIMIZERS = "Optimizers"
SAVING = "Saving and resuming"
DIVERGENCE = "Divergence"

GROUPS = (
    RUN,
    DEVICES,
    DATA,
    MODEL,
    OBJECTIVE,
    OPTIMIZERS,
    SAVING,
    DIVERGENCE,
)


# As many replicas can share a batch, to the bit.
_ORDERED_MICRO_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run is a function of.

    Two runs of equal `Config` on the same number of replicas end with equal
    bits, however often either was killed.
    """

    run_dir: str = flags.field(
        "runs/default",
        RUN,
        "Directory of the run: its checkpoints, metrics and samples. The same "
        "command with the same directory goes on where the run stopped.",
        may_change=True,
    )
    resume: str = flags.field(
        "auto",
        RUN,
        "auto goes on if the run directory holds a checkpoint and starts "
        "otherwise; never refuses a directory that holds one; must refuses "
        "one that does not.",
        choices=("auto", "never", "must"),
        may_change=True,
    )
    init_from: str = flags.field(
        "",
        RUN,
        "Checkpoint that a new run takes weights from: a path without .index, "
        "or a directory of checkpoints or of a run, whose newest is taken. Not "
        "looked at again when the run goes on.",
        may_change=True,
    )
    init_parts: str = flags.field(
        "networks",
        RUN,
        "What is taken from init_from: generator (with its average), networks "
        "(the discriminator too), or all (both optimizers too).",
        choices=("generator", "networks", "all"),
        may_change=True,
    )
    init_map: str = flags.field(
        "",
        RUN,
        "Names in this run by those in init_from, where they differ, as in "
        "gen=generator,disc=discriminator.",
        may_change=True,
    )
    num_steps: int = flags.field(
        6000,
        RUN,
        "Steps of the whole run, resumed parts included. May be raised later "
        "with --learning_rate_schedule=constant.",
        minimum=1,
        may_change=True,
    )
    batch_size: int = flags.field(
        64, RUN, "Images per step over all replicas.", minimum=1
    )
    seed: int = flags.field(
        0,
        RUN,
        "Seed of the initial weights, the order of the data and the latents.",
        minimum=0,
        below=2**31,
    )
    deterministic: bool = flags.field(
        True,
        RUN,
        "Makes every TensorFlow operation reproducible, so that a resumed run "
        "ends with the bits of an uninterrupted one.",
        may_change=True,
    )
    sample_every_steps: int = flags.field(
        500,
        RUN,
        "Steps between two grids in run_dir/samples; 0 draws only the last.",
        minimum=0,
        may_change=True,
    )

    strategy: str = flags.field(
        "default",
        DEVICES,
        "default: the first device. one_device: the same by OneDeviceStrategy. "
        "mirrored: all GPUs of this machine. multi_worker: all machines that "
        "TF_CONFIG names.",
        choices=("default", "one_device", "mirrored", "multi_worker"),
        may_change=True,
    )
    num_devices: int = flags.field(
        0,
        DEVICES,
        "Devices that this worker uses; 0 is all GPUs, or one CPU. On a "
        "machine without a GPU the CPU is split into this many logical ones.",
        minimum=0,
        below=65,
        may_change=True,
    )
    precision: str = flags.field(
        "float32",
        DEVICES,
        "Type that the networks compute in; their weights stay float32. "
        "mixed_float16 scales the losses; prefer mixed_bfloat16 where the "
        "GPU has it.",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: str = flags.field(
        "auto",
        DEVICES,
        "Compiles the gradients with XLA; auto does so on GPUs.",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    steps_per_loop: int = flags.field(
        50,
        DEVICES,
        "Steps that run on the devices between two looks at the clock, the "
        "signals and the progress line.",
        minimum=1,
        may_change=True,
    )
    start_timeout_secs: float = flags.field(
        600.0,
        DEVICES,
        "With several workers: seconds that each waits for the others to come "
        "before it ends with 76 and names those that have not.",
        minimum=1.0,
        may_change=True,
    )
    micro_batches: int = flags.field(
        0,
        DEVICES,
        "Equal parts of a batch, each with a gradient of its own; more than "
        "the replicas saves memory. 0 is one for each replica, or 8 with "
        "--reduction=ordered, under which it must not change.",
        minimum=0,
        may_change=True,
    )
    reduction: str = flags.field(
        "fast",
        DEVICES,
        "How gradients are added. fast: in the order that the strategy "
        "likes. ordered: in one fixed tree over the micro-batches, so that "
        "the result does not depend, to the bit, on the number of replicas.",
        choices=("fast", "ordered"),
    )

    dataset: str = flags.field(
        "digits",
        DATA,
        "digits (embedded), any TFDS image set as name[:config], "
        "folder:/path (PNG and JPEG, optionally one folder per class), "
        "idx:/path (MNIST's files) or npz:/path.",
    )
    split: str = flags.field("train", DATA, "Split of the data set.")
    data_dir: str = flags.field(
        "",
        DATA,
        "Where TFDS keeps prepared data sets; empty is its own default.",
        may_change=True,
    )
    manual_dir: str = flags.field(
        "",
        DATA,
        "Where you put archives that TFDS cannot download by itself.",
        may_change=True,
    )
    download: bool = flags.field(
        False,
        DATA,
        "Lets TFDS download and prepare the data set if it is not there.",
        may_change=True,
    )
    image_size: int = flags.field(
        0,
        DATA,
        "Crops images to a square and resizes them to this many pixels a "
        "side; 0 keeps the size of the data set.",
        minimum=0,
        below=4097,
    )
    channels: int = flags.field(
        0,
        DATA,
        "Converts images to 1 (grey) or 3 (RGB) channels; 0 keeps them.",
        minimum=0,
        below=4,
    )
    cache_gib: float = flags.field(
        4.0,
        DATA,
        "Keeps the images in memory if they take at most this many GiB; "
        "otherwise each is read when it is needed.",
        minimum=0.0,
        may_change=True,
    )

    model: str = flags.field(
        "dcgan",
        MODEL,
        "dcgan, or your own as package.module:make.",
    )
    latent_size: int = flags.field(
        64, MODEL, "Numbers in the latent vector of an image.", minimum=1
    )
    base_channels: int = flags.field(
        32,
        MODEL,
        "Channels of the networks at the full image size; each halving of "
        "the size doubles them.",
        minimum=1,
    )
    conditional: bool = flags.field(
        False, MODEL, "Conditions both networks on the class labels."
    )
    batch_norm: bool = flags.field(
        False,
        MODEL,
        "Adds BatchNorm over the whole batch to the generator of dcgan.",
    )
    ema_half_life_images: float = flags.field(
        50000.0,
        MODEL,
        "Images after which a weight of the generator counts half in its "
        "moving average, which draws the samples; at most a twentieth of the "
        "images so far.",
        minimum=1.0,
    )

    loss: str = flags.field(
        "non_saturating",
        OBJECTIVE,
        "The adversarial loss.",
        choices=(
            "non_saturating",
            "hinge",
            "wgan_gp",
            "least_squares",
            "relativistic",
        ),
    )
    r1_gamma: float = flags.field(
        0.3,
        OBJECTIVE,
        "Weight of the R1 penalty, on the discriminator's gradient at real "
        "images.",
        minimum=0.0,
    )
    r2_gamma: float = flags.field(
        0.0,
        OBJECTIVE,
        "Weight of the R2 penalty, on the discriminator's gradient at fake "
        "images.",
        minimum=0.0,
    )
    gradient_penalty: float = flags.field(
        10.0, OBJECTIVE, "Weight of wgan_gp's own penalty.", minimum=0.0
    )
    discriminator_steps: int = flags.field(
        1,
        OBJECTIVE,
        "Discriminator updates, each with fresh images, per generator update.",
        minimum=1,
        below=101,
    )

    generator_learning_rate: float = flags.field(
        1e-3, OPTIMIZERS, "Adam's learning rate.", minimum=0.0
    )
    discriminator_learning_rate: float = flags.field(
        1e-3, OPTIMIZERS, "Adam's learning rate.", minimum=0.0
    )
    beta_1: float = flags.field(
        0.5,
        OPTIMIZERS,
        "Adam's decay of the mean gradient.",
        minimum=0.0,
        below=1.0,
    )
    beta_2: float = flags.field(
        0.99,
        OPTIMIZERS,
        "Adam's decay of the mean squared gradient.",
        minimum=0.0,
        below=1.0,
    )
    learning_rate_schedule: str = flags.field(
        "constant",
        OPTIMIZERS,
        "constant, or cosine: falls to zero at --num_steps.",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = flags.field(
        0,
        OPTIMIZERS,
        "Steps over which the learning rates first rise from zero.",
        minimum=0,
    )

    checkpoint_every_steps: int = flags.field(
        1000,
        SAVING,
        "Steps between two checkpoints; 0 saves by the clock alone.",
        minimum=0,
        may_change=True,
    )
    checkpoint_every_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds between two checkpoints; 0 saves by the steps alone.",
        minimum=0.0,
        may_change=True,
    )
    max_to_keep: int = flags.field(
        3,
        SAVING,
        "Newest checkpoints that are kept.",
        minimum=1,
        may_change=True,
    )
    keep_every_n_steps: int = flags.field(
        0,
        SAVING,
        "Also keeps, for ever, each checkpoint whose step is a multiple of "
        "this; 0 keeps none.",
        minimum=0,
        may_change=True,
    )
    keep_doubling_steps: int = flags.field(
        0,
        SAVING,
        "Also keeps, for ever, the checkpoints at this step and at 2, 4, 8 and "
        "so on times as many; 0 keeps none.",
        minimum=0,
        may_change=True,
    )
    keep_every_hours: float = flags.field(
        0.0,
        SAVING,
        "Also keeps, for ever, checkpoints at least this many hours apart; 0 "
        "keeps none.",
        minimum=0.0,
        may_change=True,
    )
    keep_best: int = flags.field(
        0,
        SAVING,
        "Also keeps this many checkpoints with the best --best_metric; 0 keeps "
        "none.",
        minimum=0,
        may_change=True,
    )
    best_metric: str = flags.field(
        "generator_loss",
        SAVING,
        "Metric that --keep_best goes by, as it is called in metrics.jsonl.",
        may_change=True,
    )
    best_mode: str = flags.field(
        "min",
        SAVING,
        "Whether the smallest or the largest --best_metric is the best.",
        choices=("min", "max"),
        may_change=True,
    )
    checkpoint_dir: str = flags.field(
        "",
        SAVING,
        "Where the checkpoints are kept, on a disk or gs://; empty is "
        "run_dir/checkpoints. The chief writes there.",
        may_change=True,
    )
    backup_every_secs: float = flags.field(
        60.0,
        SAVING,
        "Seconds between two backups, from which a killed run goes on; they "
        "are removed when the run is finished. 0 makes none.",
        minimum=0.0,
        may_change=True,
    )

    backup_dir: str = flags.field(
        "",
        SAVING,
        "Fast local directory of each host, where every worker backs up: a "
        "host that is replaced receives the state from another. Empty is "
        "run_dir/backup, by the chief alone.",
        may_change=True,
    )
    verify: str = flags.field(
        "full",
        SAVING,
        "How a checkpoint is checked before it is restored, or an older one "
        "is removed: full sums every tensor, sizes only counts bytes.",
        choices=("full", "sizes"),
        may_change=True,
    )
    on_save_error: str = flags.field(
        "continue",
        SAVING,
        "What to do when a save fails, as on a full disk: continue says so, "
        "trains on and tries again; stop exits with 74. The last save of a "
        "run must succeed.",
        choices=("continue", "stop"),
        may_change=True,
    )
    stop_after_secs: float = flags.field(
        0.0,
        SAVING,
        "Saves and exits with 75 this many seconds after the process was "
        "started; 0 is no limit. The end of a Slurm allocation is known "
        "without it.",
        minimum=0.0,
        may_change=True,
    )
    grace_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds between a notice, such as SIGTERM, and the kill that follows "
        "it: what is not saved by then is left, and the process exits with "
        "75. 0 takes as long as a save takes.",
        minimum=0.0,
        may_change=True,
    )
    hang_timeout_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds without progress after which the process writes the stacks "
        "of all threads to run_dir/stacks and exits with 70; to count from "
        "the end of the first loop of steps on, as 1800 do before. 0 learns "
        "them from the loops after it: ten times the longest pause, and at "
        "least 60.",
        minimum=0.0,
        may_change=True,
    )

    max_rollbacks: int = flags.field(
        10,
        DIVERGENCE,
        "How often a run that diverges goes back to its last good checkpoint "
        "and skips the data that led there; then it stops. A loss or gradient "
        "that is not finite counts, and what the next two say.",
        minimum=0,
        may_change=True,
    )
    spike_factor: float = flags.field(
        100.0,
        DIVERGENCE,
        "A loss this many times over its moving average, and over this "
        "number, has diverged; 0 is never.",
        minimum=0.0,
        may_change=True,
    )
    collapse_steps: int = flags.field(
        1000,
        DIVERGENCE,
        "A network that had no gradient (a norm below 1e-7) for this many "
        "steps in a row has collapsed; 0 is never.",
        minimum=0,
        may_change=True,
    )
    rollback_learning_rate_factor: float = flags.field(
        1.0,
        DIVERGENCE,
        "What both learning rates are multiplied by each time the run goes "
        "back.",
        minimum=0.0,
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name in ("run_dir", "checkpoint_dir", "backup_dir"):
            # To an object store a/b//c is another name than a/b/c.
            path = getattr(self, name)
            object.__setattr__(self, name, path.rstrip("/") or path[:1])
        if self.reduction == "ordered" and not self.micro_batches:
            object.__setattr__(self, "micro_batches", _ORDERED_MICRO_BATCHES)
        flags.check(self)
        _check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as they are written to config.json."""
        return dataclasses.asdict(self)

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Returns the fields that a resumed run may not change.

        Args:
            other: what the run is told now; `self` is what it was told.

        Returns:
            Name of each such field that differs, with the value in `self` and
            in `other`.
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
            if getattr(self, name) != getattr(other, name)
        }


def _check_together(config: Config) -> None:
    """Checks the rules between fields that need no data and no device.

    Raises:
        UserError: two settings contradict each other.
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
    if not config.dataset:
        raise UserError("dataset is empty; try --dataset=digits")
    if config.channels == 2:
        raise UserError("channels (2) must be 1 (grey), 3 (RGB) or 0 (as is)")
    if config.micro_batches and config.batch_size % config.micro_batches:
        raise UserError(
            f"batch_size ({config.batch_size}) must be a multiple of "
            f"micro_batches ({config.micro_batches})"
        )
    if config.warmup_steps >= config.num_steps:
        raise UserError(
            f"warmup_steps ({config.warmup_steps}) must be below num_steps "
            f"({config.num_steps})"
        )
    if config.model != "dcgan" and config.model.count(":") != 1:
        raise UserError(
            f"model ({config.model}) must be dcgan or package.module:make"
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
    if config.strategy in ("default", "one_device") and config.num_devices > 1:
        raise UserError(
            f"num_devices ({config.num_devices}) needs --strategy=mirrored; "
            f"{config.strategy} uses one"
        )


def from_dict(values: Mapping[str, Any]) -> Config:
    """Makes a `Config` of a mapping, such as the one in config.json.

    Args:
        values: fields by name; a field that is missing takes its default.

    Returns:
        The validated `Config`.

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
        exact = type(value) is wanted
        if not exact and not (wanted is float and type(value) is int):
            raise UserError(
                f"{name} ({value!r}) must be of type {wanted.__name__}"
            )
    return Config(**values)


def parse(argv: Sequence[str]) -> Config:
    """Parses a command line into a `Config`.

    Args:
        argv: the command line, the program's name first.

    Returns:
        The validated `Config`.

    Raises:
        UserError: a flag is unknown, malformed, out of its range or
            contradicts another; or something that is no flag is left over.
    """
    values = flags.parse(Config, argv)
    # No shell does it behind an equals sign.
    values["run_dir"] = os.path.expanduser(values["run_dir"])
    return Config(**values)
