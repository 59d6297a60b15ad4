"""Settings of what a run measures of itself as it goes."""

from __future__ import annotations

import dataclasses

from dtrain import flags

# A resumed run may have other values of all of these.
_measuring = flags.fields_of("Evaluation", may_change=True)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How often samples are measured against the data, and how."""

    evaluate_every_steps: int = _measuring(
        0,
        "Steps between two evaluations, whose figures stand in metrics.jsonl "
        "and figures.jsonl; 0 makes none. See docs/quality.md.",
        minimum=0,
    )
    evaluate_figures: str = _measuring(
        "",
        "Names with commas between them, as frechet_distance,recall; empty is "
        "all that data, model and extractor allow.",
    )
    evaluate_num_images: int = _measuring(
        2048,
        "Samples of an evaluation, and real images, where there are as many.",
        minimum=1,
        below=2**31,
    )
    evaluate_extractor: str = _measuring(
        "auto",
        "What makes features of images: classifier (trained here on the "
        "labels), pixels, inception:FILE (the graph of the original FID) or "
        "package.module:make; auto is classifier where there are labels, and "
        "else pixels.",
    )
    evaluate_budget_percent: float = _measuring(
        0.0,
        "Share of the time that evaluations may take: those that would go "
        "beyond are left out. Which these are follows from the clock; 0 leaves "
        "out none.",
        minimum=0.0,
        below=100.0,
    )
    evaluate_cache_dir: str = _measuring(
        "",
        "Where classifiers, and what extractors say of real images, are kept; "
        "empty is ~/.cache/dtrain.",
    )
