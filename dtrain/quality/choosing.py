"""Makes the extractor that a flag names, on all workers alike."""

from __future__ import annotations

import contextlib

import numpy as np

from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.data.sources import Source
from dtrain.quality import classifier, extractors, kept
from dtrain.quality.classifier import Classifier
from dtrain.quality.extractors import Extractor, OwnModel, Pixels
from dtrain.quality.inception import Inception
from dtrain.quality.real_images import fingerprint
from dtrain.quality.saying import Slowly
from dtrain.storage import files


def make(
    text: str,
    source: Source,
    config: Config,
    workers: Workers,
    cache_dir: str,
    say: Slowly,
) -> Extractor:
    """Makes an extractor. Every worker calls this.

    Args:
        text: what `--extractor` says; auto is classifier where the data has
            labels, and pixels where it has none.
        source: the data.
        config: how it is read.
        workers: whose replicas call it.
        cache_dir: where a trained classifier is kept; empty keeps none.
        say: shows lines of progress.

    Raises:
        UserError: there is no such extractor, or it does not suit the data.
        StorageError: its file cannot be read.
    """
    extractors.check(text)
    shape, scope = source.image_shape, workers.strategy.scope
    if text == extractors.AUTO:
        text = extractors.PIXELS
        if source.num_classes:
            text = extractors.CLASSIFIER
    if text == extractors.PIXELS:
        return Pixels(shape)
    if text.startswith(extractors.INCEPTION):
        return workers.together(lambda: Inception(text, shape))
    if text != extractors.CLASSIFIER:
        return workers.together(lambda: OwnModel(text, shape, scope))
    made = Classifier(shape, source.num_classes, scope)
    _teach(made, source, config, workers, cache_dir, say)
    return made


def _teach(
    made: Classifier,
    source: Source,
    config: Config,
    workers: Workers,
    cache_dir: str,
    say: Slowly,
) -> None:
    """Gives a classifier the weights of one that the chief has trained."""
    weights: dict[str, np.ndarray] = made.weights

    def learn() -> None:
        nonlocal weights
        if workers.is_chief:
            weights = _learned(made, source, config, cache_dir, say)

    workers.together(learn)
    for name, array in weights.items():
        data = workers.broadcast(array.tobytes(), array.nbytes, 0)
        weights[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
    made.take(weights)


def _learned(
    like: Classifier,
    source: Source,
    config: Config,
    cache_dir: str,
    say: Slowly,
) -> dict[str, np.ndarray]:
    """Returns the weights of a trained classifier, from the cache if there."""
    key = {
        "version": classifier.VERSION,
        "data": fingerprint(source, config),
        "shapes": [list(array.shape) for array in like.weights.values()],
    }
    path = kept.path_of(cache_dir, "classifier", key) if cache_dir else ""
    found = None
    if path:
        with contextlib.suppress(OSError):
            found = kept.read(path, key)
    if found:
        return {name: found[name] for name in like.weights}
    # Apart from the strategy: it is trained on one device, by one worker.
    pupil = Classifier(
        source.image_shape, source.num_classes, contextlib.nullcontext
    )
    right = pupil.train(source, say)
    say.now(f"the classifier is right on {right:.1%} of what it learns from")
    if path:
        try:
            kept.write(path, key, pupil.weights)
        except OSError as error:
            say.now(
                f"the cache {cache_dir} is not written: {files.reason(error)}"
            )
    return pupil.weights
