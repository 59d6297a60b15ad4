"""The embedded digits as a data set of TFDS, prepared as any other.

Importing this module registers the builder, so that TFDS finds the set by
its name as it finds its own: `tfds.builder("digits")`. It serves parts of the
set, such as `train[:80%]`; for the whole of it a run needs no TFDS.

Examples are {image: uint8 [8, 8, 1], label: int64 in [0, 10)}. Origin and
licence are in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dtrain.data import digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """Prepares the digits of digits.npz; downloads nothing."""

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
        images, labels, _ = digits.read_file()
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image[..., np.newaxis], "label": int(label)}
