"""reproduce: an adapter's recipe again."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import Shown, shown_options


@click.command("reproduce", short_help="Run an adapter's recipe again and compare.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the new adapter; default: FOLDER-reproduced."
)
@click.option("--teacher", help="Where the teacher lies now; default: as in run.json.")
@click.option("--student", help="Where the student lies now; default: as in run.json.")
@click.option("--calibration", multiple=True, help="Where the text lies now; repeatable. Default: as in run.json.")
@shown_options
@click.pass_context
def command(
    context: click.Context,
    folder: Path,
    output: Path | None,
    teacher: str | None,
    student: str | None,
    calibration: tuple[str, ...],
    shown: Shown,
) -> None:
    """Run the recipe in FOLDER's run.json again from nothing, and compare bytes, figures and environment.

    Where the bytes differ and the text of an evaluation is still there, the new adapter is evaluated on it as well.
    Exit code 0: the same bytes, or every figure within a hundredth; 65: not reproduced.

    Example: moe-svd-distill reproduce out --output again
    """
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_facts, print_json, print_line
    from moe_svd_distill.errors import BadDataError
    from moe_svd_distill.files.typed import as_json
    from moe_svd_distill.pipeline.reproduce import reproduce

    with Monitor(shown) as monitor:
        found = reproduce(folder, output, monitor.on_event, teacher=teacher, student=student, calibration=calibration)
    different = [each for each in found.figures if not each.same]

    if shown.as_json:
        listed = {"figures": list(map(as_json, found.figures)), "environment": list(map(as_json, found.environment))}
        facts = {"output": str(found.folder), "reproduced": found.reproduced, "same_bytes": found.sha256.same}
        print_json({**facts, "sha256": as_json(found.sha256), **listed, "notes": list(found.notes)})
    else:
        for title, rows in (("What differs of the environment", found.environment), ("What differs", different)):
            print_facts(title, [(each.name, f"{each.before} → {each.now}") for each in rows])
        for note in found.notes:
            print_line(f"note: {note}")
        print_line(_verdict(found.sha256.same, len(found.figures), len(different), str(found.folder)))
    if not found.reproduced:
        context.exit(BadDataError.exit_code)


def _verdict(same_bytes: bool, figures: int, different: int, folder: str) -> str:
    if same_bytes:
        return f"Reproduced in {folder}: the same bytes."
    if not different:
        return f"Reproduced in {folder}: other bytes, all {figures} figures within a hundredth."
    return f"Not reproduced in {folder}: {different} of {figures} figures differ by more than a hundredth."
