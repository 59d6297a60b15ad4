"""The network of the original FID, as the frozen graph that it was published.

    inception:classify_image_graph_def.pb            with any digest
    inception:classify_image_graph_def.pb#3f2a...    with this one

The graph resizes images to 299 pixels by itself, by TensorFlow 1's bilinear
interpolation, and brings them from 0..255 to its own range. It was frozen for
one image; what fixes that is mended. Features are those of `pool_3`, classes
those of its softmax without a bias, as in the original Inception score.
"""

from __future__ import annotations

import hashlib
from typing import Any

import tensorflow as tf
from google.protobuf import message

from dtrain import flags
from dtrain.errors import UserError
from dtrain.quality.extractors import INCEPTION, Extractor, none
from dtrain.storage import files

# Where images go in, as [n, height, width, 3] of 0..255; the features; and the
# layer of the classes, whose weights alone count.
_INPUT, _FEATURES, _CLASSES = "ExpandDims", "pool_3", "softmax/logits/MatMul"
_WHERE = (
    "it is classify_image_graph_def.pb of http://download.tensorflow.org/"
    "models/image/imagenet/inception-2015-12-05.tgz"
)
# What other libraries resize to by themselves, and this graph does inside.
_RESIZE = "299x299 bilinear, by the graph"


class Inception(Extractor):
    """The frozen graph; its constants are on the device that calls it."""

    knows_labels = False

    def __init__(self, text: str, image_shape: tuple[int, int, int]) -> None:
        """Reads the file, checks its digest and imports the graph.

        Args:
            text: inception:FILE or inception:FILE#DIGEST, which may be cut.
            image_shape: height, width and channels of the images.

        Raises:
            UserError: there is no such file, it is another one, or the images
                have channels that it cannot see.
            StorageError: it cannot be read.
        """
        path, _, wanted = text.removeprefix(INCEPTION).partition("#")
        if image_shape[2] not in (1, 3):
            raise UserError(
                f"extractor ({text}) sees grey and RGB images, and these have "
                f"{image_shape[2]} channels; use pixels, or a model of your own"
            )
        content = _read(text, flags.expand_home(path))
        self.digest = hashlib.sha256(content).hexdigest()
        if not self.digest.startswith(wanted.lower()):
            raise UserError(
                f"extractor ({text}): the digest of the file is "
                f"{self.digest}; it is damaged or another one: {_WHERE}"
            )
        self.name, self.resize = "inception", _RESIZE
        self.image_shape = image_shape
        tried = tf.zeros([2, *image_shape[:2], 3])
        self._graph, shapes, self._has_classes = _imported(text, content, tried)
        self.num_features, self.num_classes = shapes

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs the graph; see `Extractor.__call__`."""
        if self.image_shape[2] == 1:
            images = tf.repeat(images, 3, axis=3)
        features, classes = self._graph((images + 1.0) * 127.5)
        features = tf.ensure_shape(features, [None, self.num_features])
        return features, classes if self._has_classes else none(images)


def _read(text: str, path: str) -> bytes:
    with files.storage_errors(path):
        content = None
        if path and not files.is_directory(path):
            content = files.read(path)
    if content is None:
        raise UserError(
            f"extractor ({text}) must name a file, and there is none: {_WHERE}"
        )
    return content


def _imported(
    text: str, content: bytes, tried: tf.Tensor
) -> tuple[Any, tuple[int, int], bool]:
    """Makes a function of the graph, and tries it.

    Returns it, how many features and classes it has, and whether it has any.

    Raises:
        UserError: the file is no such graph.
    """
    graph_def = tf.compat.v1.GraphDef()
    damaged = f"it is damaged or another file: {_WHERE}"
    try:
        graph_def.ParseFromString(content)
    except message.DecodeError as error:
        raise UserError(
            f"extractor ({text}) is no frozen graph; {damaged}"
        ) from error
    nodes = {node.name: node for node in graph_def.node}
    missing = {_INPUT, _FEATURES} - set(nodes)
    if missing:
        raise UserError(
            f"extractor ({text}) has no node {min(missing)}, so it is not the "
            f"graph of the original FID; {damaged}"
        )
    has_classes = _CLASSES in nodes and len(nodes[_CLASSES].input) > 1
    wanted = [f"{_FEATURES}:0"]
    if has_classes:
        weights = nodes[_CLASSES].input[1]
        wanted.append(weights if ":" in weights else f"{weights}:0")
    try:
        _mend(nodes)
        graph = _function(graph_def, wanted)
        features, classes = graph(tried)
        shapes = int(features.shape[1]), int(classes.shape[1])
        return graph, shapes, has_classes
    except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
        raise UserError(
            f"extractor ({text}) is no graph that TensorFlow can run "
            f"({files.reason(error)}); {damaged}"
        ) from error


def _mend(nodes: dict[str, Any]) -> None:
    """Takes the batch of one out of what was frozen with it."""
    for node in nodes.values():
        # What shapes were when it was frozen; they are inferred anew.
        node.attr.pop("_output_shapes", None)
        if node.op != "Reshape" or len(node.input) < 2:
            continue
        shape = nodes.get(node.input[1].split(":")[0].lstrip("^"))
        if shape is None or shape.op != "Const":
            continue
        sizes = tf.make_ndarray(shape.attr["value"].tensor).copy()
        if sizes.ndim == 1 and len(sizes) > 1 and sizes[0] == 1:
            sizes[0] = -1
            if (sizes < 0).sum() == 1:
                fixed = tf.make_tensor_proto(sizes)
                shape.attr["value"].tensor.CopyFrom(fixed)


def _function(graph_def: Any, wanted: list[str]) -> Any:
    """Makes a function of images: their features, and their classes."""

    def run(images: tf.Tensor) -> list[tf.Tensor]:
        made = tf.graph_util.import_graph_def(
            graph_def,
            input_map={f"{_INPUT}:0": images},
            return_elements=wanted,
            name="",
        )
        features = made[0]
        features = tf.reshape(features, [tf.shape(images)[0], -1])
        features = tf.ensure_shape(features, [None, _width(made[0])])
        if len(made) == 1:
            return [features, none(images)]
        return [features, tf.nn.softmax(features @ made[1])]

    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    return tf.compat.v1.wrap_function(run, [spec])


def _width(features: tf.Tensor) -> int | None:
    """Returns the numbers of one image, where the graph says them."""
    sizes = features.shape.as_list()[1:] if features.shape.rank else [None]
    product = 1
    for size in sizes:
        if size is None:
            return None
        product *= size
    return product
