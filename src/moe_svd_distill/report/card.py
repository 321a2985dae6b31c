"""The adapter's model card: README.md with the front matter that PEFT and the hub read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_svd_distill.report import facts, figures
from moe_svd_distill.report.metadata import base_model, front_matter, title
from moe_svd_distill.report.record import ModelRecord, RunRecord

_PROJECTIONS = {
    "none: same shape": "none needed",
    "svd": "SVD",
    "fourier": "Fourier",
    "slice": "slicing",
    "procrustes": "an orthogonal map",
}


def adapter_card(record: RunRecord) -> str:
    """The card of a run, with its figures once the adapter has been evaluated."""
    sections = [
        front_matter(record),
        _title(record),
        *_figures(record),
        *_done(record),
        *_training(record),
        *_scale(record),
        *_loading(record),
        *_unmatched(record),
        *_limits(record),
        *_made_with(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def merged_card(record: RunRecord) -> str:
    """The card of the student with the adapter merged into it, with the figures of the adapter if there are any."""
    teacher, student = facts.model_name(record, "teacher"), facts.model_name(record, "student")
    sections = [
        front_matter(record, merged=True),
        f"# {title(record)}\n\n> {facts.headline(record)}",
        f"The student **{student}** with a LoRA adapter merged into its weights, which was {_origin(record, teacher)} "
        "by MoE-SVD-Distill. It is loaded as the student is.",
        *_figures(record),
        *_done(record),
        *_training(record),
        *_limits(record, "merged model"),
        *_made_with(record),
    ]
    return "\n\n".join(sections) + "\n"


def _title(record: RunRecord) -> str:
    teacher, student = facts.model_name(record, "teacher"), facts.model_name(record, "student")
    return (
        f"# A LoRA for {student}, made from {teacher}\n\n"
        f"> {facts.headline(record)}\n\n"
        f"A PEFT LoRA adapter for the student **{student}**, {_origin(record, teacher)} by MoE-SVD-Distill."
    )


def _origin(record: RunRecord, teacher: str) -> str:
    the_teacher, text = f"the teacher **{teacher}**", "on calibration text"
    match record.method:
        case "calibrated":
            return f"fitted to the distributions of {the_teacher} {text}"
        case "weights+calibrated":
            return f"computed from the weights of the teacher and fitted to the distributions of {the_teacher} {text}"
        case "refined":
            named = facts.starting_adapter(record)
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


def _figures(record: RunRecord) -> Iterator[str]:
    evaluation = record.evaluation
    rows, scores = figures.figure_rows(evaluation), figures.benchmark_rows(evaluation)
    yield "## Figures"
    if not rows and not scores:
        yield "None: the adapter has not been evaluated on held-out text. `moe-svd-distill evaluate` does it."
        return
    if rows:
        yield _table(figures.FIGURE_COLUMNS, rows)
        yield (
            "KL is KL(teacher ‖ student). *Gap closed* is the part of the way from the untouched student to the "
            f"teacher; a gain in KL with a loss in cross-entropy is no transfer. {figures.text_note(evaluation)}"
        )
    if scores:
        yield _table(figures.BENCHMARK_COLUMNS, scores)
    yield from figures.benchmark_notes(evaluation)


def _done(record: RunRecord) -> Iterator[str]:
    recipe = record.recipe
    yield "## What was done"
    models = (("Teacher", record.teacher), ("Student", record.student))
    lines = [f"- {side}: {_shape(model)}" for side, model in models if model.source]
    if record.depth_map:
        lines.append(
            f"- Each student layer is set against a weighted blend of teacher layers (depth map "
            f"{recipe.depth_map or 'as recorded'}, {recipe.interpolation} interpolation)."
        )
    lines += _projections(record)
    if recipe.expert_clusters and any(unit.get("experts") for unit in record.units):
        lines.append(
            f"- Experts: fingerprints ({recipe.expert_fingerprint}), k-means into clusters "
            f"({recipe.expert_clusters}), {recipe.expert_assignment} assignment to the student's experts, "
            f"{recipe.expert_blend} blend."
        )
    for part, (low, high) in facts.ranks(record).items():
        lines.append(f"- Rank of the {part}: {low if low == high else f'{low} to {high}'}")
    if record.tensors:
        lines.append(f"- {facts.lora_count(record)} of {len(record.tensors)} student tensors carry a delta.")
    seed = "–" if recipe.seed is None else recipe.seed
    lines.append(f"- Method {record.method or 'as in run.json'}, seed {seed}.")
    yield "\n".join(lines)


def _projections(record: RunRecord) -> list[str]:
    if not record.projections:
        return []
    named = ", ".join(f"{_PROJECTIONS.get(name, name)} ({count})" for name, count in record.projections.items())
    lines = [f"- Projection to the student's shapes: {named}."]
    if record.projection_fallbacks:
        count = len(record.projection_fallbacks)
        lines.append(f"- {count} tensors fell back to the Fourier projection; run.json names each and why.")
    return lines


def _training(record: RunRecord) -> Iterator[str]:
    note = facts.training_note(record)
    if note:
        yield "## Training"
        yield note


def _scale(record: RunRecord) -> Iterator[str]:
    search = record.scale_search
    if not (search.scales or search.decision):
        return
    yield "## Scale"
    yield facts.decision(record) or "No scale was searched."
    if facts.nothing_kept(record):
        yield "Every delta is zero: with this adapter the student is what it was."
    elif search.trials and search.scales:
        yield _table(("group", "scale"), ((group, f"{scale:g}") for group, scale in search.scales.items()))
        yield "The scales are already in the weights: load the adapter as it is."


def _loading(record: RunRecord) -> Iterator[str]:
    source = base_model(record)
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
            "Servers do not take this folder as it is: write it in their layout first (`--format fused` for models "
            "whose experts vLLM holds in one tensor). With vLLM, where it supports LoRA on every part of this "
            "architecture:\n\n```bash\n"
            "moe-svd-distill export path/to/this/adapter PLAIN --format plain\n"
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules distilled=PLAIN\n```"
        )


def _unmatched(record: RunRecord) -> Iterator[str]:
    kept, unused = facts.fate_counts(record), facts.unused_counts(record)
    ignored = record.ignored_student_tensors
    if not (kept or unused or ignored):
        return
    yield "## What was left out"
    if kept:
        yield _table(("unchanged student tensors", "tensors"), ((reason, str(n)) for reason, n in kept))
    if unused:
        rows = ((reason, str(count), f"`{example}`") for reason, count, example in unused)
        yield _table(("teacher tensors not used", "tensors", "for example"), rows)
    if ignored:
        yield f"{len(ignored)} tensors of the student's files do not belong to its architecture and were ignored."
    yield "run.json holds the fate of every tensor."


def _limits(record: RunRecord, what: str = "adapter") -> Iterator[str]:
    yield "## Limits"
    lines = [
        "- The figures hold for the text they were measured on; far from it they may differ.",
        "- Next-token figures say nothing by themselves about reasoning, instruction following or safety.",
        f"- The {what} inherits the limits and the licences of both models.",
    ]
    if record.evaluation is None:
        lines.insert(0, "- **Without figures this is an experiment, not a distilled model.**")
    yield "\n".join(lines)


def _made_with(record: RunRecord) -> Iterator[str]:
    lines = []
    if record.adapter_sha256:
        lines.append(f"- sha256 of adapter_model.safetensors: `{record.adapter_sha256}`")
    for side, model in (("teacher", record.teacher), ("student", record.student)):
        if model.fingerprint:
            lines.append(f"- fingerprint of the {side}: `{model.fingerprint}`")
    if record.versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in record.versions.items()))
    if record.finished:
        lines.append(f"- finished {record.finished}")
    if lines:
        yield "## Made with"
        yield "\n".join(lines)


def _shape(model: ModelRecord) -> str:
    counts = ((model.layers, "layers"), (model.hidden, "hidden"), (model.experts, "experts"))
    sizes = [f"{count:,} {unit}" for count, unit in (*counts, (model.vocabulary, "tokens in the vocabulary")) if count]
    return ", ".join([model.family or Path(model.source).name, *sizes])


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
