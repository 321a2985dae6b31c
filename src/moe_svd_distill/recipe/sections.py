"""Groups of keys: how experts are made, and how the refined stage trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from moe_svd_distill.recipe.section import Section

_FORWARD = "forward"


def _known_divergence(name: str) -> str:
    """One of those that there is a formula for; torch is loaded for others than the usual one alone."""
    if name == _FORWARD:
        return name
    from moe_svd_distill.algebra.divergence import DIVERGENCES

    if name not in DIVERGENCES:
        raise ValueError(f"expected {' or '.join(DIVERGENCES)}")
    return name


def _name_divergences(schema: dict[str, Any]) -> None:
    from moe_svd_distill.algebra.divergence import DIVERGENCES

    schema["enum"] = list(DIVERGENCES)


class ExpertSettings(Section):
    """How the experts of a mixture-of-experts layer are made."""

    fingerprint: Literal["weights", "router", "function"] = Field(
        "weights",
        description="What experts are clustered by: their concatenated weights, their router rows, or a "
        "neuron-order-free sample of the function they compute.",
    )
    clusters: Literal["student"] | Annotated[int, Field(ge=1)] = Field(
        "student", description="Number of clusters; 'student' is the number of experts in the student's layer."
    )
    blend: Literal["frobenius", "uniform"] = Field(
        "frobenius", description="Weights of a cluster's experts: by Frobenius norm, or equal."
    )
    assignment: Literal["optimal", "index"] = Field(
        "optimal",
        description="Which student expert a cluster becomes: the most similar one (optimal assignment), or cluster "
        "number = expert number as in the first generation.",
    )


class TrainingRecipe(Section):
    """How the refined stage trains."""

    epochs: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="Passes over the text. auto: 4 over up to 65,536 tokens, 2.75 over more; after a weights stage, "
        "which leaves less to learn, a fifth of that. Where the head stands still, 2 over fewer than 16,384, else 1.",
    )
    step_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Tokens of one step of the optimiser. auto: about 3,000 steps, of 512 to 65,536 tokens."
    )
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Tokens that go through a layer at once in one process. auto: 512 on a CPU, 8,192 on a GPU."
    )
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="Largest learning rate of the factors. auto: 0.6 divided by the width with Muon, 0.18 with AdamW, "
        "and near it what short trials on calibration text choose, where the training is long enough for them.",
    )
    optimiser: Literal["auto", "muon", "adamw"] = Field(
        "auto",
        description="What moves the factors; AdamW moves the head. auto: Muon, and AdamW where the head stands still.",
    )
    head_rate: float = Field(1.0, gt=0, description="The head's learning rate, as a multiple of the factors'.")
    head: Literal["auto", "train", "fixed"] = Field(
        "auto",
        description="Whether the head is trained as well. auto: where the text, copies included, has at least four "
        "tokens for each of its rows.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type the student computes in while it is trained; factors are float32. auto: bfloat16 on a GPU, "
        "and on a CPU that multiplies it in hardware for a dense student at least 512 wide.",
    )
    divergence: Annotated[str, AfterValidator(_known_divergence)] = Field(
        _FORWARD,
        description="Which divergence from the teacher's distribution is made small: forward, reverse, "
        "jensen-shannon or skewed.",
        json_schema_extra=_name_divergences,
    )
    cross_entropy_share: float = Field(
        0.0, ge=0, le=1, description="Share of the cross-entropy with the text itself in the loss."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of the factors.")
    placement: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="Whether the student is in memory while it is trained, or one layer of it at a time. auto: in "
        "memory if it fits.",
    )
    checks: int = Field(12, ge=1, description="How often the student is measured on calibration text meanwhile.")
    patience: int = Field(
        4, ge=1, description="Checks in a row, none lower than the one before, after which training stops."
    )
    save_seconds: float = Field(120.0, gt=0, description="Seconds between two saves that a killed run goes on from.")
    start_tokens: int = Field(
        32768, ge=512, description="Tokens of the text that a calibrated start is fitted on, at most."
    )


SECTIONS: Mapping[str, type[Section]] = {"experts": ExpertSettings, "training": TrainingRecipe}
