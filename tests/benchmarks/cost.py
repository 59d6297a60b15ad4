"""Counts the operations of a step of each preset, and what a GPU would take.

    python -m tests.benchmarks.cost [--write] [NAME ...]

Each phase is traced, with its gradients, at the preset's own widths for images
of 64, 256 and 512 pixels, and what convolutions and products of matrices
compute is counted; a phase of each n-th step counts as an n-th. A device does
as large a share of its best as a V100 does of stylegan2-ada-pytorch's 256
pixels. Nothing is run on a GPU: the seconds are computed. `--write` puts them
into docs/gpus.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import Config, presets
from dtrain.errors import UserError
from dtrain.gan import loading, objectives, trial
from dtrain.gan.program import Named, Program
from tests import runs
from tests.benchmarks import collectives
from tests.benchmarks.pages import replace_table

SIDES = (64, 256, 512)
# Of the batch that is traced; groups of a standard deviation want as many.
BATCH_SIZE = 4
# 10^12 operations a second of dense matrices in 16 bits, by the data sheets.
DEVICES = {"V100": 125.0, "A100": 312.0, "H100": 989.0}
# Channels at the full size, as the paper has them (512: as it goes on).
_OF_R3GAN = {64: 384, 256: 96, 512: 48}
_NETWORKS = ("generator", "discriminator")
# Its README has 21.6 to 24.2 seconds for a thousand images of 256 pixels.
_MEASURED, _DEVICE, _SECS = ("stylegan2", 256), "V100", 22.9


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
        parameters: that are trained, of all networks.
        operations: of an image of the batch.
        gradients: whose sums over all replicas a step needs.
        all_reduces: of a step, at most: one for each phase, and one for each
            pass of a BatchNorm and one for its gradient.
    """

    parameters: int
    operations: float
    gradients: float
    all_reduces: float


def of_preset(name: str, side: int) -> Cost:
    """Counts what a preset costs at its own widths.

    Args:
        name: of the preset.
        side: of the images, in colour, in pixels.

    Raises:
        UserError: it makes no images of this size.
    """
    shape = side, side, 3
    inputs = {"given": tf.TensorSpec(shape, tf.float32)}
    if name not in ("pix2pix", "cyclegan"):
        inputs = {}
    return of_config(config_of(name, side), shape, inputs)


def config_of(name: str, side: int) -> Config:
    """Returns the settings of a preset at its own widths; see `of_preset`."""
    told = [f"--preset={name}", f"--batch_size={BATCH_SIZE}", "--run_dir=x"]
    if name == "r3gan":
        told.append(f"--base_channels={_OF_R3GAN[side]}")
    if presets.of(name).decided:
        values = presets.decide(side, 1)
        told += [f"--base_channels={values['base_channels']}", "--r1_gamma=1"]
        told += ["--ema_half_life_images=1000"]
        told += [f"--{each}_learning_rate=0.001" for each in _NETWORKS]
    return config_lib.parse(["main", *told])


def of_config(
    config: Config,
    shape: tuple[int, int, int],
    inputs: Mapping[str, tf.TensorSpec],
) -> Cost:
    """Counts what a model costs.

    Args:
        config: its settings.
        shape: height, width and channels of the images.
        inputs: of one example, by name.

    Raises:
        UserError: it makes no images of this size.
    """
    size = config.batch_size
    make = loading.load(config.model)
    program = loading.build(make, config, shape, 0, inputs)
    weights = {
        name: sum(
            weight.shape.num_elements()
            for weight in program.networks[name].trainable_weights
        )
        for name in program.trained
    }
    given = trial.specs(config, program, shape, inputs, size)
    operations = gradients = all_reduces = 0.0
    for number, phase in enumerate(program.phases):
        with collectives.counting_passes() as passes:
            counted = _counted(program, number, given)
        operations += counted / phase.every_steps / size
        gradients += sum(map(weights.get, phase.names)) / phase.every_steps
        all_reduces += (1 + 2 * len(passes)) / phase.every_steps
    parameters = sum(weights.values())
    return Cost(parameters, operations, gradients, all_reduces)


def _counted(program: Program, number: int, given: Any) -> int:
    """Counts the operations of a phase and of its gradients."""
    phase = program.phases[number]

    def differentiate(given: Any) -> Any:
        weights = {
            name: [
                each.value for each in program.networks[name].trainable_weights
            ]
            for name in phase.names
        }
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(weights)
            example = objectives.prepared(program, given)
            networks = Named(**program.networks)
            returned = objectives.call(phase, number, networks, example)
            same = {id(loss): loss for loss in returned.losses.values()}
            sums = {key: tf.reduce_sum(loss) for key, loss in same.items()}
        gradients = []
        for name, loss in returned.losses.items():
            gradients += tape.gradient(sums[id(loss)], weights[name])
        return [each for each in gradients if each is not None]

    graph = (
        tf.function(differentiate, autograph=False)
        .get_concrete_function(given)
        .graph
    )
    wanted = tf.compat.v1.graph_util.extract_sub_graph(
        graph.as_graph_def(), [each.op.name for each in graph.outputs]
    )
    return sum(
        _of_operation(graph.get_operation_by_name(node.name))
        for node in wanted.node
    )


def _of_operation(operation: tf.Operation) -> int:
    """Counts the multiplications and additions of an operation, 2 each."""
    shapes = [tensor.shape for tensor in operation.inputs]
    if operation.type == "Conv2D":
        kernel, made = shapes[1], operation.outputs[0].shape
    elif operation.type == "Conv2DBackpropInput":
        kernel, made = shapes[1], shapes[2]
    elif operation.type == "Conv2DBackpropFilter":
        # [h, w, inputs of a group, outputs]: as the convolution itself.
        kernel, made = operation.outputs[0].shape, shapes[2]
        if kernel.rank is None or None in kernel.as_list():
            sizes = tf.get_static_value(operation.inputs[1])
            kernel = tf.TensorShape(sizes)
    elif operation.type in ("MatMul", "BatchMatMulV2"):
        is_turned = any(
            operation.node_def.attr[each].b for each in ("transpose_a", "adj_x")
        )
        inner = shapes[0][-2 if is_turned else -1]
        return 2 * operation.outputs[0].shape.num_elements() * inner
    else:
        return 0
    return 2 * made.num_elements() * kernel[:3].num_elements()


def share_of_best() -> float:
    """Returns which share of its best a device is taken to do."""
    operations = of_preset(*_MEASURED).operations
    return 1000 * operations / (_SECS * 1e12 * DEVICES[_DEVICE])


def row(name: str, side: int, share: float) -> str:
    """Returns the row of a preset at a size.

    Args:
        name: of the preset.
        side: of the images, in pixels.
        share: of its best that a device does.

    Raises:
        UserError: the preset makes no images of this size.
    """
    cost = of_preset(name, side)
    secs = [
        1000 * cost.operations / (share * 1e12 * best)
        for best in DEVICES.values()
    ]
    cells = [
        f"{cost.parameters / 1e6:.1f}",
        f"{cost.operations / 1e9:,.0f}",
        *(f"{each:.2g}" if each < 10 else f"{each:,.0f}" for each in secs),
    ]
    return f"| {name} | {side} | {' | '.join(cells)} |"


def main() -> None:
    """Counts, and prints the table."""
    is_written = "--write" in sys.argv
    names = [each for each in sys.argv[1:] if each != "--write"]
    share = share_of_best()
    titles = " | ".join(f"{name}, s" for name in DEVICES)
    lines = [
        f"| preset | pixels | million weights | 10^9 operations | {titles} |",
        "|---|---" + "|---" * (2 + len(DEVICES)) + "|",
    ]
    print(f"share of the best: {share:.3f}", *lines, sep="\n", flush=True)
    for name in names or [each for each in presets.PRESETS if each != "mlp"]:
        for side in SIDES:
            with contextlib.suppress(UserError):
                lines.append(row(name, side, share))
                print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/gpus.md", "cost", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
