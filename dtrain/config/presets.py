"""Recipes by name: what `--preset` puts where no flag says otherwise.

A preset is a small value: what it is for, and the settings that differ from
those of a plain run. A flag that is given wins; config.json holds the name and
all that came of it, so a preset that changes in a later version changes no run
that has begun.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A recipe.

    Attributes:
        paper: where it comes from.
        purpose: what it is for.
        cost: what it costs, beside others.
        reaches: what was published of it, or measured by docs/results.md.
        settings: values of flags by name.
        decided: flags that are decided when the images and the devices are
            known (`decide`), unless they are given.
    """

    paper: str
    purpose: str
    cost: str
    reaches: str
    settings: Mapping[str, Any]
    decided: tuple[str, ...] = ()


def of(name: str) -> Preset:
    """Returns a preset; that without a name changes nothing."""
    return PRESETS.get(name, _NONE)


def decide(image_size: int, num_devices: int) -> dict[str, Any]:
    """Decides what `auto` leaves open; returns values by the flag's name.

    The rules are those of stylegan2-ada-pytorch's `--cfg=auto` (Karras et al.
    2020, Training Generative Adversarial Networks with Limited Data,
    appendix C), which keep an H100 or eight of them busy and have been tried
    at all sizes: fewer images at once as they grow, R1 in proportion to the
    pixels of an image, an average over ten thirds of a batch in thousands.

    Args:
        image_size: the larger side, in pixels.
        num_devices: of all workers.
    """
    images = max(1, min(4096 // image_size, 32, 64 // num_devices))
    batch_size = num_devices * images
    feature_maps = 0.5 if image_size < 512 else 1.0
    learning_rate = 0.0025 if image_size < 1024 else 0.002
    return {
        "batch_size": batch_size,
        "r1_gamma": 0.0002 * image_size**2 / batch_size,
        "generator_learning_rate": learning_rate,
        "discriminator_learning_rate": learning_rate,
        "ema_half_life_images": batch_size * 10_000 / 32,
        # At the full size, from where they double to 512.
        "base_channels": min(int(feature_maps * 32768 / image_size), 512),
    }


# What `decide` does, in words.
RULE = (
    "the smallest of 4,096 / pixels, 32 and 64 / devices is the images of a "
    "device in a batch; r1_gamma is 0.0002 pixels^2 / batch_size; learning "
    "rates 0.0025, 0.002 from 1,024 pixels on; ema_half_life_images "
    "batch_size x 10,000 / 32; base_channels 16,384 / pixels, twice that from "
    "512 on, at most 512"
)
_NONE = Preset("", "", "", "", types.MappingProxyType({}))
_DCGAN = {
    "model": "dcgan",
    "batch_norm": True,
    "latent_size": 100,
    "base_channels": 64,
    "r1_gamma": 0.0,
    "batch_size": 128,
    "generator_learning_rate": 2e-4,
    "discriminator_learning_rate": 2e-4,
    "beta_1": 0.5,
    "beta_2": 0.999,
}
_SPECTRAL = {
    "generator_learning_rate": 2e-4,
    "discriminator_learning_rate": 2e-4,
    "beta_1": 0.0,
}
_STYLEGAN2 = {
    "model": "stylegan2",
    "loss": "non_saturating",
    "latent_size": 512,
    "beta_1": 0.0,
    "beta_2": 0.99,
}
_TRANSLATORS = {
    "base_channels": 64,
    "batch_size": 1,
    "generator_learning_rate": 2e-4,
    "discriminator_learning_rate": 2e-4,
    "beta_1": 0.5,
    "beta_2": 0.999,
}

PRESETS: Mapping[str, Preset] = types.MappingProxyType(
    {
        "dcgan": Preset(
            paper="Radford et al. 2015, Unsupervised Representation Learning "
            "with Deep Convolutional GANs (arXiv 1511.06434)",
            purpose="the baseline that everybody knows, from 8 to 128 pixels",
            cost="the least of all",
            reaches="48.3 on CIFAR-10 in StudioGAN's table (FID), and "
            "collapses when trained on: keep the best",
            settings=_DCGAN,
        ),
        "lsgan": Preset(
            paper="Mao et al. 2017, Least Squares Generative Adversarial "
            "Networks (arXiv 1611.04076)",
            purpose="dcgan with a loss whose gradient does not vanish",
            cost="that of dcgan",
            reaches="40.2 on CIFAR-10 in StudioGAN's table (FID)",
            settings={**_DCGAN, "loss": "least_squares"},
        ),
        "wgan_gp": Preset(
            paper="Gulrajani et al. 2017, Improved Training of Wasserstein "
            "GANs (arXiv 1704.00028), algorithm 1",
            purpose="a loss that follows the quality and hardly ever collapses",
            cost="five steps of the critic for each of the generator, each "
            "with a second derivative: about six times dcgan",
            reaches="22.3 on CIFAR-10 with a ResNet (torch-mimicry, FID), 24.5 "
            "on Fashion-MNIST (Lucic et al. 2018)",
            settings={
                **_DCGAN,
                "loss": "wgan_gp",
                "latent_size": 128,
                "discriminator_steps": 5,
                "gradient_penalty": 10.0,
                "batch_size": 64,
                "generator_learning_rate": 1e-4,
                "discriminator_learning_rate": 1e-4,
                "beta_1": 0.0,
                "beta_2": 0.9,
            },
        ),
        "sngan": Preset(
            paper="Miyato et al. 2018, Spectral Normalization for Generative "
            "Adversarial Networks (arXiv 1802.05957)",
            purpose="residual networks that train without a penalty, from 8 to "
            "128 pixels; with --conditional, the projection discriminator of "
            "Miyato and Koyama 2018",
            cost="4.3 and 1.1 million weights at 32 pixels, 12.2 and 10.1 at "
            "64; five steps of the discriminator for each of the generator",
            reaches="16.8 on CIFAR-10, and 10.8 with labels (torch-mimicry, "
            "FID)",
            settings={
                "model": "sngan",
                "loss": "hinge",
                "latent_size": 128,
                "base_channels": 64,
                "r1_gamma": 0.0,
                "discriminator_steps": 5,
                "batch_size": 64,
                **_SPECTRAL,
                "beta_2": 0.9,
            },
        ),
        "biggan_small": Preset(
            paper="Brock et al. 2019, Large Scale GAN Training for High "
            "Fidelity Natural Image Synthesis (arXiv 1809.11096)",
            purpose="data of many kinds with labels (add --conditional), from "
            "8 to 128 pixels; sample --truncation=0.5 draws the best of it",
            cost="4.5 and 4.3 million weights at 32 pixels; two steps of the "
            "discriminator (four in the authors' code for CIFAR-10), and an "
            "average of the weights",
            reaches="4.16 on CIFAR-10 with labels in StudioGAN's table (FID)",
            settings={
                "model": "biggan_small",
                "loss": "hinge",
                "latent_size": 128,
                "base_channels": 64,
                "r1_gamma": 0.0,
                "discriminator_steps": 2,
                "batch_size": 64,
                **_SPECTRAL,
                "beta_2": 0.999,
            },
        ),
        "r3gan": Preset(
            paper="Huang et al. 2024, The GAN is dead; long live the GAN! A "
            "Modern Baseline GAN (R3GAN, arXiv 2501.05441), as for CIFAR-10",
            purpose="the best figures for the fewest tricks, from 8 to 512 "
            "pixels; with float32 or bfloat16, never float16, and "
            "with both penalties in each step. Scale --r1_gamma and --r2_gamma "
            "with the pixels: the paper has 2 for 64 and 150 for 256",
            cost="most of all: 42 million weights, and both penalties take "
            "second derivatives; the authors trained 4 days on 8 L40",
            reaches="1.96 on CIFAR-10, with --conditional --augment=ada "
            "--augment_probability=0.55 (the authors' FID); 1,000 modes of "
            "Stacked-MNIST",
            settings={
                "model": "r3gan",
                "latent_size": 64,
                "base_channels": 768,
                "loss": "relativistic",
                "r1_gamma": 0.05,
                "r2_gamma": 0.05,
                "batch_size": 512,
                "num_steps": 400_000,
                "generator_learning_rate": 2e-4,
                "discriminator_learning_rate": 2e-4,
                "beta_1": 0.0,
                "beta_2": 0.9,
                "end_beta_2": 0.99,
                "burn_in_images": 20_000_000.0,
                "end_learning_rate_factor": 0.25,
                "end_gamma_factor": 0.1,
                "ema_half_life_images": 5_000_000.0,
            },
        ),
        "mlp": Preset(
            paper="the loss of Huang et al. 2024, The GAN is dead; long live "
            "the GAN! (R3GAN, arXiv 2501.05441), for points in the plane, as "
            "--dataset=points:grid",
            purpose="counting the modes that a loss covers, in a minute",
            cost="a minute of one CPU core",
            reaches="25 of 25 modes on points:grid (docs/results.md); a plain "
            "GAN 17.3, PacGAN4 24.8 (Lin et al. 2018)",
            settings={
                "model": "mlp",
                "latent_size": 2,
                "base_channels": 128,
                "loss": "relativistic",
                # Of points that lie in [-1, 1]: images take a hundred times.
                "r1_gamma": 0.03,
                "r2_gamma": 0.03,
                "batch_size": 128,
                "num_steps": 40_000,
                "generator_learning_rate": 2e-3,
                "discriminator_learning_rate": 2e-3,
                "beta_1": 0.0,
                "burn_in_images": 5_120_000.0,
                "end_learning_rate_factor": 0.02,
                "end_gamma_factor": 0.01,
                "ema_half_life_images": 20_000.0,
                "steps_per_loop": 500,
                "sample_every_steps": 5000,
            },
        ),
        "auto": Preset(
            paper="stylegan2 with the configuration auto of Karras et al. "
            "2020, Training Generative Adversarial Networks with Limited Data "
            "(arXiv 2006.06676)",
            purpose="images of one kind at any size, if nothing is known of "
            "them: what to run first",
            cost="that of stylegan2, with a mapping of two layers",
            reaches="what stylegan2 does, without a search",
            settings={**_STYLEGAN2, "model_flag": ("mapping_layers=2",)},
            decided=tuple(decide(256, 1)),
        ),
        "stylegan2": Preset(
            paper="Karras et al. 2020, Analyzing and Improving the Image "
            "Quality of StyleGAN (arXiv 1912.04958)",
            purpose="images of one kind, square, of 8 to 1,024 pixels, with "
            "latents that mean something; --augment=ada makes it "
            "StyleGAN2-ADA, where there are few",
            cost="24.8 and 24.0 million weights at 256 pixels; R1 in each 16th "
            "step, path lengths in each 4th: 21.6 s per 1,000 images of 256 "
            "pixels on a V100 (stylegan2-ada-pytorch)",
            reaches="3.78 on CIFAR-10 in StudioGAN's table (FID), 2.31 with "
            "adaptive augmentation",
            settings=_STYLEGAN2,
            decided=tuple(decide(256, 1)),
        ),
        "pix2pix": Preset(
            paper="Isola et al. 2017, Image-to-Image Translation with "
            "Conditional Adversarial Networks (arXiv 1611.07004)",
            purpose="images that are made of other images, from pairs: name "
            "what is translated by --paired=given=DATASET, or say which half "
            "of each image is the target by --model_flag=target=left",
            cost="54.4 and 2.8 million weights at 256 pixels; a batch of one, "
            "so --batch_size=N for N devices",
            reaches="0.71 of the pixels right on Cityscapes (per-pixel "
            "accuracy of an FCN, table 2 of the CycleGAN paper)",
            settings={**_TRANSLATORS, "model": "pix2pix"},
        ),
        "cyclegan": Preset(
            paper="Zhu et al. 2017, Unpaired Image-to-Image Translation using "
            "Cycle-Consistent Adversarial Networks (arXiv 1703.10593)",
            purpose="images that are made of other images, without pairs: name "
            "the second set by --unpaired=other=DATASET",
            cost="four networks, twice 11.4 and 2.8 million weights at 256 "
            "pixels; about twenty times pix2pix",
            reaches="0.52 of the pixels right on Cityscapes, where pix2pix "
            "with its pairs has 0.71 (the paper's table 2)",
            settings={**_TRANSLATORS, "model": "cyclegan"},
        ),
    }
)
