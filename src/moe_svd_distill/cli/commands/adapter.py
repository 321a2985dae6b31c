"""What is done with a finished adapter: verify, merge, export, and a new adapter_config.json."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_svd_distill.cli.options import Shown, Word, shown_options

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.cli.progress import Monitor

student_option = click.option("--student", help="Folder or hub id of the student; default: the one the adapter names.")


@click.command("verify", short_help="Check an adapter.")
@click.argument("folder", type=click.Path(path_type=Path))
@student_option
@shown_options
def verify_command(folder: Path, student: str | None, shown: Shown) -> None:
    """Check the adapter in FOLDER: its bytes, its configuration, its values, and that PEFT loads every key.

    Example: moe-svd-distill verify out
    """
    from dataclasses import asdict

    from moe_svd_distill.adapter.verify import verify
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line, print_next

    with Monitor(shown) as monitor:
        checkpoint = _opened(student, monitor)
        monitor.on_count("checking the adapter", 0, 0)
        report = verify(folder, checkpoint)
    if shown.as_json:
        print_json({**asdict(report), "summary": report.summary})
        return
    for warning in report.warnings:
        print_line(f"note: {warning}")
    if report.load:
        print_line(f"PEFT loads all {report.load.keys} tensors into {report.load.targets} modules and parameters")
    print_line(f"sha256 {report.sha256}{' as recorded' if report.digest_checked else ''}")
    print_line(report.summary)
    print_next("merge", folder, "MERGED", *(("--student", student) if student else ()))


@click.command("merge", short_help="Merge an adapter into the student.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@student_option
@shown_options
def merge_command(folder: Path, output: Path, student: str | None, shown: Shown) -> None:
    """Write the student with the adapter in FOLDER merged in to OUTPUT, shard by shard, in the stored types.

    Example: moe-svd-distill merge out merged
    """
    from dataclasses import asdict

    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line
    from moe_svd_distill.pipeline.merge import merge

    with Monitor(shown) as monitor:
        report = merge(folder, output, student, on_progress=monitor.on_count)
    if shown.as_json:
        print_json({**asdict(report), "output": str(report.output)})
        return
    for warning in report.warnings:
        print_line(f"note: {warning}")
    for name in report.left_out:
        print_line(f"not copied: {name}")
    print_line(
        f"{report.output}: {report.merged} tensors merged, {report.copied} copied unchanged, "
        f"{report.weights_files} weights files, {report.bytes / 2**20:.1f} MiB"
    )


@click.command("export", short_help="Write an adapter in another layout.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=Word(["peft", "plain", "fused", "gguf"]),
    default="peft",
    show_default=True,
    help="peft: for PEFT on transformers 5. plain: stored names alone, for vLLM, SGLang and transformers 4. "
    "fused: one pair for all experts of a layer, for PEFT and vLLM. gguf: a file for llama.cpp.",
)
@click.option("--text-only", is_flag=True, help="For the student's class for text alone, not the checkpoint's own.")
@student_option
@shown_options
def export_command(folder: Path, output: Path, layout: str, text_only: bool, student: str | None, shown: Shown) -> None:
    """Write the adapter in FOLDER to OUTPUT with the same changes in another layout; PEFT is asked whether it loads.

    Example: moe-svd-distill export out plain --format plain
    """
    from dataclasses import asdict

    from moe_svd_distill.adapter.export import export
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line

    with Monitor(shown) as monitor:
        checkpoint = _opened(student, monitor)
        monitor.on_count("writing the adapter in another layout", 0, 0)
        report = export(folder, output, layout, checkpoint, text_only=text_only)  # type: ignore[arg-type]
    if shown.as_json:
        print_json({**asdict(report), "output": str(report.output)})
        return
    print_line(f"{report.output}: {report.tensors} tensors")
    if report.loads is not None:
        print_line(
            "PEFT loads all of them"
            if report.loads
            else f"Servers read it by its keys; PEFT here does not load it: {report.why_not}"
        )
    for limit in report.limits:
        print_line(f"note: {limit}")


@click.command("adapter-config", short_help="Rebuild adapter_config.json.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    help="Folder of the student; without it modules are named by their last part.",
)
@click.option("--base-model", help="What to write as the base model.")
@click.option("--write", is_flag=True, help="Write it beside the adapter instead of printing it.")
@click.option(
    "--repair-names", type=click.Path(path_type=Path), help="First write a copy of FILE under names that PEFT matches."
)
def adapter_config_command(
    file: Path, student: Path | None, base_model: str | None, write: bool, repair_names: Path | None
) -> None:
    """Rebuild the configuration of the adapter FILE from its header; no weight is loaded.

    Example: moe-svd-distill adapter-config out --student models/student --write
    """
    from moe_svd_distill.adapter.repair import rebuild_configuration, repair_keys
    from moe_svd_distill.files.names import CONFIGURATION_FILE
    from moe_svd_distill.files.writing import write_json

    if repair_names is not None:
        renamed = repair_keys(file, repair_names)
        click.echo(f"{repair_names}: {len(renamed)} tensors renamed", err=True)
        file = repair_names
    configuration = rebuild_configuration(file, student, base_model=base_model)
    if student is None:
        click.echo(
            "note: without --student modules are named by the last part of their names, which PEFT on transformers 5 "
            "loads for models without experts only",
            err=True,
        )
    if write:
        target = (file if file.is_dir() else file.parent) / CONFIGURATION_FILE
        write_json(target, configuration)
        click.echo(target)
    else:
        click.echo(json.dumps(configuration, indent=2))


def _opened(student: str | None, monitor: Monitor) -> Checkpoint | None:
    from moe_svd_distill.checkpoints import open_checkpoint
    from moe_svd_distill.execution.events import DOWNLOADING

    if student is None:
        return None
    return open_checkpoint(student, on_bytes=partial(monitor.on_count, f"{DOWNLOADING}{student}"))
