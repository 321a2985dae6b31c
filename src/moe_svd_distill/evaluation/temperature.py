"""What one temperature on the untouched student's logits gains: the share of a gain that is mere recalibration.

With the student's logits z and the inverse temperature β = 1/T, a token's KL is Σp log p − β·E_p z + log Σexp(βz) and
its cross-entropy log Σexp(βz) − β·z_target. Only log Σexp(βz) is not linear in β, so one pass over the text keeps the
linear parts exactly, and of log Σexp(βz) the value, the slope E_q z and the curvature Var_q z at a few β (q: the
student's distribution at β). Quintic Hermite interpolation between these gives KL and cross-entropy of every document
at every temperature; the tests hold it against dividing the logits. KL is convex in β, so its lowest point is unique
(temperature scaling: Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.algebra.figures import FloatArray, Measurement, halves
from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.evaluation.result import TemperatureControl
from moe_svd_distill.evaluation.uncertainty import Bootstrap, gap_between

LOWEST, HIGHEST = 0.25, 4.0  # temperatures to search between
_EDGE = 1.01  # times either end of the range: as good as at it
_STEPS_PER_OCTAVE = 3
_CACHED = 1 << 18  # logits worked on at a time, so that they stay in a processor's cache
_FAR_BELOW = -1e4  # nats below the largest logit: nothing at any β, and no infinity in the products


@dataclass(frozen=True, eq=False)
class TemperatureCurve:
    """KL and cross-entropy of every document as functions of one temperature on the student's logits.

    Attributes:
        untouched: The measurement at temperature 1.
        constant: Σp log p of every document, (documents,).
        expected: E_p z, (documents,).
        target: z of the tokens that follow, (documents,).
        partition: log Σexp(βz) as a function of log β, (documents,).
    """

    untouched: Measurement
    constant: FloatArray
    expected: FloatArray
    target: FloatArray
    partition: Any

    def at(self, temperature: float) -> Measurement:
        """The measurement of the student with its logits divided by the temperature; top-1 agreement stays."""
        beta = 1.0 / temperature
        partition = np.asarray(self.partition(np.log(beta)), dtype=np.float64)
        kl = self.constant - beta * self.expected + partition
        return Measurement(
            np.maximum(kl, 0.0),
            partition - beta * self.target,
            self.untouched.agreement,
            self.untouched.tokens,
        )

    def best(self, documents: NDArray[np.int64]) -> float:
        """The temperature of lowest KL over some documents, between `LOWEST` and `HIGHEST`."""
        from scipy.optimize import minimize_scalar

        found = minimize_scalar(
            lambda u: float(self.at(float(np.exp(-u))).kl[documents].sum()),
            bounds=(-np.log(HIGHEST), -np.log(LOWEST)),
            method="bounded",
            options={"xatol": 1e-5},
        )
        return float(np.exp(-found.x))


class TemperatureReader:
    """Takes from a pass of the untouched student what a temperature curve needs.

    Args:
        units: The document of every token that is compared (see `TeacherRecord`).
    """

    def __init__(self, units: IntArray) -> None:
        octaves = float(np.log2(HIGHEST / LOWEST))
        points = round(octaves * _STEPS_PER_OCTAVE) + 1
        self.log_beta = np.linspace(-np.log(HIGHEST), -np.log(LOWEST), points)
        self.units = torch.from_numpy(units)
        documents = int(self.units.max()) + 1
        self.linear = torch.zeros(documents, 3, dtype=torch.float64)
        self.moments = torch.zeros(documents, points, 3, dtype=torch.float64)
        self.read = 0

    def add(self, wanted: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take the sums of a chunk of tokens."""
        documents = self.units[self.read : self.read + len(targets)]
        self.read += len(targets)
        scores = torch.log_softmax(wanted.float(), dim=-1)
        probability = scores.exp()
        possible = probability > 0
        zero = torch.zeros((), device=logits.device)
        linear = (
            torch.where(possible, probability * scores, zero).sum(-1),
            torch.where(possible, probability * logits, zero).sum(-1),
            logits.gather(-1, targets.long()[:, None]).squeeze(-1),
        )
        self.linear.index_add_(0, documents, torch.stack(linear, -1).double().cpu())
        self.moments.index_add_(0, documents, self._moments(logits).double().cpu())

    def curve(self, untouched: Measurement) -> TemperatureCurve:
        """The curve, once everything has been read."""
        from scipy.interpolate import BPoly

        beta = np.exp(self.log_beta)[:, None]
        value, mean, variance = (self.moments[..., order].numpy().T for order in range(3))  # (points, documents)
        slope = beta * mean  # in log β
        curvature = slope + beta**2 * variance
        partition = BPoly.from_derivatives(self.log_beta, np.stack([value, slope, curvature], axis=1))
        constant, expected, target = self.linear.numpy().T
        return TemperatureCurve(untouched, constant, expected, target, partition)

    def _moments(self, logits: Tensor) -> Tensor:
        """log Σexp(βz), E_q z and Var_q z at every β, (tokens, points, 3)."""
        rows = max(1, _CACHED // logits.shape[-1])
        parts = (logits[begin : begin + rows] for begin in range(0, len(logits), rows))
        return torch.cat([self._moments_of(part) for part in parts])

    def _moments_of(self, logits: Tensor) -> Tensor:
        top = logits.amax(-1)
        below = (logits - top[:, None]).clamp_min(_FAR_BELOW)
        squared = below.square()
        columns: list[Tensor] = [top] * len(self.log_beta)
        for first in range(_STEPS_PER_OCTAVE):
            weight = (below * float(np.exp(self.log_beta[first]))).exp_()
            for point in range(first, len(self.log_beta), _STEPS_PER_OCTAVE):
                if point > first:
                    weight.square_()  # one octave on, β has doubled
                total = weight.sum(-1)
                mean = torch.linalg.vecdot(weight, below) / total
                variance = torch.linalg.vecdot(weight, squared) / total - mean.square()
                partition = float(np.exp(self.log_beta[point])) * top + total.log()
                columns[point] = torch.stack((partition, top + mean, variance), dim=-1)
        return torch.stack(columns, dim=1)


def temperature_control(
    curve: TemperatureCurve, fitted: TemperatureCurve | None, after: Measurement, teacher: Measurement, seed: int
) -> TemperatureControl | None:
    """Fit T on one text, or one half, and measure it on the other; None where a single document leaves no other."""
    if fitted is None:
        fitted_on, (fit, measured) = "half of the text", halves(after.tokens)
        fitted = curve
    else:
        fitted_on, measured = "calibration text", np.arange(len(after.tokens))
        fit = np.arange(len(fitted.untouched.tokens))
    if not len(fit) or not len(measured):
        return None
    temperature = fitted.best(fit)
    bootstrap = Bootstrap(len(measured), seed=seed)
    before, adapted, own = (part.of(measured) for part in (curve.untouched, after, teacher))
    recalibrated = curve.at(temperature).of(measured)
    return TemperatureControl(
        temperature=temperature,
        fitted_on=fitted_on,
        at_edge=not LOWEST * _EDGE < temperature < HIGHEST / _EDGE,
        student=bootstrap.figures(before),
        figures=bootstrap.figures(recalibrated),
        gap_closed=gap_between(before, recalibrated, own, bootstrap),
        adapter_gap_closed=gap_between(before, adapted, own, bootstrap),
        adapter_ahead=bootstrap.kl_fall(recalibrated, adapted),
    )
