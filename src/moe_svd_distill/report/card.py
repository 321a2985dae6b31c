"""The adapter's model card: README.md with the front matter that PEFT and the hub read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_svd_distill.report import benchmarks, facts, training
from moe_svd_distill.report.facts import Record

_PROJECTIONS = {
    "none: same shape": "none needed",
    "svd": "SVD",
    "fourier": "Fourier",
    "slice": "slicing",
    "procrustes": "an orthogonal map",
}


def adapter_card(record: Record) -> str:
    """Write the card of a run.

    Args:
        record: The content of run.json, with ``evaluation`` in it once the adapter has been evaluated.
    """
    sections = [_front_matter(record), _title(record), *_figures(record), *_done(record)]
    sections += [
        *_training(record),
        *_scale(record),
        *_loading(record),
        *_unmatched(record),
        *_limits(record),
        *_made_with(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(record: Record) -> str:
    import yaml

    source = str((record.get("student") or {}).get("source") or "")
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    tags = ["lora", "peft", "distillation", "moe-svd-distill"]
    if facts.is_hub_id(source):
        base = source.partition("@")[0]
        fields["base_model"] = base
        tags.append(f"base_model:adapter:{base}")
    fields["tags"] = tags
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _title(record: Record) -> str:
    teacher, student = facts.model_name(record, "teacher"), facts.model_name(record, "student")
    return (
        f"# A LoRA for {student}, made from {teacher}\n\n"
        f"> {facts.headline(record)}\n\n"
        f"A PEFT LoRA adapter for the student **{student}**, {_origin(record, teacher)} by MoE-SVD-Distill."
    )


def _origin(record: Record, teacher: str) -> str:
    the_teacher, text = f"the teacher **{teacher}**", "on calibration text"
    match record.get("method"):
        case "calibrated":
            return f"fitted to the distributions of {the_teacher} {text}"
        case "weights+calibrated":
            return f"computed from the weights of the teacher and fitted to the distributions of {the_teacher} {text}"
        case "refined":
            named = training.starting_adapter(record)
            return f"trained on the distributions of {the_teacher} {text}" + (
                f", beginning with the adapter {named}" if named else ""
            )
        case "calibrated+refined":
            return f"fitted to and then trained on the distributions of {the_teacher} {text}"
        case "weights+refined":
            return f"computed from the weights of {the_teacher} and then trained on its distributions {text}"
        case "weights+calibrated+refined":
            return f"computed from the weights of {the_teacher}, then fitted to and trained on its distributions {text}"
        case _:
            return f"computed from the weights of {the_teacher}"


def _figures(record: Record) -> Iterator[str]:
    evaluation = record.get("evaluation") or {}
    rows = facts.figure_rows(evaluation)
    yield "## Figures"
    scores = benchmarks.rows(evaluation)
    if not rows and not scores:
        yield "None: the adapter has not been evaluated on held-out text. `moe-svd-distill evaluate` does it."
        return
    if rows:
        yield _table(("", *facts.FIGURE_COLUMNS), ((row.name, *row.cells) for row in rows))
        yield (
            "KL is KL(teacher ‖ student). *Gap closed* is the part of the way from the untouched student to the "
            f"teacher; a gain in KL with a loss in cross-entropy is no transfer. {facts.text_note(evaluation)}"
        )
    if scores:
        yield _table(benchmarks.COLUMNS, scores)
        yield from benchmarks.notes(evaluation)


def _done(record: Record) -> Iterator[str]:
    recipe = record.get("recipe") or {}
    experts = recipe.get("experts") or {}
    teacher, student = record.get("teacher") or {}, record.get("student") or {}
    yield "## What was done"
    lines = [f"- {side}: {_shape(model)}" for side, model in (("Teacher", teacher), ("Student", student)) if model]
    if record.get("depth_map"):
        lines.append(
            f"- Each student layer is set against a weighted blend of teacher layers (depth map "
            f"{recipe.get('depth_map', 'as recorded')}, {recipe.get('interpolation', 'linear')} interpolation)."
        )
    lines += _projections(record)
    if experts and any(unit.get("experts") for unit in record.get("units") or ()):
        lines.append(
            f"- Experts: fingerprints ({experts.get('fingerprint')}), k-means into clusters "
            f"({experts.get('clusters')}), {experts.get('assignment')} assignment to the student's experts, "
            f"{experts.get('blend')} blend."
        )
    for part, (low, high) in facts.ranks(record).items():
        lines.append(f"- Rank of the {part}: {low if low == high else f'{low} to {high}'}")
    if facts.tensors(record):
        lines.append(f"- {facts.lora_count(record)} of {len(facts.tensors(record))} student tensors carry a delta.")
    lines.append(f"- Method {record.get('method', 'as in run.json')}, seed {recipe.get('seed', '–')}.")
    yield "\n".join(lines)


def _projections(record: Record) -> list[str]:
    counts = (record.get("summary") or {}).get("projections") or {}
    if not counts:
        return []
    named = ", ".join(f"{_PROJECTIONS.get(name, name)} ({count})" for name, count in counts.items())
    lines = [f"- Projection to the student's shapes: {named}."]
    fallbacks = (record.get("summary") or {}).get("projection_fallbacks") or {}
    if fallbacks:
        lines.append(f"- {len(fallbacks)} tensors fell back to the Fourier projection; run.json names each and why.")
    return lines


def _training(record: Record) -> Iterator[str]:
    note = training.training_note(record)
    if note:
        yield "## Training"
        yield note


def _scale(record: Record) -> Iterator[str]:
    search = record.get("scale_search") or {}
    if not search:
        return
    yield "## Scale"
    yield str(search.get("decision") or "No scale was searched.")
    scales = search.get("scales") or {}
    if facts.nothing_kept(record):
        yield "Every delta is zero: with this adapter the student is what it was."
    elif search.get("trials") and scales:
        yield _table(("group", "scale"), ((group, f"{scale:g}") for group, scale in scales.items()))
        yield "The scales are already in the weights: load the adapter as it is."


def _loading(record: Record) -> Iterator[str]:
    source = str((record.get("student") or {}).get("source") or "")
    name, _, revision = source.partition("@")
    base = name if facts.is_hub_id(source) else f"path/to/{facts.model_name(record, 'student')}"
    pinned = f', revision="{revision}"' if revision and facts.is_hub_id(source) else ""
    yield "## Load it"
    yield (
        "With transformers 5.10 or later and peft 0.21 or later:\n\n```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'student = AutoModelForCausalLM.from_pretrained("{base}"{pinned}, dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}"{pinned})\n'
        'model = PeftModel.from_pretrained(student, "path/to/this/adapter")\n```'
    )
    rank = facts.vllm_rank(record)
    if not facts.serving_rank(record):
        return
    if rank is None:
        yield (
            f"Its highest rank, {facts.serving_rank(record)}, is beyond the {facts.VLLM_RANKS[-1]} that vLLM takes; "
            "serve the merged model (`moe-svd-distill merge`) instead."
        )
    else:
        yield (
            "With vLLM, where it supports LoRA on every part of this architecture:\n\n```\n"
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules distilled=path/to/this/adapter\n```"
        )


def _unmatched(record: Record) -> Iterator[str]:
    kept, unused = facts.fate_counts(record), facts.unused_counts(record)
    ignored = record.get("ignored_student_tensors") or {}
    if not (kept or unused or ignored):
        return
    yield "## What was left out"
    if kept:
        yield _table(("student tensors left as they are", "tensors"), ((reason, str(n)) for reason, n in kept))
    if unused:
        rows = ((reason, str(count), f"`{example}`") for reason, count, example in unused)
        yield _table(("teacher tensors not used", "tensors", "for example"), rows)
    if ignored:
        yield f"{len(ignored)} tensors of the student's files do not belong to its architecture and were ignored."
    yield "run.json holds the fate of every tensor."


def _limits(record: Record) -> Iterator[str]:
    yield "## Limits"
    lines = [
        "- The figures hold for the text they were measured on; far from it they may differ.",
        "- Next-token figures say nothing by themselves about reasoning, instruction following or safety.",
        "- The adapter inherits the limits and the licences of both models.",
    ]
    if not record.get("evaluation"):
        lines.insert(0, "- **Without figures this is an experiment, not a distilled model.**")
    yield "\n".join(lines)


def _made_with(record: Record) -> Iterator[str]:
    versions = record.get("versions") or {}
    lines = []
    if record.get("adapter_sha256"):
        lines.append(f"- sha256 of adapter_model.safetensors: `{record['adapter_sha256']}`")
    for side in ("teacher", "student"):
        fingerprint = (record.get(side) or {}).get("fingerprint")
        if fingerprint:
            lines.append(f"- fingerprint of the {side}: `{fingerprint}`")
    if versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if record.get("finished"):
        lines.append(f"- finished {record['finished']}")
    if lines:
        yield "## Made with"
        yield "\n".join(lines)


def _shape(model: Mapping[str, Any]) -> str:
    parts = [str(model.get("family") or Path(str(model.get("source") or "?")).name)]
    units = (("layers", "layers"), ("hidden", "hidden"), ("experts", "experts"), ("vocabulary", "tokens"))
    parts += [f"{model[key]:,} {unit}" for key, unit in units if model.get(key)]
    return ", ".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
