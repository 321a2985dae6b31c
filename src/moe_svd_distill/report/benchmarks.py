"""What the benchmarks found, as rows and notes for pages and terminal."""

from __future__ import annotations

from moe_svd_distill.report.facts import Record, number, part_of, with_error

COLUMNS = ("benchmark", "student, untouched", "student with this adapter", "change")
_ERRORS_SHOWN = 3


def rows(evaluation: Record) -> list[tuple[str, str, str, str]]:
    """Benchmark and metric, untouched student, with the adapter, change."""
    harness = [
        (
            f"{score.get('task')}, {score.get('metric')}"
            + ("" if score.get("filter") in (None, "none") else f" ({score['filter']})"),
            with_error(score.get("student"), score.get("student_error")),
            with_error(score.get("adapted"), score.get("adapted_error")),
            with_error(score.get("change"), score.get("change_error"), "+"),
        )
        for score in part_of(evaluation, "benchmarks").get("scores") or ()
    ]
    return harness + [_code_row(name, found) for name, found in part_of(evaluation, "code_benchmarks").items()]


def notes(evaluation: Record) -> list[str]:
    """How the benchmarks were run."""
    found = part_of(evaluation, "benchmarks")
    harness = []
    if found:
        limit = f", at most {found['limit']} examples of each task" if found.get("limit") else ""
        harness = [
            f"By lm-evaluation-harness {found.get('harness', '?')} in {found.get('dtype', '?')}{limit}; ± is one "
            "standard error, that of the change paired over examples."
        ]
    return harness + [code_note(result) for result in part_of(evaluation, "code_benchmarks").values()]


def code_note(result: Record) -> str:
    """How programming problems were completed and run, and what became of those that failed."""
    settings, change = part_of(result, "settings"), part_of(result, "change")
    teacher = part_of(result, "teacher")
    parts = [
        f"{result.get('name', '?')}: {result.get('problems', '?')} problems of {result.get('source', '?')}, one greedy "
        f"completion each of the plain prompt in {settings.get('dtype', '?')}, at most {settings.get('limit', '?')} "
        "tokens",
        f"the teacher passes {number(teacher.get('pass_at_1'))}" if teacher else "",
        f"{len(result.get('gained') or ())} problems gained and {len(result.get('lost') or ())} lost, McNemar's exact "
        f"p {number(change.get('p_value'), 3)}",
        "the interval is 95 %, exact and paired over problems",
        _failures(part_of(result, "adapted")),
        f"programs had {_guards(part_of(result, 'guards'))}",
    ]
    return "; ".join(part for part in parts if part) + "."


def _code_row(name: str, result: Record) -> tuple[str, str, str, str]:
    change = part_of(result, "change")
    within = f" ({change['low']:+.4f} … {change['high']:+.4f})" if {"low", "high"} <= change.keys() else ""
    return (
        f"{name}, pass@1",
        number(part_of(result, "student").get("pass_at_1")),
        number(part_of(result, "adapted").get("pass_at_1")),
        with_error(change.get("change"), None, "+") + within,
    )


def _failures(solved: Record) -> str:
    counts = part_of(solved, "reasons")
    if not counts:
        return ""
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_ERRORS_SHOWN]
    named = ", ".join(f"{reason} {count}" for reason, count in common)
    return f"the adapted student's failures are mostly {named}, and {solved.get('unfinished', '?')} met the limit"


def _guards(guards: Record) -> str:
    network = "no network" if guards.get("network") else "the network within reach"
    files = "their own folder" if guards.get("files") else "whatever their user may change"
    return f"{network} and could change {files}"
