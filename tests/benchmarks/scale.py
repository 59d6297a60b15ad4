"""Computes what machines would do that are not here, and checks what it can.

    python -m tests.benchmarks.scale [--write] [--NAME=VALUE ...] [PART ...]

The parts are `steps` (what a step costs on 1 to 256 GPUs), `saves` (how often
to save), `week` (the goodput of a job that loses nodes, simulated; `--seed`),
`defaults` (what to begin with on which device) and `here` (one and two workers
on this machine, predicted and measured, in two minutes). Nothing but the last
is measured: what they take for granted is `machines.Inputs`, printed above the
tables, and each is a flag. Operations and gradients are counted in the traced
steps, as for docs/gpus.md. `--write` puts the tables into docs/speed.md; `week`
draws docs/scale.png.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dtrain import config as config_lib
from dtrain import errors, flags
from tests import runs
from tests.benchmarks import cost, defaults, loopback, machines, pages, week
from tests.benchmarks.machines import Inputs

# Presets, and pixels.
MODELS = (("dcgan", 64), ("auto", 256), ("r3gan", 256))
# Whose all-reduce, and whose saves, have tables of their own.
OF_ALL = ("auto", 256)
GPUS = (2, 8, 16, 64, 256)
NODES = (1, 8, 64, 256, 1000)
PAGE = runs.ROOT / "docs/speed.md"
# Of docs/checkpoints.md: --backup_every_secs.
DEFAULT_SECS = 60.0

CURVES = runs.ROOT / "docs/scale.png"
INTERVALS = [15.0 * 2**power for power in range(11)]
# Of a replica in a step: one GPU with the batch of eight.
_IMAGES = 64
_WEEKS = 3
_ROUNDS = 9

Cells = Iterable[object]


# By nodes, and whether there are spares.
Curves: TypeAlias = "dict[tuple[int, bool], list[Mean]]"


class Table(NamedTuple):
    """One of the page.

    Attributes:
        name: of its place there, behind `scale_`.
        head: titles of the columns.
        rows: the cells of each row.
        picture: a PNG file that shows the same; empty if there is none.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Cells]
    picture: bytes = b""

    def lines(self) -> list[str]:
        """Returns it in Markdown."""
        rows = [self.head, ["---"] * len(self.head), *self.rows]
        return [f"| {' | '.join(map(str, row))} |" for row in rows]


def inputs_table(inputs: Inputs) -> Table:
    """Lists what is taken for granted."""
    rows = [
        [
            f"`{each.name}`",
            f"{getattr(inputs, each.name):.4g}",
            each.metadata["help"],
        ]
        for each in dataclasses.fields(inputs)
    ]
    return Table("inputs", ["input", "value", "what it is"], rows)


def secs_text(secs: float) -> str:
    """Writes a duration in the unit that suits it."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if secs >= unit:
            return f"{secs / unit:.3g} {name}"
    return f"{1000 * secs:.3g} ms"


def steps(inputs: Inputs) -> list[Table]:
    """Makes the tables of all-reduces and of steps."""
    counted = {model: cost.of_preset(*model) for model in MODELS}
    return [
        all_reduces(counted[OF_ALL].gradients * inputs.gradient_bytes, inputs),
        steps_of(counted, inputs),
    ]


def all_reduces(num_bytes: float, inputs: Inputs) -> Table:
    """Makes the table of an all-reduce, over links and algorithms."""
    links, per_node = machines.links(inputs), inputs.gpus_per_node
    nvlink, pcie, ethernet = links.values()
    ways: dict[str, Callable[[int], float]] = {}
    for name, link in links.items():
        for algorithm in (machines.ring, machines.tree):
            where = " between nodes of one GPU" if link is ethernet else ""
            ways[f"{name}{where}, {algorithm.__name__}"] = (
                lambda gpus, algorithm=algorithm, link=link: algorithm(
                    num_bytes, gpus, link
                )
            )
    for name, inner, algorithm in (
        ("NVLink and Ethernet, one ring", nvlink, machines.flat_ring),
        ("NVLink and Ethernet, in the node first", nvlink, None),
        ("PCIe and Ethernet, in the node first", pcie, None),
    ):
        ways[name] = lambda gpus, inner=inner, algorithm=algorithm: (
            algorithm or machines.across_nodes
        )(num_bytes, gpus, inner, ethernet, per_node)
    rows = []
    for name, way in ways.items():
        most = per_node if name.startswith(("NVLink,", "PCIe,")) else max(GPUS)
        cells = (secs_text(way(n)) if n <= most else "" for n in GPUS)
        rows.append([name, *cells])
    return Table("all_reduces", ["", *(f"{n} GPUs" for n in GPUS)], rows)


def steps_of(
    counted: Mapping[tuple[str, int], cost.Cost], inputs: Inputs
) -> Table:
    """Makes the table of steps: their time, and what of it is computing."""
    links = machines.links(inputs)
    share = inputs.share or cost.share_of_best()
    rows = []
    for (name, side), found in counted.items():
        compute = found.operations * inputs.replica_batch_size
        compute /= inputs.peak * share
        for inner in ("NVLink", "PCIe"):
            cells = []
            for gpus in GPUS:
                secs = machines.step_secs(
                    compute,
                    travel_secs(found, gpus, links, inner, inputs),
                    inputs.overlap,
                )
                cells.append(f"{secs_text(secs)}, {compute / secs:.2f}")
            row = [f"{name}, {side}", inner, secs_text(compute), *cells]
            rows.append(row)
    head = ["preset, pixels", "in a node", "one GPU"]
    return Table("steps", head + [f"{n} GPUs" for n in GPUS], rows)


def travel_secs(
    found: cost.Cost,
    gpus: int,
    links: Mapping[str, machines.Link],
    inner: str,
    inputs: Inputs,
) -> float:
    """Returns what the all-reduces of a step take.

    Args:
        found: what the step has.
        gpus: of all nodes.
        links: of `machines.links`.
        inner: which of them is inside a node.
        inputs: all else.
    """

    def secs(num_bytes: float) -> float:
        return machines.across_nodes(
            num_bytes,
            gpus,
            links[inner],
            links["Ethernet"],
            inputs.gpus_per_node,
        )

    # Each has its messages, and all of them together the bytes.
    return secs(found.gradients * inputs.gradient_bytes) + secs(0) * (
        found.all_reduces - 1
    )


def saves(inputs: Inputs) -> list[Table]:
    """Makes the table of the best intervals of saving."""
    save = inputs.save(cost.of_preset(*OF_ALL).parameters)
    rows = []
    for nodes in NODES:
        mean_secs = inputs.mean_secs(nodes)
        daly = machines.daly(save.cost, mean_secs)
        cells = [f"{nodes:,}", secs_text(mean_secs)]
        cells += [secs_text(machines.young(save.cost, mean_secs))]
        cells += [secs_text(daly)]
        for share in (1.0, inputs.spare_share):
            for interval in (DEFAULT_SECS, daly):
                # What is written when it strikes is not there yet.
                restart = share * inputs.restart_secs + save.write
                good = machines.goodput(interval, save.cost, restart, mean_secs)
                cells.append(f"{good:.3f}")
        rows.append(cells)
    head = ["nodes", "a loss each", "best: Young", "Daly"]
    head += [f"goodput, {DEFAULT_SECS:.0f} s", "Daly"]
    head += [f"with a spare, {DEFAULT_SECS:.0f} s", "Daly"]
    print(
        f"a save of {OF_ALL}: {save.write:.1f} s to write, "
        f"{save.cost:.2f} s of training lost",
        flush=True,
    )
    return [Table("saves", head, rows)]


def weeks(inputs: Inputs) -> list[Table]:
    """Makes the table of simulated weeks, and draws them."""
    save = inputs.save(cost.of_preset(*OF_ALL).parameters)
    rows, curves = [], {}
    for nodes in NODES:
        drawn = [
            week.losses(inputs, nodes, inputs.seed + number)
            for number in range(_WEEKS)
        ]
        for has_spare in (False, True):
            curves[nodes, has_spare] = [
                mean_of_weeks(
                    week.Plan(inputs, save, interval, nodes, has_spare), drawn
                )
                for interval in INTERVALS
            ]
        rows.append(_row_of_weeks(nodes, drawn, save, curves, inputs))
    head = ["nodes", "lost in a week", "Young", "best of the simulated"]
    head += [f"goodput, {DEFAULT_SECS:.0f} s", "best"]
    head += [f"with a spare, {DEFAULT_SECS:.0f} s", "best"]
    head.append("gives up from")
    return [Table("week", head, rows, draw(curves, save, inputs))]


class Mean(NamedTuple):
    """Of several simulated weeks.

    Attributes:
        goodput: over them all, also of those that ended early.
        num_ended: those that a supervisor or the scheduler gave up.
    """

    goodput: float
    num_ended: int


def mean_of_weeks(
    plan: week.Plan, drawn: Sequence[Sequence[week.Loss]]
) -> Mean:
    """Simulates a job, and takes the mean.

    Args:
        plan: what the job is like.
        drawn: what it loses, for each week.
    """
    outcomes = [week.Job(plan, lost).run() for lost in drawn]
    return Mean(
        statistics.fmean(each.goodput for each in outcomes),
        sum(each.code is not None for each in outcomes),
    )


def _row_of_weeks(
    nodes: int,
    drawn: Sequence[Sequence[week.Loss]],
    save: machines.Save,
    curves: Curves,
    inputs: Inputs,
) -> list[str]:
    """Returns the cells of a number of nodes."""
    means = curves[nodes, False]
    best = max(range(len(means)), key=lambda place: means[place].goodput)
    ended = [
        secs_text(interval)
        for interval, mean in zip(INTERVALS, means, strict=True)
        if mean.num_ended
    ]
    goodputs = [
        f"{each:.3f}"
        for way in (False, True)
        for each in (
            curves[nodes, way][INTERVALS.index(DEFAULT_SECS)].goodput,
            max(mean.goodput for mean in curves[nodes, way]),
        )
    ]
    return [
        f"{nodes:,}",
        f"{statistics.fmean(map(len, drawn)):.3g}",
        secs_text(machines.young(save.cost, inputs.mean_secs(nodes))),
        secs_text(INTERVALS[best]),
        *goodputs,
        ended[0] if ended else "",
    ]


def draw(curves: Curves, save: machines.Save, inputs: Inputs) -> bytes:
    """Draws goodput over intervals; returns a PNG file.

    Args:
        curves: by nodes, and whether there are spares.
        save: what one costs.
        inputs: all else.
    """
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, nodes in enumerate(NODES):
        colour = f"C{number}"
        for has_spare, line in ((False, "-"), (True, "--")):
            axes.plot(
                INTERVALS,
                [mean.goodput for mean in curves[nodes, has_spare]],
                *(line,),
                color=colour,
                label=None if has_spare else f"{nodes:,} nodes",
            )
        mean_secs = inputs.mean_secs(nodes)
        best = machines.young(save.cost, mean_secs)
        plain = [mean.goodput for mean in curves[nodes, False]]
        at_best = np.interp(math.log(best), np.log(INTERVALS), plain)
        axes.plot(best, at_best, "o", color=colour)
    axes.plot([], [], "k--", label="with a warm spare")
    axes.plot([], [], "ko", label="Young")
    axes.set(xlabel="seconds between two saves", ylabel="goodput, simulated")
    axes.set_xscale("log")
    axes.set_ylim(0.8, 1.004)
    axes.legend(loc="lower left", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def by_device(inputs: Inputs) -> list[Table]:
    """Makes the table of what to begin with."""
    del inputs
    name, side = OF_ALL
    config = dataclasses.replace(
        cost.config_of(name, side), precision="mixed_bfloat16"
    )
    of_step = defaults.room(config, side)
    rows = [
        ["a CPU", "`float32`", "", "`auto`: off", "", "1"],
        *(
            defaults.row(each, device, of_step, _IMAGES)
            for each, device in defaults.DEVICES.items()
        ),
    ]
    head = ["device", "`--precision`", "of float32's operations"]
    head += ["`--jit_compile`", f"images of {name}, {side} pixels, at once"]
    head.append(f"`--micro_batches` for {_IMAGES} of them")
    return [Table("defaults", head, rows)]


def here(inputs: Inputs) -> list[Table]:
    """Makes the table of what was predicted here, and measured."""
    del inputs
    told = ["main", "--run_dir=nowhere", "--batch_size=8", *loopback.FLAGS]
    found = cost.of_config(config_lib.parse(told), loopback.SHAPE, {})
    rounds = loopback.measure(_ROUNDS)
    secs = {
        side: statistics.median(each[side] for each in rounds)
        for side in rounds[0]
    }
    rows = [
        [
            name,
            *(f"{loopback.BATCH_SIZE / each:,.0f}" for each in prediction),
            f"{prediction.measured / prediction.predicted:.2f}",
        ]
        for name, prediction in loopback.predict(secs, found).items()
    ]
    head = ["images/s of", "predicted", "measured", "predicted / measured"]
    load = f"{os.getloadavg()[0]:.1f}"
    measured = [
        ["(load of the machine, with the two processes)", load],
        *([name, secs_text(each)] for name, each in secs.items()),
    ]
    return [
        Table("here", head, rows),
        Table("here_inputs", ["a step, or a sum, of", "takes"], measured),
    ]


PARTS: Mapping[str, Callable[[Inputs], list[Table]]] = {
    "steps": steps,
    "saves": saves,
    "week": weeks,
    "defaults": by_device,
    "here": here,
}


def run(arguments: Sequence[str]) -> int:
    """Computes the parts, and prints them; returns the exit code.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        UserError: the command line is wrong.
    """
    is_written = "--write" in arguments
    parts = [each for each in arguments[1:] if each in PARTS] or list(PARTS)
    told = [each for each in arguments if each not in {"--write", *PARTS}]
    inputs = Inputs(**flags.parse(Inputs, told))
    inputs_text = inputs_table(inputs)
    print("\n".join(inputs_text.lines()), flush=True)
    tables = [inputs_text]
    for part in parts:
        for table in PARTS[part](inputs):
            print(f"\n{table.name}\n", *table.lines(), sep="\n", flush=True)
            tables.append(table)
    if is_written:
        for table in tables:
            pages.replace_table(PAGE, f"scale_{table.name}", table.lines())
            if table.picture:
                CURVES.write_bytes(table.picture)
    return errors.FINISHED


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    errors.exit_with(lambda: run(sys.argv))
