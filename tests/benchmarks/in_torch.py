"""dcgan, sngan and r3gan in PyTorch, as one would write them there.

The networks have as many weights as dtrain's, which `presets.in_torch` checks,
and a step does the same updates: the losses, R1 and R2, Adam and a moving
average. PyTorch is no requirement of this repository: `pip install torch`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from dtrain.config import Config

# As many as TensorFlow's: by itself it may leave out second threads of cores.
torch.set_num_threads(os.cpu_count() or 1)

Turn = Callable[[int], None]
_SLOPE = 0.2
_GAIN = math.sqrt(2.0 / (1.0 + _SLOPE**2))


class Reshape(nn.Module):
    """Makes features of rows."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, *self.shape)


# dcgan.


def dcgan(config: Config, side: int, channels: int) -> tuple[nn.Module, ...]:
    """Makes both networks for images that halve to 4 pixels, or to 7."""
    levels = int(math.log2(side // 4))
    least = side >> levels
    widths = [config.base_channels * min(2**n, 8) for n in range(levels + 1)]

    def finish(width: int) -> list[nn.Module]:
        norm = (
            [nn.BatchNorm2d(width, momentum=0.1)] if config.batch_norm else []
        )
        return [*norm, nn.LeakyReLU(_SLOPE)]

    top = widths[-1]
    up: list[nn.Module] = [
        nn.Linear(config.latent_size, least**2 * top),
        Reshape(top, least, least),
        *finish(top),
    ]
    for before, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
        up += [nn.ConvTranspose2d(before, width, 4, 2, 1), *finish(width)]
    up += [nn.Conv2d(widths[0], channels, 3, padding=1), nn.Tanh()]
    down: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
    for before, width in itertools.pairwise(widths):
        down += [nn.LeakyReLU(_SLOPE), nn.Conv2d(before, width, 4, 2, 1)]
    down += [nn.LeakyReLU(_SLOPE), nn.Flatten()]
    down.append(nn.Linear(least**2 * top, 1))
    return nn.Sequential(*up), nn.Sequential(*down)


# sngan.


class Up(nn.Module):
    """A block of the generator that doubles the size."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(before), nn.BatchNorm2d(width)]
        )
        self.first = nn.Conv2d(before, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(before, width, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        inner = functional.interpolate(
            functional.relu(self.norms[0](features)), scale_factor=2
        )
        inner = self.second(functional.relu(self.norms[1](self.first(inner))))
        return inner + functional.interpolate(
            self.skip(features), scale_factor=2
        )


class Down(nn.Module):
    """A block of the discriminator that halves the size, or not."""

    def __init__(
        self, before: int, width: int, *, halves: bool, is_first: bool
    ) -> None:
        super().__init__()
        self.halves, self.is_first = halves, is_first
        hidden = width if is_first else before
        self.first = spectral_norm(nn.Conv2d(before, hidden, 3, padding=1))
        self.second = spectral_norm(nn.Conv2d(hidden, width, 3, padding=1))
        self.skip = None
        if halves or before != width:
            self.skip = spectral_norm(nn.Conv2d(before, width, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        inner = features if self.is_first else functional.relu(features)
        inner = self.second(functional.relu(self.first(inner)))
        skip = features
        if self.halves:
            inner, skip = (
                functional.avg_pool2d(inner, 2),
                functional.avg_pool2d(skip, 2),
            )
        return inner + (self.skip(skip) if self.skip else skip)


class Sum(nn.Module):
    """Sums features over the image."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.relu(features).sum((2, 3))


def sngan(config: Config, side: int, channels: int) -> tuple[nn.Module, ...]:
    """Makes both networks for images of 32 pixels."""
    assert side == 32
    width, narrow = 4 * config.base_channels, 2 * config.base_channels
    generator = nn.Sequential(
        nn.Linear(config.latent_size, 16 * width),
        Reshape(width, 4, 4),
        *[Up(width, width) for _ in range(3)],
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        Down(channels, narrow, halves=True, is_first=True),
        Down(narrow, narrow, halves=True, is_first=False),
        Down(narrow, narrow, halves=False, is_first=False),
        Down(narrow, narrow, halves=False, is_first=False),
        Sum(),
        spectral_norm(nn.Linear(narrow, 1)),
    )
    return generator, discriminator


# r3gan.


class Biased(nn.Module):
    """A leaky ReLU of features with a bias of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.leaky_relu(
            features + self.bias[:, None, None], _SLOPE
        )


class Block(nn.Module):
    """1x1, 3x3 in groups, 1x1."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        wide = 2 * width
        self.inner = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            Biased(wide),
            nn.Conv2d(wide, wide, 3, padding=1, groups=groups, bias=False),
            Biased(wide),
            nn.Conv2d(wide, width, 1, bias=False),
        )
        nn.init.zeros_(self.inner[-1].weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.inner(features)


class Resample(nn.Module):
    """Doubles or halves both sides by the filter [1, 3, 3, 1]."""

    def __init__(self, width: int, *, doubles: bool) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        kernel = torch.outer(row, row)[None, None].repeat(width, 1, 1, 1)
        self.register_buffer("kernel", kernel * (4.0 if doubles else 1.0))
        self.doubles, self.width = doubles, width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        apply = (
            functional.conv_transpose2d if self.doubles else functional.conv2d
        )
        return apply(
            features, self.kernel, stride=2, padding=1, groups=self.width
        )


class Basis(nn.Module):
    """Learned pictures of 4x4, times numbers; or how much there is of them."""

    def __init__(self, width: int, *, generates: bool) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.randn(width, 4, 4) / 4.0)
        self.generates = generates

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.generates:
            return values[:, :, None, None] * self.pictures
        return (values * self.pictures).sum((2, 3))


def r3gan(config: Config, side: int, channels: int) -> tuple[nn.Module, ...]:
    """Makes both networks for images of 32 pixels."""
    assert side == 32
    width = config.base_channels
    flags = dict(each.split("=") for each in config.model_flag)
    groups = 2 * width // int(flags.get("group_width", 16))
    up: list[nn.Module] = [
        nn.Linear(config.latent_size, width, bias=False),
        Basis(width, generates=True),
    ]
    down: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=False)]
    for level in range(4):
        if level:
            up.append(Resample(width, doubles=True))
            down.append(Resample(width, doubles=False))
        up += [Block(width, groups) for _ in range(2)]
        down += [Block(width, groups) for _ in range(2)]
    up.append(nn.Conv2d(width, channels, 1, bias=False))
    down += [Basis(width, generates=False), nn.Linear(width, 1, bias=False)]
    return nn.Sequential(*up), nn.Sequential(*down)


NETWORKS = {"dcgan": dcgan, "sngan": sngan, "r3gan": r3gan}


# The step.


def join(
    workers: Sequence[str], index: int
) -> Callable[[nn.Module], nn.Module]:
    """Joins the other processes, by gloo; all share the cores of a machine.

    Args:
        workers: `host:port` of each; they meet at the first.
        index: which of them this is.

    Returns:
        What makes a network one whose gradients are means over all.
    """
    if len(workers) == 1:
        return lambda network: network
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(workers)))
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{workers[0]}",
        rank=index,
        world_size=len(workers),
    )
    # Each process has batch statistics of its own.
    return lambda network: DistributedDataParallel(
        network, broadcast_buffers=False
    )


class Training:
    """A loop as PyTorch's tutorials have it."""

    def __init__(
        self,
        make: Callable[[Config, int, int], tuple[nn.Module, ...]],
        config: Config,
        batches: Iterator[Any],
        side: int,
        channels: int = 3,
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
    ) -> None:
        """Makes networks and optimizers.

        Args:
            make: makes generator and discriminator, of the settings, a side
                in pixels, and channels.
            config: the settings that both sides train with.
            batches: yields images, float32 [b, channels, side, side].
            side: of the images, in pixels.
            channels: of the images.
            wrap: of a network, what its gradients are taken through.
        """
        self._config, self._batches = config, batches
        self.generator, self.discriminator = make(config, side, channels)
        self._average = copy.deepcopy(self.generator)
        self._wrapped = wrap(self.generator), wrap(self.discriminator)
        betas = config.beta_1, config.beta_2
        self._optimizers = [
            torch.optim.Adam(network.parameters(), rate, betas)
            for network, rate in (
                (self.generator, config.generator_learning_rate),
                (self.discriminator, config.discriminator_learning_rate),
            )
        ]
        self._decay = 0.5 ** (config.batch_size / config.ema_half_life_images)

    def turn(self, num_steps: int) -> None:
        """Trains some steps."""
        for _ in range(num_steps):
            for _ in range(self._config.discriminator_steps):
                self._judge()
            self._generate()
            with torch.no_grad():
                for mean, weight in zip(
                    self._average.parameters(),
                    self.generator.parameters(),
                    strict=True,
                ):
                    mean.lerp_(weight, 1.0 - self._decay)

    def _latents(self) -> torch.Tensor:
        return torch.randn(self._config.batch_size, self._config.latent_size)

    def _judge(self) -> None:
        config = self._config
        reals = torch.as_tensor(next(self._batches))
        with torch.no_grad():
            fakes = self.generator(self._latents())
        penalty = torch.zeros([])
        logits = []
        for images, gamma in (
            (reals, config.r1_gamma),
            (fakes, config.r2_gamma),
        ):
            images = images.detach().requires_grad_(bool(gamma))
            made = self._wrapped[1](images)[:, 0]
            logits.append(made)
            if gamma:
                [gradient] = torch.autograd.grad(
                    made.sum(), images, create_graph=True
                )
                squares = gradient.square().sum((1, 2, 3))
                penalty = penalty + 0.5 * gamma * squares.mean()
        real, fake = logits
        if config.loss == "hinge":
            loss = functional.relu(1.0 - real) + functional.relu(1.0 + fake)
        elif config.loss == "relativistic":
            loss = functional.softplus(fake - real)
        else:
            loss = functional.softplus(-real) + functional.softplus(fake)
        self._follow(1, loss.mean() + penalty)

    def _generate(self) -> None:
        fakes = self._wrapped[0](self._latents())
        fake = self.discriminator(fakes)[:, 0]
        if self._config.loss == "hinge":
            loss = -fake
        elif self._config.loss == "relativistic":
            reals = torch.as_tensor(next(self._batches))
            loss = functional.softplus(self.discriminator(reals)[:, 0] - fake)
        else:
            loss = functional.softplus(-fake)
        self._follow(0, loss.mean())

    def _follow(self, number: int, loss: torch.Tensor) -> None:
        optimizer = self._optimizers[number]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
