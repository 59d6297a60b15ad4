"""`figures.jsonl` in a run's directory: what was measured, and how.

A line is one evaluation of one state of the run:

    {"step": 1000, "checkpoint": "ckpt-1000", "protocol": {...},
     "figures": {"frechet_distance": 12.3, ...}, "floor": {...}, "secs": 3.2}

Only figures of equal protocols may be compared. Of several lines of one step
and one protocol the last one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.storage import files

_NAME = "figures.jsonl"


class Protocol(NamedTuple):
    """How figures were measured.

    Attributes:
        extractor: what made the features.
        digest: of that, hexadecimal.
        num_real: images of the data that were taken.
        num_generated: samples.
        split: of the data.
        resize: what the extractor does with the size of images.
        seed: of the latents, and of which real images were taken.
        weights: average or raw, of the networks that drew.
        data: a digest of the data and of how it is read.
    """

    extractor: str
    digest: str
    num_real: int
    num_generated: int
    split: str
    resize: str
    seed: int
    weights: str
    data: str

    def __str__(self) -> str:
        """Returns a line that goes with the figures."""
        return (
            f"{self.extractor} {self.digest[:12]}, {self.num_generated:,} "
            f"samples (seed {self.seed}, {self.weights} weights) against "
            f"{self.num_real:,} real images of {self.split}, data "
            f"{self.data[:12]}, resize {self.resize}"
        )


class Line(NamedTuple):
    """One evaluation.

    Attributes:
        step: of the run.
        checkpoint: name of the checkpoint; None in the middle of training.
        protocol: how it was measured.
        figures: by name; one that is no number, as NaN, is None.
        floor: of one half of the real images against the other, likewise.
        secs: that it took.
        state: a digest of the networks that drew.
    """

    step: int
    checkpoint: str | None
    protocol: Protocol
    figures: Mapping[str, float | None]
    floor: Mapping[str, float | None]
    secs: float
    state: str = ""


def path(run_dir: str) -> str:
    """Returns where the figures of a run are."""
    return f"{run_dir}/{_NAME}"


def nearest_path(run_dir: str, step: int) -> str:
    """Returns where samples of a step and what is nearest to them are shown."""
    return f"{run_dir}/nearest/step-{step:06}.png"


def read(run_dir: str) -> list[Line]:
    """Reads all lines; what is no such line is left out.

    Args:
        run_dir: on a disk or gs://.

    Raises:
        OSError: the disk or the store failed.
    """
    data = files.read(path(run_dir)) or b""
    lines = [_parse(line) for line in data.splitlines()]
    return [line for line in lines if line is not None]


def _parse(text: bytes) -> Line | None:
    try:
        body: dict[str, Any] = json.loads(text)
        protocol = {"data": "", **body["protocol"]}
        line = Line(
            body["step"],
            body["checkpoint"],
            Protocol(**{name: protocol[name] for name in Protocol._fields}),
            dict(body["figures"]),
            dict(body["floor"]),
            float(body["secs"]),
            str(body.get("state", "")),
        )
        sound = [
            type(line.step) is int and line.step >= 0,
            line.checkpoint is None or isinstance(line.checkpoint, str),
            math.isfinite(line.secs),
            *map(_is_figure, line.figures.values()),
            *map(_is_figure, line.floor.values()),
            *(
                type(value) is type(like)
                for value, like in zip(line.protocol, _LIKE, strict=True)
            ),
        ]
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        *(OverflowError, RecursionError),
    ):
        return None
    return line if all(sound) else None


_LIKE = Protocol("", "", 0, 0, "", "", 0, "", "")


def _is_figure(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def append(run_dir: str, line: Line) -> None:
    """Adds a line; one that a kill has left unfinished ends before it.

    Args:
        run_dir: on a disk or gs://, where the whole file is written again.
        line: what was measured.

    Raises:
        OSError: the disk or the store failed.
    """
    body = {
        **line._asdict(),
        "protocol": line.protocol._asdict(),
        "figures": _finite(line.figures),
        "floor": _finite(line.floor),
        "secs": round(line.secs, 3),
    }
    data = (json.dumps(body) + "\n").encode()
    name = path(run_dir)
    size = files.size(name) or 0
    if size and files.read_part(name, size - 1, 1) != b"\n":
        data = b"\n" + data
    if files.is_remote(name):
        files.write(name, (files.read(name) or b"") + data)
        return
    files.append(name, data)
    files.sync(name)


def _finite(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in figures.items()
    }


def find(
    lines: Sequence[Line],
    step: int,
    protocol: Protocol,
    state: str,
    names: Sequence[str],
) -> Line | None:
    """Finds what was measured before, of the same state in the same way.

    Args:
        lines: of the run.
        step: of the state.
        protocol: how it is to be measured.
        state: digest of the networks that draw.
        names: of the figures.
    """
    for line in reversed(lines):
        is_same = (line.step, line.protocol, line.state) == (
            step,
            protocol,
            state,
        )
        if is_same and set(names) <= set(line.figures):
            return line
    return None
