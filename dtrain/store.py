"""Stores any data set as ArrayRecord, the form that TFDS reads at random.

python -m dtrain.store NAME --dataset=folder:/path --data_dir=DIR
python -m dtrain.main --dataset=NAME --data_dir=DIR
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dtrain import config as config_module
from dtrain import errors, flags
from dtrain.config import DataSettings
from dtrain.errors import UserError
from dtrain.storage import startup

if TYPE_CHECKING:
    from dtrain.data.sources import Source

_PAGE = flags.Page(
    "python -m dtrain.store",
    """\
Stores any data set as ArrayRecord, the form that TFDS reads at random.

    python -m dtrain.store NAME --dataset=folder:/path --data_dir=DIR
    python -m dtrain.main --dataset=NAME --data_dir=DIR

The images are stored in their order, as --image_size and --channels make
them: a run on the copy ends with the bits of a run on the original. Worth it
for many small files, and for images that do not fit in memory.""",
    # It reads a data set by the flags by which a run does.
    DataSettings,
    usage="NAME --data_dir=DIR [--flag=value ...]",
)
_BATCH = 256
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SPLIT = re.compile(r"\w+")


def store(source: Source, name: str, split: str, data_dir: str) -> str:
    """Writes a data set for --dataset=NAME; returns its directory.

    If it is killed, nothing is left that looks like a data set.

    Args:
        source: of the images.
        name: of the new data set: small letters, digits and `_`.
        split: that it will have, as its only one.
        data_dir: directory of data sets that it is put into.

    Raises:
        UserError: the name is not one, there is such a data set already, or
            it cannot be written.
    """
    _check_name(name, data_dir)
    # TensorFlow takes seconds to import, and a wrong command needs none.
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=source.image_shape)
    }
    if source.num_classes:
        features["label"] = tfds.features.ClassLabel(
            num_classes=source.num_classes
        )
    try:
        builder = tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={split: _examples(source)},
            data_dir=data_dir,
            description=f"Stored by dtrain from {source.name}.",
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False
            ),
            disable_shuffling=True,
        )
    except OSError as error:
        raise UserError(
            f"data_dir ({data_dir}) cannot be written to: "
            f"{error.strerror or error}"
        ) from error
    return str(builder.data_dir)


def _check_name(name: str, data_dir: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name ({name}) must be of small letters, digits and _, and start "
            "with a letter"
        )
    if os.path.exists(os.path.join(data_dir, name)):
        raise UserError(
            f"{data_dir} holds a data set {name} already; remove it, or "
            "choose another name"
        )


def _examples(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    import tensorflow as tf

    for start in range(0, source.num_images, _BATCH):
        end = min(start + _BATCH, source.num_images)
        images, labels = source.read(tf.range(start, end, dtype=tf.int64))
        for offset, (image, label) in enumerate(
            zip(images.numpy(), labels.numpy(), strict=True)
        ):
            example = {"image": image}
            if source.num_classes:
                example["label"] = int(label)
            yield start + offset, example


def run(argv: Sequence[str]) -> int:
    """Stores the data set of a command line; returns the exit code.

    Args:
        argv: the command line, the program's name first.

    Raises:
        UserError: the command line is malformed, the data set cannot be read
            or the copy cannot be written.
    """
    if flags.answer(argv[1:], _PAGE.render):
        return errors.FINISHED
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(
            "no name; usage: python -m dtrain.store NAME "
            "--dataset=folder:/path --data_dir=DIR"
        )
    config = config_module.parse([argv[0], *argv[2:]])
    if not config.data_dir:
        raise UserError("data_dir is empty; name a directory for the copy")
    if config.paired or config.unpaired:
        raise UserError(
            f"paired and unpaired ({' '.join(config.paired + config.unpaired)})"
            " are not stored with a data set; store each by itself"
        )
    if not _SPLIT.fullmatch(config.split):
        raise UserError(
            f"split ({config.split}) must be one whole split to be stored"
        )
    startup.import_tensorflow()
    from dtrain.data.sources import open_source

    source = open_source(config)
    if source.stored.is_floating:
        raise UserError(
            f"dataset ({config.dataset}) is of points, and no pictures; keep "
            "them as they are"
        )
    for line in source.files:
        print(line)
    path = store(
        source,
        argv[1],
        config.split,
        flags.expand_home(config.data_dir),
    )
    print(f"stored as {path}")
    return errors.FINISHED


if __name__ == "__main__":
    errors.exit_with(lambda: run(sys.argv))
