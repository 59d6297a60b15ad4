"""The embedded data set: 1,797 real 8x8 handwritten digits.

Origin and licence are in README.md.
"""

from __future__ import annotations

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "digits.npz"


def read_file() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads digits.npz.

    Returns:
        Images, uint8 [1797, 8, 8]; labels, uint8 [1797] in [0, 10); and their
        order in the set as TFDS prepares it, which shuffles it by a hash of
        its own: indices, uint16 [1797].
    """
    with np.load(FILE, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"], arrays["order"]


def read() -> tuple[np.ndarray, np.ndarray]:
    """Reads the set in the order in which TFDS prepares it.

    Returns:
        Images, uint8 [1797, 8, 8, 1], and labels, int32 [1797].
    """
    images, labels, order = read_file()
    return images[order, ..., np.newaxis], labels[order].astype(np.int32)
