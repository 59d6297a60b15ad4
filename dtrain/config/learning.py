"""Settings of what is learned: data, networks, objective, optimizers."""

from __future__ import annotations

import dataclasses

from dtrain import flags
from dtrain.config import presets

_data, _model = flags.fields_of("Data"), flags.fields_of("Model")
_objective = flags.fields_of("Objective")
_optimizers = flags.fields_of("Optimizers")
_schedules = flags.fields_of("Schedules")

# Here, for --help does not wait for TensorFlow; `gan.loading` has the rest.
MODELS = (
    "dcgan",
    "sngan",
    "biggan_small",
    "stylegan2",
    "r3gan",
    "mlp",
    "pix2pix",
    "cyclegan",
)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which images are learned from, and in which form."""

    dataset: str = _data(
        "digits",
        "digits (embedded), any TFDS image set as name[:config], "
        "folder:/path or zip:/path (pictures, optionally one folder per "
        "class), idx:/path (MNIST's files), npz:/path, or points:grid, "
        "points:ring and points:/path.npz (points in the plane). "
        "npz:/path.npz#array and name@split#feature name a part of a set.",
    )
    paired: tuple[str, ...] = _data(
        (),
        "NAME=DATASET, read beside the images as example.inputs[NAME], one "
        "for each: pictures of the same file names, or an array or a feature "
        "of the same length. NAME=map:DATASET is of label maps, whose numbers "
        "stay.",
    )
    unpaired: tuple[str, ...] = _data(
        (),
        "NAME=DATASET, read beside the images in an order and of a length of "
        "its own; its labels are NAME_labels.",
    )
    split: str = _data("train", "Split of the data set.")
    data_dir: str = _data(
        "",
        "Where TFDS keeps prepared data sets; empty is its own default.",
        may_change=True,
    )
    manual_dir: str = _data(
        "",
        "Where you put archives that TFDS cannot download by itself.",
        may_change=True,
    )
    download: bool = _data(
        False,
        "Lets TFDS download and prepare the data set if it is not there.",
        may_change=True,
    )
    labels: str = _data(
        "auto",
        "Labels of a folder or an archive: auto (its dataset.json, or else "
        "its folders), folders, none, or a CSV or JSON file of a label for "
        "each picture.",
    )
    skip_damaged: bool = _data(
        False,
        "Trains on the rest where pictures are damaged; reads all of them at "
        "each start to know which.",
        may_change=True,
    )
    image_size: int = _data(
        0,
        "Pixels a side that images are cropped and resized to; 0 keeps the "
        "size of the data set.",
        minimum=0,
        below=4097,
    )
    image_width: int = _data(
        0,
        "Pixels from left to right where images are not square; --image_size "
        "is then their height.",
        minimum=0,
        below=4097,
    )
    image_fit: str = _data(
        "crop",
        "What is done with images of other proportions: crop cuts their "
        "edges off, pad puts borders around them.",
        choices=("crop", "pad"),
    )
    background: str = _data(
        "ffffff",
        "Colour, as RRGGBB, behind what is transparent, and of borders.",
    )
    channels: int = _data(
        0,
        "Converts images to 1 (grey), 3 (RGB) or 4 (RGB and alpha) channels; "
        "0 keeps them, but puts transparent pictures on the background.",
        minimum=0,
        below=5,
    )
    white_level: int = _data(
        0,
        "The value that is white in images of 16 bits; 0 looks at 64 of them "
        "for the smallest of 255, 511, 1023, ..., 65535 that none exceeds.",
        minimum=0,
        below=65536,
    )
    array_layout: str = _data(
        "hwc",
        "Order of the sides of an npz file's images: height, width, channels, "
        "or channels first.",
        choices=("hwc", "chw"),
    )
    mirror: bool = _data(
        False,
        "Shows half of the images mirrored, each time others, by the seed.",
    )
    cache_gib: float = _data(
        4.0,
        "Keeps the images in memory if they take at most this many GiB, with "
        "those of paired and unpaired; otherwise each is read when needed.",
        minimum=0.0,
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which networks, and how large."""

    preset: str = _model(
        "",
        "A recipe: puts other defaults for networks, losses, optimizers and "
        "schedules, which flags that are given override. docs/presets.md has "
        "them, --dry_run prints what results.",
        choices=("", *presets.PRESETS),
        may_change=True,
    )
    model: str = _model(
        "dcgan", f"{', '.join(MODELS)}, or your own as package.module:make."
    )
    model_flag: tuple[str, ...] = _model(
        (),
        "NAME=VALUE, an argument of your own make beyond the three that it is "
        "always given.",
    )
    latent_size: int = _model(
        64,
        "Numbers in the latent vector of an image.",
        minimum=1,
        below=2**31,
    )
    base_channels: int = _model(
        32,
        "Channels of the networks at the full image size; each halving of "
        "the size doubles them.",
        minimum=1,
        below=2**31,
    )
    conditional: bool = _model(
        False, "Conditions both networks on the class labels."
    )
    batch_norm: bool = _model(
        False, "Adds BatchNorm over the whole batch to the generator of dcgan."
    )
    frozen_layers: str = _model(
        "",
        "Layers that stay as they are, as NETWORK/LAYER with commas between "
        "them; --dry_run prints their names, * is any. With --init_from of a "
        "run on other pictures, as in discriminator/from_image*.",
    )
    ema_half_life_images: float = _model(
        50000.0,
        "Images after which a weight of the generator counts half in its "
        "moving average, which draws the samples; at most a twentieth of the "
        "images so far.",
        minimum=1.0,
    )


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What the networks are trained for."""

    loss: str = _objective(
        "non_saturating",
        "The adversarial loss.",
        choices=(
            "non_saturating",
            "hinge",
            "wgan_gp",
            "least_squares",
            "relativistic",
        ),
    )
    r1_gamma: float = _objective(
        0.3,
        "Weight of the R1 penalty, on the discriminator's gradient at real "
        "images.",
        minimum=0.0,
    )
    r2_gamma: float = _objective(
        0.0,
        "Weight of the R2 penalty, on the discriminator's gradient at fake "
        "images.",
        minimum=0.0,
    )
    gradient_penalty: float = _objective(
        10.0, "Weight of wgan_gp's own penalty.", minimum=0.0
    )
    augment: str = _objective(
        "none",
        "How images are changed before the discriminator sees them, real and "
        "fake ones alike, where there are few: diff (DiffAugment) or ada "
        "(adaptive augmentation).",
        choices=("none", "diff", "ada"),
    )
    augment_probability: float = _objective(
        0.0,
        "Chance of each change of ada.",
        shown="it follows the discriminator",
        minimum=0.0,
        below=1.0,
    )
    augment_target: float = _objective(
        0.6,
        "Mean sign of the logits of real images that ada holds by its "
        "probability.",
        minimum=-1.0,
        below=1.0,
    )
    augment_ramp_images: float = _objective(
        500_000.0,
        "Images over which ada's probability can go from 0 to 1.",
        minimum=1.0,
    )
    discriminator_steps: int = _objective(
        1,
        "Discriminator updates, each with fresh images, per generator update.",
        minimum=1,
        below=101,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How the weights follow the gradients."""

    generator_learning_rate: float = _optimizers(
        1e-3, "Adam's learning rate.", minimum=0.0
    )
    discriminator_learning_rate: float = _optimizers(
        1e-3, "Adam's learning rate.", minimum=0.0
    )
    beta_1: float = _optimizers(
        0.5, "Adam's decay of the mean gradient.", minimum=0.0, below=1.0
    )
    beta_2: float = _optimizers(
        0.99,
        "Adam's decay of the mean squared gradient.",
        minimum=0.0,
        below=1.0,
    )
    learning_rate_schedule: str = _optimizers(
        "constant",
        "constant, or cosine: falls to zero at --num_steps.",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = _optimizers(
        0,
        "Steps over which the learning rates first rise from zero.",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """What changes with the images that were seen, from a value to another."""

    burn_in_images: float = _schedules(
        0.0,
        "Images over which what begins with end_ goes from the first value to "
        "its last, along half a cosine; the average's half-life, and a fixed "
        "--augment_probability, rise from 0 likewise. 0 leaves all as it is.",
        minimum=0.0,
    )
    end_learning_rate_factor: float = _schedules(
        1.0, "Of both learning rates.", minimum=0.0
    )
    end_gamma_factor: float = _schedules(
        1.0, "Of the weights of R1 and R2.", minimum=0.0
    )
    end_beta_2: float = _schedules(
        0.0, "Of Adam.", shown="--beta_2", minimum=0.0, below=1.0
    )
