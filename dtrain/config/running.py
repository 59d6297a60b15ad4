"""Settings of a run as a whole, and of the devices that it runs on."""

from __future__ import annotations

import dataclasses

from dtrain import flags

_run, _devices = flags.fields_of("Run"), flags.fields_of("Devices")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What a run is called, how long it is, and where it starts."""

    run_dir: str = _run(
        "runs/default",
        "Directory of the run: its checkpoints, metrics and samples. The same "
        "command with the same directory goes on where the run stopped.",
        may_change=True,
    )
    resume: str = _run(
        "auto",
        "auto goes on if the run directory holds a checkpoint and starts "
        "otherwise; never refuses a directory that holds one; must refuses "
        "one that does not.",
        choices=("auto", "never", "must"),
        may_change=True,
    )
    init_from: str = _run(
        "",
        "Checkpoint that a new run takes weights from: a path without .index, "
        "a directory of checkpoints or of a run, whose newest is taken, or "
        "RUN_DIR/best. Not looked at again when the run goes on.",
        may_change=True,
    )
    init_parts: str = _run(
        "networks",
        "What is taken from init_from: generator (what is averaged, with its "
        "average), networks (all of them), or all (optimizers too).",
        choices=("generator", "networks", "all"),
        may_change=True,
    )
    init_map: str = _run(
        "",
        "Names in this run by those in init_from, where they differ, as in "
        "gen=generator,disc=discriminator.",
        may_change=True,
    )
    init_new: str = _run(
        "",
        "Blocks of this run that init_from does not have, which begin as they "
        "are made, as in generator/block_64,discriminator/block_64*.",
        may_change=True,
    )
    dry_run: bool = _run(
        False,
        "Builds all of it, prints what would be trained, in how much memory, "
        "from which state and where it would be saved, and writes nothing.",
        may_change=True,
    )
    num_steps: int = _run(
        6000,
        "Steps of the whole run, resumed parts included. May be raised later "
        "with --learning_rate_schedule=constant.",
        minimum=1,
        may_change=True,
    )
    batch_size: int = _run(
        64, "Images per step over all replicas.", minimum=1, below=2**31
    )
    seed: int = _run(
        0,
        "Seed of the initial weights, the order of the data and the latents.",
        minimum=0,
        below=2**31,
    )
    deterministic: bool = _run(
        True,
        "Makes every TensorFlow operation reproducible, so that a resumed run "
        "ends with the bits of an uninterrupted one.",
        may_change=True,
    )
    track: str = _run(
        "",
        "mlflow:URI also sends metrics, figures and settings to a server of "
        "MLflow, as mlflow:http://localhost:5000; see docs/tracking.md.",
        may_change=True,
    )
    sample_every_steps: int = _run(
        500,
        "Steps between two grids in run_dir/samples; 0 draws only the last.",
        minimum=0,
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
    """On which devices a step is computed, and how it is added up."""

    strategy: str = _devices(
        "default",
        "default: the first device. one_device: the same by OneDeviceStrategy. "
        "mirrored: all GPUs of this machine. multi_worker: all machines that "
        "TF_CONFIG names.",
        choices=("default", "one_device", "mirrored", "multi_worker"),
        may_change=True,
    )
    num_devices: int = _devices(
        0,
        "Devices that this worker uses; 0 is all GPUs, or one CPU. On a "
        "machine without a GPU the CPU is split into this many logical ones.",
        minimum=0,
        below=65,
        may_change=True,
    )
    precision: str = _devices(
        "float32",
        "Type that the networks compute in; their weights stay float32. "
        "mixed_float16 scales the losses; prefer mixed_bfloat16 where the "
        "GPU has it.",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: str = _devices(
        "auto",
        "Compiles the gradients with XLA; auto does so on GPUs.",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    xla_cache_dir: str = _devices(
        "",
        "Directory on a disk of each machine where XLA keeps what it has "
        "compiled, so that a run that comes back need not compile it again; "
        "empty keeps nothing.",
        may_change=True,
    )
    steps_per_loop: int = _devices(
        50,
        "Steps that run on the devices between two looks at the clock, the "
        "signals and the progress line.",
        minimum=1,
        may_change=True,
    )
    start_timeout_secs: float = _devices(
        600.0,
        "With several workers: seconds that each waits for the others to come "
        "before it ends with 76 and names those that have not.",
        minimum=1.0,
        may_change=True,
    )
    micro_batches: int = _devices(
        0,
        "Equal parts of a batch, each with a gradient of its own; more than "
        "the replicas saves memory. 0 is one for each replica, or 8 with "
        "--reduction=ordered, under which it must not change.",
        minimum=0,
        may_change=True,
    )
    reduction: str = _devices(
        "fast",
        "How gradients are added. fast: in the order that the strategy "
        "likes. ordered: in one fixed tree over the micro-batches, so that "
        "the result does not depend, to the bit, on the number of replicas.",
        choices=("fast", "ordered"),
    )
