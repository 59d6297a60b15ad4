"""StyleGAN2: styles, noise, and two penalties that are taken now and then.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN: lazy
R1 and path lengths (sections 3.1 and 3.2); mixing of styles and truncation are
those of Karras et al. 2019, A Style-Based Generator Architecture. The loss is
that of the flags, R1 excepted, and `--augment=ada` makes it the StyleGAN2-ADA
of Karras et al. 2020, Training Generative Adversarial Networks with Limited
Data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.errors import UserError
from dtrain.gan import losses, optimizers, phases, schedules
from dtrain.gan.example import Example
from dtrain.gan.program import DISCRIMINATOR, Phase, Program
from dtrain.models import sizes, stylegan2

_GENERATORS = ("mapping", "synthesis")
_STYLE, _LENGTH = "mean_style", "mean_path_length"
# How much of a step's mean joins the means of before.
_STYLE_SHARE, _LENGTH_SHARE = 0.005, 0.01
# The optimizers are the program's own, and no schedule moves those.
_NEEDS = {
    "learning_rate_schedule": "constant",
    "warmup_steps": 0,
    "end_learning_rate_factor": 1.0,
    "end_beta_2": 0.0,
}
# The square root has no gradient at 0.
_EPSILON = 1e-8


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    mapping_layers: int = 8,
    max_channels: int = 512,
    group_size: int = 4,
    style_mixing: float = 0.9,
    path_length_weight: float = 2.0,
    path_length_every_steps: int = 4,
    r1_every_steps: int = 16,
) -> Program:
    """Makes mapping, synthesis and discriminator.

    Args:
        config: latent_size (of a style, too), base_channels (at the size of the
            images), conditional, and what `phases.adversarial_phases` reads.
        image_shape: height, width and channels.
        num_classes: number of labels; only looked at if conditional.
        mapping_layers: at least 1.
        max_channels: at any size.
        group_size: of the minibatch standard deviation.
        style_mixing: share of the images that have styles of two latents.
        path_length_weight: gamma_pl; 0 leaves that phase out.
        path_length_every_steps: how seldom it is.
        r1_every_steps: how seldom R1 is.

    Raises:
        UserError: there are no such networks.
    """
    sizes.check("stylegan2", image_shape, stylegan2.MAX_IMAGE_SIZE)
    _check_counts(
        mapping_layers=mapping_layers,
        max_channels=max_channels,
        group_size=group_size,
        path_length_every_steps=path_length_every_steps,
        r1_every_steps=r1_every_steps,
    )
    labels = num_classes if config.conditional else 0
    size = config.latent_size
    channels = stylegan2.channels_at(
        config.base_channels, image_shape[0], max_channels
    )
    every = {}
    if config.r1_gamma:
        every[DISCRIMINATOR] = r1_every_steps
    if path_length_weight:
        every[_GENERATORS[0]] = path_length_every_steps
    return Program(
        networks={
            "mapping": stylegan2.make_mapping(size, labels, mapping_layers),
            "synthesis": stylegan2.make_synthesis(image_shape, channels, size),
            DISCRIMINATOR: stylegan2.make_discriminator(
                image_shape, channels, labels, group_size
            ),
        },
        phases=_phases(config, every, style_mixing, path_length_weight),
        optimizers=_optimizers(config, every),
        averaged=_GENERATORS,
        state={
            **phases.adversarial_state(config),
            _STYLE: [0.0] * size,
            _LENGTH: 0.0,
        },
        draw=_not_converted(functools.partial(_draw, config)),
        needs=_NEEDS,
    )


def _check_counts(**counts: int) -> None:
    """Checks what is counted.

    Raises:
        UserError: there is less than one of something.
    """
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"model_flag ({name}={value}) must be at least 1")


def _not_converted(function: Any) -> Any:
    return tf.autograph.experimental.do_not_convert(function)


def _optimizers(
    config: Config, every: dict[str, int]
) -> dict[str, keras.optimizers.Optimizer]:
    """Makes Adams that go as far with lazy phases as without.

    Section 3.1: k + 1 updates stand where k were, so what one of them does is
    taken to the power, or times, k / (k + 1).
    """

    def adam(name: str, learning_rate: float) -> keras.optimizers.Optimizer:
        steps = every.get(name, math.inf)
        power = 1.0 if math.isinf(steps) else steps / (steps + 1)
        return optimizers.Adam(
            learning_rate * power,
            beta_1=config.beta_1**power,
            beta_2=config.beta_2**power,
            epsilon=_EPSILON,
            name=f"{name}_optimizer",
        )

    together = adam(_GENERATORS[0], config.generator_learning_rate)
    return {
        **dict.fromkeys(_GENERATORS, together),
        DISCRIMINATOR: adam(DISCRIMINATOR, config.discriminator_learning_rate),
    }


def _phases(
    config: Config,
    every: dict[str, int],
    style_mixing: float,
    path_length_weight: float,
) -> Sequence[Phase]:
    """Makes the phases of the flags, and those that are run now and then."""
    without_r1 = dataclasses.replace(config, r1_gamma=0.0)
    *judging, generating = phases.adversarial_phases(without_r1)
    synthesize = functools.partial(_synthesize, config, style_mixing)
    # One phase that stands there several times, and so has other images each.
    judge = judging[0]._replace(
        objective=_not_converted(
            functools.partial(_as_pair, judging[0].objective, synthesize)
        )
    )
    made = [judge] * len(judging)
    if DISCRIMINATOR in every:
        penalize = functools.partial(_penalize, config, every[DISCRIMINATOR])
        made.append(
            Phase(
                DISCRIMINATOR,
                _not_converted(penalize),
                every_steps=every[DISCRIMINATOR],
            )
        )
    generate = functools.partial(_generate, generating.objective, synthesize)
    made.append(
        Phase(_GENERATORS, _not_converted(generate), update=_follow_style)
    )
    if _GENERATORS[0] in every:
        steps = every[_GENERATORS[0]]
        lengthen = functools.partial(
            _lengthen, synthesize, steps * path_length_weight
        )
        made.append(
            Phase(_GENERATORS, _not_converted(lengthen), steps, _follow_length)
        )
    return made


# How an image comes about.


def _map(
    config: ModelSettings, networks: Any, latents: Any, labels: Any
) -> Any:
    inputs = [latents, labels] if config.conditional else latents
    return networks.mapping(inputs)


def _noises(networks: Any, example: Example) -> list[tf.Tensor]:
    """Draws what each convolution adds."""
    return [
        example.normal(each.shape[1:]) for each in networks.synthesis.inputs[1:]
    ]


def _synthesize(
    config: ModelSettings, style_mixing: float, networks: Any, example: Example
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Draws styles for the convolutions of an image.

    Returns:
        The styles of the latents, float32 [b, numbers]; those of each
        convolution, some of other latents, [b, n, numbers]; and noise.
    """
    latents, labels = example.latents, example.labels
    style = _map(config, networks, latents, labels)
    num_styles = networks.synthesis.inputs[0].shape[1]
    styles = tf.repeat(style[:, None], num_styles, axis=1)
    if style_mixing:
        other = _map(
            config, networks, example.normal(latents.shape[1:]), labels
        )
        # From the second on, to the last.
        cut = 1.0 + tf.floor(example.uniform() * (num_styles - 1))
        is_mixed = example.uniforms < style_mixing
        cut = tf.where(is_mixed, cut, float(num_styles))
        is_other = tf.range(num_styles, dtype=tf.float32) >= cut[:, None]
        styles = tf.where(is_other[:, :, None], other[:, None], styles)
    return style, styles, _noises(networks, example)


# The phases.


def _as_pair(
    objective: Any, synthesize: Callable[..., Any], networks: Any, example: Any
) -> Any:
    """Calls an objective that knows one generator and one discriminator."""
    _, styles, noises = synthesize(networks, example)
    return objective(_pair(networks, styles, noises), example)


def _pair(networks: Any, styles: tf.Tensor, noises: list[tf.Tensor]) -> Any:
    def generator(inputs: Any, training: bool) -> tf.Tensor:
        del inputs
        return networks.synthesis([styles, *noises], training=training)

    return types.SimpleNamespace(
        generator=generator, discriminator=networks.discriminator
    )


def _generate(
    objective: Any,
    synthesize: Callable[..., Any],
    networks: Any,
    example: Example,
) -> Any:
    style, styles, noises = synthesize(networks, example)
    loss, metrics = objective(_pair(networks, styles, noises), example)
    return loss, metrics, {"style": tf.stop_gradient(style)}


def _follow_style(state: Any, means: Any) -> Any:
    old = state[_STYLE]
    return {_STYLE: old + _STYLE_SHARE * (means["style"] - old)}


def _penalize(
    config: Config, every_steps: int, networks: Any, example: Example
) -> Any:
    """Computes R1: Mescheder et al. 2018, equation (9)."""
    critic = phases.make_critic(config, networks, example)
    _, penalty = losses.squared_gradient(critic, example.real_images)
    gamma = config.r1_gamma * schedules.gamma_factor(config, example.step)
    return every_steps * 0.5 * gamma * penalty, {"r1_penalty": penalty}


def _lengthen(
    synthesize: Callable[..., Any],
    weight: float,
    networks: Any,
    example: Example,
) -> Any:
    """Computes how far path lengths are from their mean: equation (4).

    It is of every other example, for the second derivative of a synthesis takes
    much memory: Karras et al. do so, too.
    """
    _, styles, noises = synthesize(networks, example)
    directions = example.normal(networks.synthesis.output.shape[1:])
    stride = 2 if styles.shape[0] % 2 == 0 else 1
    styles, directions, *noises = (
        each[::stride] for each in (styles, directions, *noises)
    )
    height, width = directions.shape[1:3]
    with tf.GradientTape() as tape:
        tape.watch(styles)
        images = networks.synthesis([styles, *noises], training=True)
        seen = tf.reduce_sum(images * directions) / math.sqrt(height * width)
    gradients = tf.cast(tape.gradient(seen, styles), tf.float32)
    squares = tf.reduce_mean(tf.reduce_sum(tf.square(gradients), 2), 1)
    lengths = tf.sqrt(squares + _EPSILON)
    distances = tf.square(lengths - example.state[_LENGTH])
    # The mean over all examples is that over those of which it is.
    loss = weight * tf.repeat(distances, stride)
    return loss, {"path_length": tf.repeat(lengths, stride)}


def _follow_length(state: Any, means: Any) -> Any:
    old = state[_LENGTH]
    return {_LENGTH: old + _LENGTH_SHARE * (means["path_length"] - old)}


def _draw(config: ModelSettings, networks: Any, example: Example) -> tf.Tensor:
    """Draws with styles that are as near to their mean as it is asked to.

        w' = mean + psi (w - mean)

    Karras et al. 2019, appendix B.
    """
    style = _map(config, networks, example.latents, example.labels)
    mean, psi = example.state[_STYLE], example.truncation or 1.0
    style = mean + psi * (style - mean)
    num_styles = networks.synthesis.inputs[0].shape[1]
    styles = tf.repeat(style[:, None], num_styles, axis=1)
    return networks.synthesis([styles, *_noises(networks, example)])
