"""The grid of real images that a run writes at each start.

What was left out, turned, cropped or taken for another colour is seen there
before hours are spent on it.
"""

from __future__ import annotations

import os

from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.data.sources import Data
from dtrain.record import drawing, images, scatter


def path(run_dir: str) -> str:
    """Returns where the grid is written."""
    return os.path.join(run_dir, "reals.png")


def write(data: Data, config: Config) -> None:
    """Writes the first images of a run, as the run sees them.

    An image that cannot be read is a UserError; that the grid cannot be
    written is a line.

    Args:
        data: all that the run reads.
        config: of the run.
    """
    size = drawing.GRID_SIZE
    number = size * size
    if data.source.image_shape == scatter.SHAPE:
        number = drawing.NUM_POINTS
    number = min(number, data.source.num_images)
    batch = pipeline.first_batch(data, config, number)
    under = drawing.behind(config)
    grid = images.make_grid(batch.images, size, behind=under)
    images.write_or_say(path(config.run_dir), images.encode_png(grid))
