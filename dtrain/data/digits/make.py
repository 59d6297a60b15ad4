"""Makes digits.npz from the copy of the set that scikit-learn ships.

    pip install scikit-learn==1.9.1
    python -m dtrain.data.digits.make

The file has the same bytes each time; README.md beside it tells where the
images come from and under which licence. scikit-learn is needed here only,
never to train. The order of TFDS, which the file holds too, is taken from the
old file: it follows from the number of images alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from dtrain.data.digits import FILE, read_file


def to_arrays(digits: Any) -> dict[str, np.ndarray]:
    """Converts what `sklearn.datasets.load_digits` returns.

    Args:
        digits: has `images`, float64 [n, 8, 8] of whole numbers from 0 (paper)
            to 16 (ink), and `target`, int64 [n] in [0, 10).

    Returns:
        `images`, uint8 [n, 8, 8] in [0, 255], and `labels`, uint8 [n].
    """
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {"images": images, "labels": digits.target.astype(np.uint8)}


def main() -> None:
    """Writes digits.npz beside this file."""
    datasets = importlib.import_module("sklearn.datasets")
    arrays = to_arrays(datasets.load_digits())
    *_, order = read_file()
    np.savez_compressed(
        FILE, images=arrays["images"], labels=arrays["labels"], order=order
    )
    print(f"wrote {FILE} ({FILE.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
