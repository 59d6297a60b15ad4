"""The embedded data set: 1,797 real 8x8 handwritten digits.

Importing this package registers the builder, so that TFDS finds the set by
its name as it finds its own: `tfds.builder("digits")`.

Examples are {image: uint8 [8, 8, 1], label: int64 in [0, 10)}. Origin and
licence are in README.md.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

_FILE = pathlib.Path(__file__).parent / "digits.npz"


class Digits(tfds.core.GeneratorBasedBuilder):
    """Prepares the digits of digits.npz as any TFDS set is prepared.

    Nothing is downloaded.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "The test part of the UCI set, 0 to 255."
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 grey images of handwritten digits, 8 x 8.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with np.load(_FILE, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image[..., np.newaxis], "label": int(label)}
