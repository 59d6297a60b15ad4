"""Checks the full form of a program, before anything of it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan.describing import type_name
from dtrain.gan.program import DISCRIMINATOR, GENERATOR, Phase, Program

# Parts of a checkpoint that no network may be called.
_TAKEN = ("step", "state", "divergence", "untracked", "save_counter")
_ENDS = ("_optimizer", "_loss_scale")


def check(
    subject: str,
    program: Program,
    config: Config,
    facts: Mapping[str, Any],
) -> Program:
    """Checks a program, and puts tuples and defaults where it has others.

    Args:
        subject: the model, in the words of an error.
        program: that `make` has returned.
        config: the run's settings.
        facts: what else it may need to be so, by name.

    Raises:
        UserError: it contradicts itself, the settings or the data.
    """
    names = _check_networks(subject, program.networks)
    for field in ("optimizers", "needs"):
        value = getattr(program, field)
        if not isinstance(value, Mapping):
            raise UserError(
                f"{subject}: {field} is {type_name(value)}; it must be a dict"
            )
    program = dataclasses.replace(
        program,
        phases=check_phases(subject, program.phases, names),
        averaged=_averaged(subject, program),
        state=_state(subject, program.state),
    )
    _check_optimizers(subject, program)
    for name in ("prepare", "draw", "generate"):
        value = getattr(program, name)
        if value is not None and not callable(value):
            raise UserError(
                f"{subject}: {name} is {type_name(value)}; it must be a "
                "function, or None"
            )
    if program.draw is None and GENERATOR not in names:
        raise UserError(
            f"{subject} has no network that is called {GENERATOR}, and so no "
            "way to draw a picture; give the program a draw(networks, example)"
        )
    _check_needs(subject, program.needs, config, facts)
    return program


def _check_networks(subject: str, networks: Any) -> tuple[str, ...]:
    if not isinstance(networks, Mapping) or not networks:
        raise UserError(
            f"{subject}: networks is {type_name(networks)}; it must be a dict "
            "of at least one keras.Model by its name"
        )
    seen: dict[int, str] = {}
    for name, network in networks.items():
        is_name = isinstance(name, str) and name.isidentifier()
        is_taken = is_name and (
            name in _TAKEN or name.startswith(("ema_", "_"))
            or name.endswith(_ENDS)
        )  # fmt: skip
        if not is_name or is_taken:
            raise UserError(
                f"{subject}: no network can be called {name!r}; the name must "
                "be an identifier, and none that dtrain gives"
            )
        if not isinstance(network, keras.Model):
            raise UserError(
                f"{subject}: the network {name} is {type_name(network)}; it "
                "must be a keras.Model"
            )
        if id(network) in seen:
            raise UserError(
                f"{subject}: {seen[id(network)]} and {name} are one network; "
                "give it one name"
            )
        seen[id(network)] = name
    return tuple(networks)


def check_phases(
    subject: str, phases: Any, networks: Collection[str]
) -> tuple[Phase, ...]:
    """Checks phases, and returns them in the form of tuples.

    Args:
        subject: the model, in the words of an error.
        phases: those of a step.
        networks: names of all networks.

    Raises:
        UserError: one of them cannot be run.
    """
    if not isinstance(phases, Sequence) or not phases:
        what = "empty" if phases in ((), []) else type_name(phases)
        raise UserError(
            f"{subject}: phases is {what}; it must be a tuple of at least one "
            "dtrain.Phase, or None"
        )
    checked = []
    for phase in phases:
        if not isinstance(phase, Phase) or not callable(phase.objective):
            raise UserError(
                f"{subject}: a phase is {type_name(phase)}; it must be a "
                "dtrain.Phase with a callable objective"
            )
        _check_phase(subject, phase, networks)
        checked.append(phase._replace(networks=phase.names))
    if all(phase.every_steps > 1 for phase in checked):
        raise UserError(
            f"{subject}: no phase is run in every step; give one of them "
            "every_steps=1"
        )
    return tuple(checked)


def _check_phase(subject: str, phase: Phase, networks: Collection[str]) -> None:
    for name in phase.names or ("",):
        if name not in networks:
            raise UserError(
                f"{subject}: a phase trains {name!r}; it must train "
                + " or ".join(map(repr, networks))
            )
    every_steps = phase.every_steps
    if not isinstance(every_steps, int) or every_steps < 1:
        raise UserError(
            f"{subject}: a phase of {' and '.join(phase.names)} has "
            f"every_steps={every_steps!r}; it must be a whole number of at "
            "least 1"
        )
    if phase.update is not None and not callable(phase.update):
        raise UserError(
            f"{subject}: the update of a phase of {' and '.join(phase.names)} "
            f"is {type_name(phase.update)}; it must be a function, or None"
        )


def _averaged(subject: str, program: Program) -> tuple[str, ...]:
    names = program.averaged
    if names is None:
        if GENERATOR in program.networks:
            return (GENERATOR,)
        raise UserError(
            f"{subject} does not say which networks are averaged; name them, "
            "as in averaged=('generator',), or say averaged=() for none"
        )
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Collection):
        raise UserError(
            f"{subject}: averaged is {type_name(names)}; it must name networks"
        )
    for name in names:
        if name not in program.networks:
            raise UserError(
                f"{subject}: averaged names {name!r}; the networks are "
                + ", ".join(program.networks)
            )
    return tuple(dict.fromkeys(names))


def _state(subject: str, state: Any) -> dict[str, np.ndarray]:
    if not isinstance(state, Mapping):
        raise UserError(
            f"{subject}: state is {type_name(state)}; it must be a dict of "
            "numbers by their names"
        )
    values = {}
    for name, value in state.items():
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            array = np.float32(np.nan)
        is_name = isinstance(name, str) and name.isidentifier()
        if not is_name or not np.isfinite(array).all():
            raise UserError(
                f"{subject}: the state {name!r} is {value!r:.40}; it must be a "
                "number or an array, finite, and its name an identifier"
            )
        values[name] = array
    return values


def _check_optimizers(subject: str, program: Program) -> None:
    for name, optimizer in program.optimizers.items():
        if name not in program.trained:
            raise UserError(
                f"{subject}: there is an optimizer of {name!r}, which no phase "
                f"trains; trained are {', '.join(program.trained)}"
            )
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise UserError(
                f"{subject}: the optimizer of {name} is "
                f"{type_name(optimizer)}; it must be a "
                "keras.optimizers.Optimizer"
            )


def _check_needs(
    subject: str,
    needs: Mapping[str, Any],
    config: Config,
    facts: Mapping[str, Any],
) -> None:
    for name, needed in needs.items():
        if name in facts:
            value, remedy = facts[name], "choose other data"
        elif hasattr(config, name):
            value, remedy = getattr(config, name), f"give --{name}={needed}"
        else:
            raise UserError(
                f"{subject} needs {name!r}, which is no flag; known beside "
                f"those are {', '.join(facts)}"
            )
        if isinstance(needed, list):
            needed = tuple(needed)
        if value != needed:
            raise UserError(
                f"{subject} needs {name} {needed}, and it is {value}; {remedy}"
            )


def check_network(subject: str, network: keras.Model) -> None:
    """Checks that all variables of a network are there, and known to Keras.

    Args:
        subject: the network, in the words of an error.
        network: after its first call.

    Raises:
        UserError: it has a tf.Variable of its own, which would be saved, but
            neither trained, nor averaged, nor compared between the replicas;
            or a layer that is not built.
    """
    known = {id(variable.value) for variable in network.variables}
    for owner in tf.train.TrackableView(network).descendants():
        variable = objects.unwrapped(owner)
        if isinstance(variable, tf.Variable) and id(variable) not in known:
            raise UserError(
                f"{subject} has a tf.Variable of its own, {variable.name}, "
                "which would be neither trained nor averaged; make it by "
                "add_weight, or a constant"
            )
    for layer in network._flatten_layers():
        if not layer.built:
            raise UserError(
                f"{subject} has a layer {layer.name!r} that a call does not "
                "build; build it in build(), or remove it"
            )


def learning_rate_flag(name: str) -> str:
    """Names the flag with the learning rate of a network without optimizer."""
    of_judge = name.startswith((DISCRIMINATOR, "critic"))
    return f"{DISCRIMINATOR if of_judge else GENERATOR}_learning_rate"
