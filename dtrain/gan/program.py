"""What a program is: its networks, and how a step changes them.

A model's `make` returns a generator and a discriminator, with phases and
optimizers of its own if it likes (`Networks`), or all that a GAN can have
(`Program`):

    networks --- phases, in their order: each from one forward pass --- state
    by name      a loss for each example -> gradients -> optimizers     by name

    example = prepare(real images, labels, inputs, random numbers)

Everything random follows from the seed, the step, the phase and the position of
an example in the batch, and everything else that changes is a network, an
optimizer or the state: so a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy.typing as npt
import tensorflow as tf

from dtrain.gan.example import Example

GENERATOR = "generator"
DISCRIMINATOR = "discriminator"

# A loss for each example, or one for each network by its name; metrics by name,
# [b] each; and, if it likes, what else `Phase.update` is given the mean of.
Objective = Callable[[Any, Example], Any]
# New values of the state by name, from those it has and from the means.
StateUpdate = Callable[
    [Mapping[str, tf.Tensor], Mapping[str, tf.Tensor]], Mapping[str, Any]
]


class Named(types.SimpleNamespace):
    """Networks as attributes, by their names."""

    def __getattr__(self, name: str) -> Any:
        """Says which there are, where there is none of a name.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            f"there is no network {name}; there are {', '.join(vars(self))}"
        )


class Phase(NamedTuple):
    """One update of one or several networks, from one forward pass.

    Attributes:
        networks: the name of the network that is trained, or several.
        objective: called in replica context with the networks, which are its
            attributes by their names, and an `Example`. Returns the loss,
            float32 [b], one for each example, or a dict of such, one for each
            network; then metrics by name, float32 [b] each; and, if it likes,
            further values by name, float [b, ...], for `update`.
        every_steps: the phase is run in step 0 and in each so many-th from
            there, as a lazy penalty is (Karras et al. 2020, StyleGAN2,
            section 3.1: its loss is then to be multiplied by this number).
        update: called once a step in which the phase is run, whatever the
            micro-batches and replicas, with the state by name and with the
            means over the global batch of the metrics and further values of
            this phase; returns the new values of the state that it changes.
            They are there from the next step on.
    """

    networks: str | Sequence[str]
    objective: Objective
    every_steps: int = 1
    update: StateUpdate | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the networks that it trains."""
        if isinstance(self.networks, str):
            return (self.networks,)
        return tuple(self.networks)


class Networks(NamedTuple):
    """The simple form of a program; a tuple of its first fields will do.

    Attributes:
        generator: latents float32 [b, latent_size] to images float [b, H, W,
            C] in [-1, 1]; its moving average draws the pictures.
        discriminator: images to logits, float [b] or [b, 1]. With
            `conditional`, both take a list whose second element is the
            labels, int32 [b].
        phases: the phases of a step in their order; None is
            `phases.adversarial_phases`.
        generator_optimizer: not yet built; None is Adam, as the flags say.
        discriminator_optimizer: the same.
    """

    generator: keras.Model
    discriminator: keras.Model
    phases: tuple[Phase, ...] | None = None
    generator_optimizer: keras.optimizers.Optimizer | None = None
    discriminator_optimizer: keras.optimizers.Optimizer | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The full form: networks of any names, and all that a step does.

    Attributes:
        networks: by name, which is an identifier; each is called by a phase,
            or by `draw`. One that no phase trains is frozen, and saved.
        phases: of a step, in their order. The real images are other ones for
            each time that an equal phase stands in a step, as the critic of
            WGAN-GP does five times.
        optimizers: not yet built, by the name of the network that each
            trains; the same optimizer at several names trains these together.
            A network without one has Adam, as the flags of the generator say,
            or of the discriminator where its name begins so.
        averaged: networks whose moving averages are kept, and draw; by default
            the one that is called generator.
        state: numbers that the phases update, by name, with their first
            values; float32 of any shape, `example.state` has them.
        prepare: makes of each example what the objectives and `draw` see, as
            by augmenting its images; for data it may take away, add and change
            by `example.replace`.
        draw: makes pictures, float [b, h, w, C] in [-1, 1], of the networks
            (the averages, where there are) and an example, without training.
            By default the network that is called generator is called with the
            latents, and the labels if conditional.
        generate: makes the images that figures are measured of, float [b, H, W,
            C] as those of the data, where `draw` shows others beside them.
            By default what `draw` makes.
        needs: values that settings must have, by the flag's name, and
            `image_shape` and `num_classes`.
        is_simple: whether it was made of `Networks`, each of which is called
            with one thing, and the labels if conditional.
    """

    networks: Mapping[str, keras.Model]
    phases: Sequence[Phase]
    optimizers: Mapping[str, keras.optimizers.Optimizer] = dataclasses.field(
        default_factory=dict
    )
    averaged: Sequence[str] | None = None
    state: Mapping[str, npt.ArrayLike] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Example], Example] | None = None
    draw: Callable[[Any, Example], tf.Tensor] | None = None
    generate: Callable[[Any, Example], tf.Tensor] | None = None
    needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_simple: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the networks that phases train, in the networks' order."""
        names = {name for phase in self.phases for name in phase.names}
        return tuple(name for name in self.networks if name in names)

    @property
    def optimized(self) -> dict[str, tuple[str, ...]]:
        """Names of the trained networks, by the first that an optimizer has."""
        groups: dict[int, list[str]] = {}
        for name in self.trained:
            optimizer = self.optimizers.get(name)
            groups.setdefault(id(optimizer or name), []).append(name)
        return {first: (first, *rest) for first, *rest in groups.values()}

    @property
    def draws(self) -> tuple[int, ...]:
        """Which draw of real images of its step each phase is given.

        The next one if it stands there again, and otherwise the one that was
        taken last: a generator that compares with real images sees those of
        the last discriminator phase.
        """
        times: dict[Phase, int] = {}
        chosen = []
        for phase in self.phases:
            times[phase] = times.get(phase, 0) + 1
            chosen.append(max(times.values()) - 1)
        return tuple(chosen)


def of_networks(
    networks: Networks,
    phases: Sequence[Phase],
    state: Mapping[str, npt.ArrayLike],
) -> Program:
    """Makes a program of its simple form.

    Args:
        networks: what `make` has returned.
        phases: of a step.
        state: that the phases of the flags update.
    """
    optimizers = {
        GENERATOR: networks.generator_optimizer,
        DISCRIMINATOR: networks.discriminator_optimizer,
    }
    return Program(
        networks={
            GENERATOR: networks.generator,
            DISCRIMINATOR: networks.discriminator,
        },
        phases=phases,
        optimizers={
            name: optimizer
            for name, optimizer in optimizers.items()
            if optimizer is not None
        },
        averaged=(GENERATOR,),
        state=state,
        is_simple=True,
    )
