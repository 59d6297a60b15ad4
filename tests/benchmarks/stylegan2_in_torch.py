"""stylegan2 in PyTorch, as one would write it there.

The networks have as many weights as dtrain's, which `presets.in_torch` checks.
Styles are mixed, features are scaled in place of kernels, as
stylegan2-ada-pytorch does in training, and R1 and path lengths are taken now
and then. For small images on a CPU, so there is no kernel of its own.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dtrain.config import Config
from tests.benchmarks import in_torch

_EPSILON = 1e-8
_OF_TWO = math.sqrt(0.5)
_R1_EVERY_STEPS, _LENGTH_EVERY_STEPS = 16, 4


def activated(features: torch.Tensor) -> torch.Tensor:
    """Returns the activation, which keeps the variance."""
    return math.sqrt(2.0) * functional.leaky_relu(features, 0.2)


class Dense(nn.Module):
    """Multiplies vectors by a matrix with an equalized learning rate."""

    def __init__(
        self,
        before: int,
        width: int,
        *,
        is_activated: bool = False,
        multiplier: float = 1.0,
        first_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, before) / multiplier)
        self.bias = nn.Parameter(torch.full([width], first_bias))
        self.is_activated, self.multiplier = is_activated, multiplier
        self.gain = multiplier / math.sqrt(before)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        made = functional.linear(
            vectors, self.gain * self.weight, self.multiplier * self.bias
        )
        return activated(made) if self.is_activated else made


class Filter(nn.Module):
    """Filters each channel by [1, 3, 3, 1]."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        kernel = torch.outer(row, row)[None, None].repeat(width, 1, 1, 1)
        self.register_buffer("kernel", kernel)
        self.width, self.padding = width, padding

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(
            features, self.kernel, padding=self.padding, groups=self.width
        )


class Conv(nn.Module):
    """Convolves with an equalized learning rate, and may halve."""

    def __init__(
        self,
        before: int,
        width: int,
        size: int,
        *,
        is_skip: bool = False,
        halves: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, before, size, size))
        self.bias = None if is_skip else nn.Parameter(torch.zeros(width))
        self.scale = 1.0 / math.sqrt(before * size**2)
        self.halves, self.gain = halves, gain
        self.padding = 0 if halves else size // 2
        self.filter = nn.Identity()
        if is_skip:
            self.filter = in_torch.Resample(before, doubles=False)
        elif halves:
            self.filter = Filter(before, 2)
        self.stride = 2 if halves and not is_skip else 1

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        made = functional.conv2d(
            self.filter(features),
            self.scale * self.weight,
            self.bias,
            self.stride,
            self.padding,
        )
        return self.gain * (made if self.bias is None else activated(made))


class Modulated(nn.Module):
    """Convolves features that each example scales by its style."""

    def __init__(self, before: int, width: int, style: int, size: int) -> None:
        super().__init__()
        self.affine = Dense(style, before, first_bias=1.0)
        self.weight = nn.Parameter(torch.randn(width, before, size, size))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = 1.0 / math.sqrt(before * size**2)


class StyledConv(Modulated):
    """Demodulates, adds noise and activates, too."""

    def __init__(
        self, before: int, width: int, style: int, *, doubles: bool
    ) -> None:
        super().__init__(before, width, style, 3)
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.filter = Filter(width, 1) if doubles else None

    def forward(
        self, features: torch.Tensor, style: torch.Tensor
    ) -> torch.Tensor:
        scales, kernel = self.affine(style), self.scale * self.weight
        features = features * scales[:, :, None, None]
        if self.filter:
            made = functional.conv_transpose2d(
                features, kernel.transpose(0, 1), stride=2
            )
            made = 4.0 * self.filter(made)
        else:
            made = functional.conv2d(features, kernel, padding=1)
        variances = scales.square() @ kernel.square().sum((2, 3)).T
        made = made * (variances + _EPSILON).rsqrt()[:, :, None, None]
        noise = torch.randn(len(made), 1, *made.shape[2:])
        made = made + self.noise_strength * noise
        return activated(made + self.bias[:, None, None])


class ToImage(Modulated):
    """Makes an image."""

    def forward(
        self, features: torch.Tensor, style: torch.Tensor
    ) -> torch.Tensor:
        scales = self.affine(style)[:, :, None, None]
        return functional.conv2d(
            features * scales, self.scale * self.weight, self.bias
        )


class Generator(nn.Module):
    """Mapping and synthesis."""

    def __init__(
        self, widths: list[int], channels: int, size: int, num_layers: int
    ) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            *[
                Dense(size, size, is_activated=True, multiplier=0.01)
                for _ in range(num_layers)
            ]
        )
        self.constant = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.convs = nn.ModuleList(
            [StyledConv(widths[0], widths[0], size, doubles=False)]
        )
        for before, width in itertools.pairwise(widths):
            self.convs += [
                StyledConv(before, width, size, doubles=True),
                StyledConv(width, width, size, doubles=False),
            ]
        self.to_images = nn.ModuleList(
            [ToImage(width, channels, size, 1) for width in widths]
        )
        self.up = in_torch.Resample(channels, doubles=True)
        self.num_styles = len(self.convs) + 1
        self.register_buffer("mean_style", torch.zeros(size))

    def _map(self, latents: torch.Tensor) -> torch.Tensor:
        size = math.sqrt(latents.shape[1])
        return self.mapping(functional.normalize(latents) * size)

    def styles(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns those of each convolution, some of other latents."""
        style = self._map(latents)
        with torch.no_grad():
            self.mean_style.lerp_(style.mean(0), 0.005)
        other = self._map(torch.randn_like(latents))
        cut = torch.randint(1, self.num_styles, [len(latents)])
        cut[torch.rand(len(latents)) >= 0.9] = self.num_styles
        is_other = torch.arange(self.num_styles) >= cut[:, None]
        return torch.where(is_other[:, :, None], other[:, None], style[:, None])

    def synthesize(self, styles: torch.Tensor) -> torch.Tensor:
        """Returns images of styles [b, n, size]."""
        features = self.constant.repeat(len(styles), 1, 1, 1)
        features = self.convs[0](features, styles[:, 0])
        image = self.to_images[0](features, styles[:, 1])
        for level, to_image in enumerate(self.to_images[1:]):
            number = 2 * level + 1
            for each in (number, number + 1):
                features = self.convs[each](features, styles[:, each])
            image = self.up(image) + to_image(features, styles[:, number + 2])
        return image

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.synthesize(self.styles(latents))


class Block(nn.Module):
    """A residual block of the discriminator, which halves."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            Conv(before, before, 3),
            Conv(before, width, 3, halves=True, gain=_OF_TWO),
        )
        self.skip = Conv(
            before, width, 1, is_skip=True, halves=True, gain=_OF_TWO
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.inner(features) + self.skip(features)


class Deviation(nn.Module):
    """Adds a channel: how much the images of a group differ."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        count, _, height, width = features.shape
        groups = features.view(-1, self.group_size, *features.shape[1:])
        variances = groups.var(1, unbiased=False)
        deviations = (variances + _EPSILON).sqrt().mean((1, 2, 3))
        shown = deviations.repeat_interleave(self.group_size)
        shown = shown[:, None, None, None].expand(count, 1, height, width)
        return torch.cat([features, shown], 1)


def make(config: Config, side: int, channels: int) -> tuple[nn.Module, ...]:
    """Makes both networks for images of 4 pixels and doublings of it."""
    flags = dict(each.split("=") for each in config.model_flag)
    levels = int(math.log2(side // 4))
    widths = [
        min(config.base_channels * 2**level, 512)
        for level in reversed(range(levels + 1))
    ]
    generator = Generator(
        widths,
        channels,
        config.latent_size,
        int(flags.get("mapping_layers", 8)),
    )
    top = widths[0]
    discriminator = nn.Sequential(
        Conv(channels, widths[-1], 1),
        *[Block(*pair) for pair in itertools.pairwise(widths[::-1])],
        Deviation(int(flags.get("group_size", 4))),
        Conv(top + 1, top, 3),
        nn.Flatten(),
        Dense(16 * top, top, is_activated=True),
        Dense(top, 1),
    )
    return generator, discriminator


class Training(in_torch.Training):
    """A loop with penalties that are taken now and then."""

    def __init__(
        self, config: Config, batches: Iterator[Any], side: int
    ) -> None:
        # Without R1 in each step.
        plain = dataclasses.replace(config, r1_gamma=0.0)
        super().__init__(make, plain, batches, side)
        self._r1_gamma, self._step = config.r1_gamma, 0
        self._mean_length = torch.zeros([])
        for optimizer, every in zip(
            self._optimizers,
            (_LENGTH_EVERY_STEPS, _R1_EVERY_STEPS),
            strict=True,
        ):
            power = every / (every + 1)
            for group in optimizer.param_groups:
                group["lr"] *= power
                group["betas"] = tuple(beta**power for beta in group["betas"])

    def _judge(self) -> None:
        super()._judge()
        if self._step % _R1_EVERY_STEPS == 0:
            reals = torch.as_tensor(next(self._batches)).requires_grad_()
            [gradient] = torch.autograd.grad(
                self.discriminator(reals).sum(), reals, create_graph=True
            )
            penalty = gradient.square().sum((1, 2, 3)).mean()
            weight = _R1_EVERY_STEPS * 0.5 * self._r1_gamma
            self._follow(1, weight * penalty)

    def _generate(self) -> None:
        super()._generate()
        if self._step % _LENGTH_EVERY_STEPS == 0:
            # Of every other example.
            styles = self.generator.styles(self._latents())[::2]
            images = self.generator.synthesize(styles)
            seen = images * torch.randn_like(images) / images.shape[2]
            [gradient] = torch.autograd.grad(
                seen.sum(), styles, create_graph=True
            )
            lengths = (gradient.square().sum(2).mean(1) + _EPSILON).sqrt()
            loss = (lengths - self._mean_length).square().mean()
            self._mean_length.lerp_(lengths.detach().mean(), 0.01)
            self._follow(0, _LENGTH_EVERY_STEPS * 2.0 * loss)
        self._step += 1
