"""The pictures of the report, each as the bytes of an SVG or PNG file. Drawn without a display.

An SVG has no background, and its lines and letters are of the colour of the text around it, so that it can be read on
a light page and on a dark one. The other colours have a contrast of 3 or more against both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.report.facts import Grid
from moe_svd_distill.report.figures import number
from moe_svd_distill.report.record import EvaluationRecord, FitRecord, TrainingRecord

_GREY, _BLUE, _ORANGE, _GREEN, _RED = "#7d8590", "#1f6feb", "#cf7c18", "#2da44e", "#cf222e"
_INK, _FAINT = "#010203", (0.5, 0.5, 0.5, 0.25)
_WIDTH = 4.6  # inches: letters keep their size on a telephone
_STYLE = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "svg.hashsalt": "moe-svd-distill",
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def figures_picture(evaluation: EvaluationRecord | None, kind: str = "svg") -> bytes | None:
    """KL as bars and cross-entropy as points: untouched student, adapter, control, and the teacher as a line.

    None without figures.
    """
    found = evaluation.on_text if evaluation else None
    if found is None or not math.isfinite(found.teacher.cross_entropy):
        return None
    measured = [("student", found.student, _GREY), ("adapter", found.adapted, _BLUE)]
    measured += [(f"random {each.seed}", each.figures, _ORANGE) for each in found.controls]
    rows = [
        (name, colour, (each.kl, _whisker(each.kl_error)), (each.cross_entropy, _whisker(each.cross_entropy_error)))
        for name, each, colour in measured
        if math.isfinite(each.kl) and math.isfinite(each.cross_entropy)
    ]
    if len(rows) < len(measured):
        return None
    names, colours, kl, entropy = zip(*rows, strict=True)
    teacher, places = found.teacher.cross_entropy, list(range(len(rows)))[::-1]
    with _figure(_WIDTH, 1.5 + 0.4 * len(rows)) as figure:
        upper, lower = figure.subplots(2, 1)
        values, errors = zip(*kl, strict=True)
        whiskers = {"ecolor": _INK, "capsize": 3, "linewidth": 1}
        upper.barh(places, values, 0.62, color=colours, xerr=errors, error_kw=whiskers)
        for place, (value, error) in zip(places, kl, strict=True):
            upper.annotate(f"{value:.3f}", (value + error, place), (5, 0), textcoords="offset points", va="center")
        upper.set(title="KL to the teacher (0 is best)", yticks=places, yticklabels=names)
        upper.set_xlim(0, 1.3 * max([*values, 1e-9]))
        lower.axvline(teacher, color=_GREEN, linewidth=1.5)
        lower.annotate("teacher", (teacher, -0.5), (4, 0), textcoords="offset points")
        for place, (value, error), colour in zip(places, entropy, colours, strict=True):
            lower.errorbar(value, place, xerr=error, fmt="o", color=colour, capsize=3)
            lower.annotate(f"{value:.3f}", (value + error, place), (6, 0), textcoords="offset points", va="center")
        lower.set(title="Cross-entropy of the text", xlabel="nats per token", yticks=places, yticklabels=names)
        lower.set_ylim(-0.7, places[0] + 0.6)
        lower.margins(x=0.25)
        lower.grid(axis="x", alpha=0.25)
        return _file(figure, kind)


def scale_picture(search: ScaleDecision, kind: str = "svg") -> bytes | None:
    """How far KL and cross-entropy fall as the whole adapter is turned up; None if that was not tried."""
    alike = [trial for trial in search.trials if len(set(trial.scales.values())) == 1]
    points = sorted(((next(iter(trial.scales.values())), trial) for trial in alike), key=lambda point: point[0])
    if len(points) < 2:
        return None
    untouched = points[0][1].kl + points[0][1].kl_fall
    scales = [scale for scale, _ in points]
    with _figure(_WIDTH, 2.9) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=_INK, linewidth=0.8)
        kl = [(trial.kl_fall, trial.kl_fall_error) for _, trial in points]
        entropy = [(trial.cross_entropy_fall, trial.cross_entropy_fall_error) for _, trial in points]
        for found, colour, name in ((kl, _BLUE, "KL"), (entropy, _ORANGE, "cross-entropy")):
            falls, errors = zip(
                *((fall, 3 * error if math.isfinite(error) else 0.0) for fall, error in found), strict=True
            )
            axes.errorbar(scales, falls, yerr=errors, fmt="o-", color=colour, capsize=3, markersize=4, label=name)
        axes.set(title="What falls when the adapter is turned up", xlabel="scale of the whole adapter")
        axes.set_ylabel("fall, nats per token\n(above 0 is better)")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.6 * untouched), max(high, 0.02 * untouched))
        if low < -0.6 * untouched:
            words = f"at scale {scales[-1]:g}: {number(points[-1][1].kl_fall, 2)} (KL)"
            axes.annotate(words, (scales[-1], -0.6 * untouched), (0, 6), ha="right", zorder=5,
                          textcoords="offset points")  # fmt: skip
            axes.plot(scales[-1], -0.6 * untouched, "v", color=_RED, clip_on=False)
        axes.legend(frameon=False, loc="best")
        axes.grid(alpha=0.25)
        return _file(figure, kind)


def curve_picture(training: TrainingRecord | None, kind: str = "svg") -> bytes | None:
    """Training loss and KL on calibration text by tokens trained on, the kept state marked; None without a curve.

    A loss other than KL (another divergence, or with cross-entropy in it) has an axis of its own on the right.
    """
    points = [point for point in training.curve if _finite(point.kl)] if training else []
    if training is None or len(points) < 2:
        return None
    how = training.settings
    alike = how is None or (how.divergence == "forward" and not how.cross_entropy_share)
    with _figure(_WIDTH, 2.9) as figure:
        axes = figure.subplots()
        tokens, kl = zip(*((point.tokens, point.kl) for point in points), strict=True)
        losses = [(point.tokens, point.loss) for point in points if _finite(point.loss)]
        beside = axes if alike or not losses else axes.twinx()
        lines = axes.plot(tokens, kl, "o-", color=_BLUE, markersize=4, label="KL on calibration text")
        if losses:
            lines += beside.plot(*zip(*losses, strict=True), color=_ORANGE, linewidth=1.2, label="training loss")
        kept = (
            training.curve[training.best] if training.best is not None and training.best < len(training.curve) else None
        )
        if kept in points:
            lines += axes.plot(kept.tokens, kept.kl, "o", color=_GREEN, markersize=9, zorder=4, label="kept")
            axes.annotate(f"{kept.kl:.4f}", (kept.tokens, kept.kl), (0, 9), textcoords="offset points",
                          ha="center")  # fmt: skip
        axes.set(title="Training: loss, and KL on calibration text", xlabel="tokens trained on")
        axes.set_ylabel("nats per token")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 2 * kl[0]))
        if beside is not axes:
            beside.set_ylabel("loss")
            beside.spines["right"].set_visible(True)
        axes.legend(handles=lines, frameon=False, loc="upper right")
        axes.grid(alpha=0.25)
        return _file(figure, kind)


def fit_picture(fit: FitRecord | None, kind: str = "svg") -> bytes | None:
    """KL on other text after each pass of the calibrated stage, the kept one marked; None with fewer than two."""
    passes = [(nth, kl) for nth, kl in enumerate(fit.kl_by_pass if fit else ()) if _finite(kl)]
    if fit is None or len(passes) < 2:
        return None
    with _figure(_WIDTH, 2.4) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*passes, strict=True), "o-", color=_BLUE, markersize=4)
        for nth, kl in passes:
            if nth == fit.best_pass:
                axes.plot(nth, kl, "o", color=_GREEN, markersize=9, zorder=4, label="kept")
                axes.annotate(f"{kl:.4f}", (nth, kl), (0, 9), textcoords="offset points", ha="center")
                axes.legend(frameon=False, loc="upper right")
        axes.set(title="Fit: KL on calibration text", xlabel="passes over the text", ylabel="nats per token")
        axes.margins(y=0.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        return _file(figure, kind)


def heat_picture(grid: Grid | None, title: str, kind: str = "svg") -> bytes | None:
    """A share in percent for each role (rows) and layer (columns), faint where there is none; None without a grid."""
    if grid is None:
        return None
    import numpy as np

    values = 100 * np.array([[np.nan if v is None else v for v in row] for row in grid.values], dtype=float)
    columns = len(grid.layers)
    with _figure(_WIDTH, 1.3 + 0.27 * len(grid.roles)) as figure:
        axes = figure.subplots()
        import matplotlib

        colours = matplotlib.colormaps["YlGnBu"].with_extremes(bad=_FAINT)
        top = float(np.nanmax(values))
        image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, aspect="auto", vmin=0, vmax=top or 1)
        step = max(1, columns // 12)
        shown = [i for i in range(columns) if i % step == 0 and i < columns - (step + 1 if step > 1 else 1)]
        shown.append(columns - 1)
        axes.set_xticks(shown, [grid.layers[i] for i in shown])
        axes.set_yticks(range(len(grid.roles)), grid.roles)
        axes.set(title=title, xlabel="student layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if columns <= 7:
            _write_values(axes, values, top)
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03)
        bar.outline.set_visible(False)
        bar.ax.set_title("%", fontsize=9)
        return _file(figure, kind)


def depth_picture(
    edges: Sequence[tuple[int, int, float]], layers: tuple[int | None, int | None], kind: str = "svg"
) -> bytes | None:
    """Which teacher layers each student layer is set against; a line's width is the weight. None without a depth map.

    Args:
        edges: Student layer, teacher layer, weight.
        layers: How many layers student and teacher have; None for as many as have lines.
        kind: svg or png.
    """
    if not edges:
        return None
    student = layers[0] or 1 + max(edge[0] for edge in edges)
    teacher = layers[1] or 1 + max(edge[1] for edge in edges)

    def place(layer: int, count: int) -> float:
        return (layer + 0.5) / count

    with _figure(_WIDTH, 2.3) as figure:
        axes = figure.subplots()
        for left, right, weight in edges:
            if weight <= 0:
                continue
            ends = [place(left, student), place(right, teacher)]
            axes.plot(ends, [0, 1], color=_BLUE, linewidth=0.4 + 2.2 * weight, alpha=0.25 + 0.6 * weight, zorder=1)
        used = {right for _, right, weight in edges if weight > 0}
        for count, height, offset, lit in ((student, 0, -13, None), (teacher, 1, 7, used)):
            spots = [place(layer, count) for layer in range(count)]
            fill = [_GREEN if lit is None or layer in lit else _FAINT for layer in range(count)]
            axes.scatter(spots, [height] * count, s=min(60, 1200 / count), c=fill, zorder=2)
            step = max(1, count // 16)
            for layer in range(0, count, step):
                axes.annotate(str(layer), (spots[layer], height), (0, offset), textcoords="offset points", ha="center",
                              fontsize=8)  # fmt: skip
        axes.set(yticks=[0, 1], yticklabels=["student", "teacher"], xticks=[], xlim=(0, 1), ylim=(-0.28, 1.28))
        axes.set_title("Depth map: teacher layers behind each student layer", pad=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return _file(figure, kind)


def _write_values(axes: Any, values: Any, top: float) -> None:
    import numpy as np

    digits = 0 if top >= 100 else 1
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > 0.6 * top else "black"
            axes.text(column, row, number(value, digits), ha="center", va="center", color=colour, fontsize=8)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _whisker(error: float) -> float:
    """Half of a 95 % interval."""
    return 1.96 * error if math.isfinite(error) else 0.0


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure((width, height), layout="constrained")


def _file(figure: Any, kind: str) -> bytes:
    buffer = BytesIO()
    if kind != "svg":
        figure.savefig(buffer, format=kind, dpi=110, facecolor="white")
        return buffer.getvalue()
    unsaid: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=unsaid, transparent=True)
    return buffer.getvalue().replace(_INK.encode(), b"currentColor")
