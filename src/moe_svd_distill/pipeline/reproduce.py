"""Reproduce: an adapter's recipe once more, from nothing, in another folder, and what comes out different."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import BadDataError, CannotWriteError, MissingInputError
from moe_svd_distill.evaluation.request import EvaluationOptions
from moe_svd_distill.execution.events import Listener, counting
from moe_svd_distill.files.names import EVALUATION_FILE, PARTS_FOLDER
from moe_svd_distill.files.writing import make_folder, write_json
from moe_svd_distill.pipeline.distill import Adapter, distill, load_adapter
from moe_svd_distill.pipeline.evaluate import ASKED, evaluate
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.recipe import Recipe, parse_recipe

TOLERANCE = 0.01  # of a figure: other versions and devices sum in another order


@dataclass(frozen=True)
class Compared:
    """One value before and now."""

    name: str
    before: object
    now: object

    derived: ClassVar[tuple[str, ...]] = ("same",)

    @property
    def same(self) -> bool:
        """Equal; figures within a hundredth, or both not a number."""
        before, now = self.before, self.now
        if before == now or not (isinstance(before, int | float) and isinstance(now, int | float)):
            return before == now
        return abs(now - before) <= TOLERANCE * abs(before) or (math.isnan(before) and math.isnan(now))


@dataclass(frozen=True)
class Reproduction:
    """What came out.

    Attributes:
        folder: Of the new adapter.
        sha256: Of adapter_model.safetensors.
        environment: What of versions, machine and execution differs.
        figures: What was found, before and now.
        notes: What could not be compared, and why.
    """

    folder: Path
    sha256: Compared
    environment: tuple[Compared, ...]
    figures: tuple[Compared, ...]
    notes: tuple[str, ...] = ()

    @property
    def reproduced(self) -> bool:
        """The same bytes, or the same figures within a hundredth."""
        return self.sha256.same or all(figure.same for figure in self.figures)


def reproduce(
    adapter: Path | str,
    output: Path | str | None = None,
    on_event: Listener | None = None,
    *,
    teacher: str | None = None,
    student: str | None = None,
    calibration: Sequence[str] = (),
) -> Reproduction:
    """Run the recipe of an adapter again without anything that an earlier run has kept, and compare.

    Where the bytes differ and held-out figures are there, the new adapter is evaluated on the same text as well.

    Args:
        adapter: Its folder.
        output: Of the new adapter, empty or of an earlier try; default: beside it, ``-reproduced`` behind its name.
        on_event: Told how it goes.
        teacher: Where the teacher lies now, if not where run.json says.
        student: Likewise.
        calibration: Likewise the text; all of it.

    Raises:
        MissingInputError: The folder holds no finished adapter, or run.json no recipe.
        BadDataError: A model is not the one that the adapter was made of.
        CannotWriteError: The output holds anything else.
        DistillError: As `distill`.
    """
    tell: Listener = on_event or (lambda event: None)
    first = load_adapter(adapter)
    folder = Path(output) if output else first.folder.absolute().with_name(f"{first.folder.absolute().name}-reproduced")
    if folder.absolute() == first.folder.absolute():
        raise CannotWriteError(f"{folder} holds the adapter to be reproduced", "Choose another --output")
    named = {"teacher": teacher, "student": student, "calibration": list(calibration)}
    recipe = _recipe(first, folder, {key: value for key, value in named.items() if value})
    for role, source, record in (
        ("teacher", recipe.teacher, first.record.teacher),
        ("student", recipe.student, first.record.student),
    ):
        _refuse_other(role, source, record.fingerprint, tell)
    _claim(folder, first)
    second = distill(recipe, tell)
    digest = Compared("sha256", first.record.adapter_sha256, second.sha256)
    held_out, notes = ([], []) if digest.same else _held_out(first, second, recipe, tell)
    return Reproduction(
        folder,
        digest,
        tuple(each for each in _compared(_environment(first), _environment(second)) if not each.same),
        (*_compared(_figures(first), _figures(second)), *held_out),
        tuple(notes),
    )


def _claim(folder: Path, first: Adapter) -> None:
    """Mark a folder as this adapter's reproduction; what another run has left there would confirm itself."""
    mark = folder / PARTS_FOLDER / "reproduction.json"
    if mark.is_file() and read_json(mark).get("adapter_sha256") == first.record.adapter_sha256:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise CannotWriteError(
            f"{folder} is not empty, and nothing in it is of this reproduction (found {min(folder.iterdir()).name})",
            "Give an empty --output",
        )
    make_folder(mark.parent)
    write_json(mark, {"adapter_sha256": first.record.adapter_sha256})


def _recipe(first: Adapter, output: Path, named: Mapping[str, object]) -> Recipe:
    recipe = first.record.content.get("recipe")
    if not isinstance(recipe, Mapping):
        raise MissingInputError(
            f"the run.json in {first.folder} holds no recipe", "Run distill with the recipe you have"
        )
    again = {**recipe, "output": str(output), "cache": None, "report_to": [], **named}
    return parse_recipe(again, f"the run.json in {first.folder}")


def _refuse_other(role: str, source: str, recorded: str | None, tell: Listener) -> None:
    checkpoint = open_model(source, on_download=counting(tell)).checkpoint
    try:
        if checkpoint.is_other_than(recorded):
            raise BadDataError(
                f"the {role} {source} has other weights than the one that the adapter was made of "
                f"(found {checkpoint.fingerprint()[:24]}…, expected {str(recorded)[:24]}…)",
                f"Give the folder of that model: --{role}",
            )
    finally:
        checkpoint.close()


def _environment(adapter: Adapter) -> Mapping[str, object]:
    content = adapter.record.content
    execution = content.get("execution") or {}
    chosen = {key: execution.get(key) for key in ("workers", "devices", "threads_per_worker")}
    return {**adapter.record.versions, **chosen, **(execution.get("machine") or {})}


def _figures(adapter: Adapter) -> Mapping[str, object]:
    """What a run has measured and decided."""
    record = adapter.record
    found: dict[str, object] = {"method": record.method, "transferred": record.transferred}
    found |= {f"matrices {fate}": count for fate, count in record.fates.items()}
    found |= {f"scale of {group}": scale for group, scale in record.scale_search.scales.items()}
    for trial in record.scale_search.trials:
        named = ", ".join(f"{group} {scale:g}" for group, scale in trial.scales.items())
        found |= {f"KL at {named}": trial.kl, f"cross-entropy at {named}": trial.cross_entropy}
    if record.calibration and record.calibration.kl_by_pass:
        found["KL after the fit"] = record.calibration.kl_by_pass[-1]
    if record.refinement and record.refinement.curve:
        found["KL after training"] = record.refinement.curve[-1].kl
    return found


def _compared(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[Compared]:
    for name in dict.fromkeys((*before, *now)):
        yield Compared(name, before.get(name), now.get(name))


def _held_out(first: Adapter, second: Adapter, recipe: Recipe, tell: Listener) -> tuple[list[Compared], list[str]]:
    """The new adapter on the text that the first was evaluated on; or why not."""
    earlier = first.record.evaluation
    if earlier is None or earlier.on_text is None:
        return [], ["the adapter was not evaluated on held-out text, so nothing is compared there"]
    asked = read_json(first.folder / EVALUATION_FILE).get("asked")
    gone = [text for text in earlier.texts if not Path(text).exists()]
    if gone or not isinstance(asked, Mapping):
        reason = f"{gone[0]} is not there" if gone else "evaluation.json does not say how it was asked for"
        return [], [f"held-out figures are not compared: {reason}"]
    again = {key: value for key, value in asked.items() if key in ASKED}
    again = {"teacher": recipe.teacher, "student": recipe.student, **again}
    now = evaluate(second.folder, earlier.texts, counting(tell), **cast("EvaluationOptions", again)).evaluation
    assert now.on_text
    before, after = earlier.on_text.adapted, now.on_text.adapted
    return [
        Compared("held out: effect", earlier.effect, now.effect),
        Compared("held out: kl", before.kl, after.kl),
        Compared("held out: cross_entropy", before.cross_entropy, after.cross_entropy),
    ], []
