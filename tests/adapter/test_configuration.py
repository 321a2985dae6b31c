from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_svd_distill.adapter.configuration import (
    build_configuration,
    plain_configuration,
    rank_and_scale,
    refuse_incomplete,
    short_names,
)
from moe_svd_distill.errors import BadDataError
from tests.adapter.conftest import Case
from tests.support import tiny
from tests.support.architectures import saved


def ranks_of(case: Case, **special: int) -> dict[str, int]:
    """Rank 4 for every parameter an adapter of the student changes, and others where a part of its name says so."""
    found = {}
    for name, target in tiny.keys_of(case.student).targets.items():
        if not target.embedding:
            others = [rank for part, rank in special.items() if part in name]
            found[name] = others[0] if others else target.rank(tiny.default_rank)
    return found


def build(case: Case, ranks: dict[str, int], **options: Any) -> dict[str, Any]:
    return build_configuration(tiny.keys_of(case.student), ranks, base_model="organisation/student", **options)


def test_explicit_configuration_of_a_student_with_everything(sparse: Case) -> None:
    found = build(sparse, ranks_of(sparse))
    assert found["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "lm_head"]
    assert sorted(found["target_parameters"]) == [
        "down_proj.weight",  # as parameters, because PEFT takes these linear maps for experts
        "experts.down_proj",
        "experts.gate_up_proj",
        "gate.weight",
        "gate_proj.weight",
        "up_proj.weight",
    ]
    assert (found["r"], found["lora_alpha"], found["peft_type"], found["task_type"]) == (4, 4, "LORA", "CAUSAL_LM")
    assert found["rank_pattern"] == {r"experts\.gate_up_proj": 8, "lm_head": 8}
    assert (found["base_model_name_or_path"], found["revision"]) == ("organisation/student", None)
    assert "modules_to_save" not in found


def test_alpha_always_equals_rank(case: Case) -> None:
    ranks = ranks_of(case) | {name: 2 for name in ranks_of(case) if ".1.self_attn" in name or "o_proj" in name}
    found = build(case, ranks)
    assert found["lora_alpha"] == found["r"]
    assert found["alpha_pattern"] == found["rank_pattern"]
    targets = tiny.keys_of(case.student).targets
    for name, rank in ranks.items():
        assert rank_and_scale(found, targets[name].entry) == (rank, 1.0)


def test_the_order_of_the_ranks_does_not_matter(case: Case) -> None:
    ranks = ranks_of(case, q_proj=2)
    names = list(ranks)
    random.Random(0).shuffle(names)
    assert json.dumps(build(case, {name: ranks[name] for name in names})) == json.dumps(build(case, ranks))


def test_layers_that_differ_are_listed_and_no_other_is_hit(dense: Case) -> None:
    special = {"model.layers.0.self_attn.q_proj.weight": 2, "model.layers.2.self_attn.q_proj.weight": 2}
    found = build(dense, ranks_of(dense) | special)["rank_pattern"]
    assert found == {"lm_head": 8, r"0\.self_attn\.q_proj": 2, r"2\.self_attn\.q_proj": 2}


def test_a_head_alone_gives_the_rank_and_a_whole_head_none(dense: Case) -> None:
    found = build(dense, {"lm_head.weight": 8})
    assert (found["r"], found["rank_pattern"], found["target_modules"]) == (8, {}, ["lm_head"])
    whole = build(dense, {"model.layers.0.self_attn.q_proj.weight": 2}, whole_head=True)
    assert (whole["r"], whole["modules_to_save"]) == (2, ["lm_head"])


def test_gate_and_up_of_the_experts_add_up(sparse: Case) -> None:
    target = tiny.keys_of(sparse.student).targets["model.layers.1.mlp.experts.gate_up_proj"]
    assert target.rank(lambda name: 6 if "gate_proj" in name else 5) == 11


def test_layers_without_a_pair_are_left_out_by_name(sparse: Case) -> None:
    found = build(sparse, {name: rank for name, rank in ranks_of(sparse).items() if ".layers.2." not in name})
    targeted = [*found["target_modules"], *found["target_parameters"]]
    every = [name for name in tiny.keys_of(sparse.student).targets if ".layers.2." in name]
    assert not [name for name in every for entry in targeted if name.removesuffix(".weight").endswith(f".{entry}")]
    assert not [name for name in every for entry in targeted if name.endswith(f".{entry}")]


@given(st.data())
def test_endings_name_exactly_what_is_wanted(data: st.DataObject) -> None:
    part = st.sampled_from(["a", "b", "0", "1", "x"])
    every = data.draw(st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
    # An ending that is a whole name of its own (as "a" beside "b.a") would be ambiguous in PEFT as well.
    every = [name for name in every if not any(other.endswith(f".{name}") for other in every)]
    wanted = data.draw(st.lists(st.sampled_from(every), unique=True))
    endings = short_names(wanted, every)
    assert {name for name in every for end in endings if name == end or name.endswith(f".{end}")} == set(wanted)


@pytest.mark.parametrize("end", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_have_no_pair(tmp_path: Path, dense: Case, end: str) -> None:
    assert build(dense, {end: 4})
    keys = tiny.keys_of(tiny.save_student(tmp_path / "tied", "llama", tie_word_embeddings=True))
    with pytest.raises(BadDataError, match="ties its head"):
        build_configuration(keys, {end: 4}, base_model="student")
    assert build_configuration(keys, {"model.embed_tokens.weight": 4}, base_model="student", whole_head=True)


def test_a_head_with_a_bias_is_not_saved_whole(tmp_path: Path) -> None:
    keys = tiny.keys_of(saved("phi", tmp_path / "phi"))
    with pytest.raises(BadDataError, match="has a bias beside it"):
        build_configuration(keys, {next(iter(keys.targets)): 4}, base_model="phi", whole_head=True)


def test_a_parameter_needs_all_its_matrices_in_one_rank(sparse: Case) -> None:
    target = tiny.keys_of(sparse.student).targets["model.layers.1.mlp.experts.gate_up_proj"]
    ranks = dict.fromkeys(target.names, 4)
    refuse_incomplete(target, ranks | {name: 3 for name in ranks if "up_proj" in name})
    lacking = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(BadDataError, match=r"experts\.3\.up_proj\.weight has no LoRA pair"):
        refuse_incomplete(target, {name: rank for name, rank in ranks.items() if name != lacking})
    with pytest.raises(BadDataError, match=r"experts\.3\.up_proj\.weight has rank 3, expected 4"):
        refuse_incomplete(target, ranks | {lacking: 3})


def test_what_no_pair_can_change_is_refused_with_its_reason(sparse: Case) -> None:
    keys = tiny.keys_of(sparse.student)
    with pytest.raises(BadDataError, match="no LoRA can carry a vector"):
        keys.changed_by(["model.layers.0.input_layernorm.weight"])
    with pytest.raises(BadDataError, match="the model has no such matrix"):
        keys.changed_by(["model.layers.9.self_attn.q_proj.weight"])


def test_a_plain_configuration_has_last_names_where_they_name_no_other_module() -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.self_attn.q_proj": 4, "lm_head": 2}
    found = plain_configuration(ranks, base_model="a/b", whole=["lm_head"])
    assert (found["target_modules"], found["target_parameters"]) == (["q_proj", "lm_head"], [])
    assert (found["r"], found["rank_pattern"], found["alpha_pattern"]) == (4, {"lm_head": 2}, {"lm_head": 2})
    assert found["modules_to_save"] == ["lm_head"]
    every = [*ranks, "model.layers.2.self_attn.q_proj"]
    found = plain_configuration(ranks, base_model="a/b", every=every)
    assert found["target_modules"] == ["0.self_attn.q_proj", "1.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 4},
        {"r": 0, "lora_alpha": 1},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"(": 3}},
        {"r": 4, "lora_alpha": 4, "rank_pattern": [3]},
    ],
)
def test_no_usable_rank_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(BadDataError, match="no usable rank"):
        rank_and_scale(fields, "model.layers.0.q_proj")


def test_scales_as_peft_counts_them() -> None:
    fields = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"0.q_proj": 4}}
    assert rank_and_scale(fields, "a.0.q_proj") == (16, 0.25)
    assert rank_and_scale(fields, "a.1.xq_proj") == (4, 2.0)
    assert rank_and_scale(fields | {"use_rslora": True}, "a.1.q_proj") == (16, 2.0)
