"""The calibrated stage on real files: what is written, what is reused, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.errors import IncompatiblePairError, NothingToTransferError, UsageError
from moe_svd_distill.pipeline.distill import Adapter, distill, load_adapter
from moe_svd_distill.pipeline.lab import lab_pair
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.texts import LONGEST_SEQUENCE, longest_sequence, read_run_text
from moe_svd_distill.recipe import Recipe, recipe_yaml
from moe_svd_distill.streaming import group_of
from tests.support.events import notes_to
from tests.support.heads import TEXT, student_with_tokenizer, teacher_with_other_head, trained_tokenizer
from tests.support.models import load
from tests.support.pairs import recipe_for
from tests.support.quantised import in_float8
from tests.support.scaling import scaled

LITTLE: dict[str, Any] = {
    "calibration": [str(TEXT)], "tokens": 2048, "scale_search_tokens": 2048, "copies": 1, "fit_passes": 2
}  # fmt: skip
SAVED_OFTEN = {"training": {"save_seconds": 1e-9}}
HEAD_ALONE = LITTLE | {"method": "calibrated", "last_layers": 0}
MORE_PASSES = HEAD_ALONE | {"fit_passes": 6}
STREAMED = {"student", "teacher", "student, what it is trained on", "student, search text", "teacher, search text"}
A, B = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """The lab's independent pair, fitted on very little text."""
    pair, out = lab_pair("independent"), tmp_path_factory.mktemp("finished") / "out"
    recipe = recipe_for(pair.teacher, pair.student, out, **HEAD_ALONE)
    distill(recipe)
    return recipe, out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def test_the_folder_passes_its_check_and_holds_the_head_alone(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    report = verify(out)
    assert report.load is not None
    assert report.digest_checked
    assert set(_tensors(out)) == {A, B}
    assert all(tensor.dtype == torch.bfloat16 for tensor in _tensors(out).values())
    assert check_loads(out, Path(recipe.student)).missing == ()
    assert load_adapter(out).transferred


def test_what_peft_loads_is_the_student_with_the_factors_added(finished: tuple[Recipe, Path]) -> None:
    from peft import PeftModel

    recipe, out = finished
    base, ids = load(Path(recipe.student)), _ids(2048)
    with torch.no_grad():
        hidden = base.model(input_ids=ids).last_hidden_state
        tensors = _tensors(out)
        weight = base.lm_head.weight + tensors[B].float() @ tensors[A].float()
        wanted, before = hidden @ weight.T, _logits(base, ids)
    adapted = PeftModel.from_pretrained(base, str(out))
    assert float((wanted - before).abs().max()) > 0.1
    torch.testing.assert_close(_logits(adapted, ids), wanted, rtol=0, atol=2e-3)
    torch.testing.assert_close(_logits(adapted.merge_and_unload(), ids), wanted, rtol=0, atol=2e-3)


def test_the_record_says_what_was_done(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    record = load_adapter(out).record.content
    assert sorted(row["name"] for row in record["tensors"]) == sorted(open_model(recipe.student).checkpoint)
    (head,) = [row for row in record["tensors"] if row["fate"] == "lora"]
    assert (head["name"], head["stage"], head["format"]) == ("lm_head.weight", "calibrated", "pair")
    assert head["rank"] == _tensors(out)[A].shape[0] == record["calibration"]["rank"]
    assert all(row["reason"] for row in record["tensors"] if row["fate"] == "kept")
    assert record["adapter_sha256"] == hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record["method_choice"]["stages"] == ["calibrated"]
    assert record["method_choice"]["relatedness"]["lineage"] == "independent"
    facts = record["calibration"]
    assert facts["kl_by_pass"][facts["best_pass"]] == min(facts["kl_by_pass"]) < facts["kl_by_pass"][0]
    assert facts["fitted_on_places"] == 2 * facts["text"]["fit"]["tokens"] == 4096
    assert set(facts["streamed"]) == STREAMED
    assert all(passed["layers_computed"] == passed["layers"] for passed in facts["streamed"].values())
    search = record["scale_search"]
    assert search["kind"] == "kept"
    assert search["tokens_needed"] is None
    parts = ("fit", "check", "search")
    assert len(search["used_documents"]) >= sum(facts["text"][part]["documents"] for part in parts)
    assert len(search["used_groups"]) == sum(facts["text"][part]["groups"] for part in parts)
    assert facts["division"]["divided_by"] == "group"


def test_the_figures_are_those_of_the_adapter_as_it_is_loaded(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    adapters = {"untouched": (None, {}), "adapted": (out, {"head": 1.0})}
    before, after = _kl_on_text(recipe, adapters, "check").values()
    facts = load_adapter(out).record.content["calibration"]
    assert before == pytest.approx(facts["kl_by_pass"][0], rel=1e-3)
    assert after == pytest.approx(facts["trials"][-1]["kl"], rel=1e-2)
    assert facts["scale"] == 1.0


def test_the_same_command_again_reuses_everything(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    before = load_adapter(out)
    again = distill(recipe)
    assert again.sha256 == before.sha256
    facts = again.record.content["calibration"]
    assert facts["passes_resumed"] == 2
    assert [passed["layers_computed"] for passed in facts["streamed"].values()] == [0] * len(STREAMED)


def test_more_search_text_changes_nothing_but_the_search(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """What is not proven on little text is proven on more, for the price of reading that."""
    recipe, out = finished
    shutil.copytree(out, tmp_path / "out")
    more = recipe.model_copy(update={"output": tmp_path / "out", "scale_search_tokens": 4096})
    facts = distill(more).record.content["calibration"]
    assert (
        facts["text"]["search"]["tokens"]
        == 4096
        == 2 * load_adapter(out).record.content["calibration"]["text"]["search"]["tokens"]
    )
    assert facts["passes_resumed"] == 2
    computed = {name for name, passed in facts["streamed"].items() if passed["layers_computed"]}
    assert computed == {"student, search text", "teacher, search text"}
    assert facts["kl_by_pass"] == load_adapter(out).record.content["calibration"]["kl_by_pass"]


def _killed(recipe: Recipe, folder: Path, step: str, fraction: float) -> None:
    file = folder / "recipe.yaml"
    file.write_text(recipe_yaml(recipe))
    command = [sys.executable, "-m", "tests.support.killed", str(file), step, str(fraction)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (recipe.output / "run.json").exists()


@pytest.mark.parametrize(("step", "fraction"), [("reading the text: teacher", 0.5), ("fitting the head", 0.6)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny: tuple[Path, Path], tmp_path: Path, step: str, fraction: float
) -> None:
    whole = distill(recipe_for(*tiny, tmp_path / "whole", **HEAD_ALONE))
    recipe = recipe_for(*tiny, tmp_path / "out", **HEAD_ALONE, **SAVED_OFTEN)
    _killed(recipe, tmp_path, step, fraction)
    resumed = distill(recipe)
    assert resumed.sha256 == whole.sha256
    facts = resumed.record.content["calibration"]
    streamed = facts["streamed"]
    assert streamed["student"]["layers_computed"] == 0
    if "teacher" in step:
        assert streamed["teacher"]["layers_reused"] == 1
        assert facts["passes_resumed"] == 0
    else:
        computed = {name for name, passed in streamed.items() if passed["layers_computed"]}
        assert computed == {"student, search text", "teacher, search text"}
        assert facts["passes_resumed"] == 1


def _kl_on_text(
    recipe: Recipe, adapters: Mapping[str, tuple[Path | None, Mapping[str, float]]], part: str = "search"
) -> dict[str, float]:
    """Mean KL on a part of the text, models in memory and adapters as PEFT loads them, times scales."""
    from moe_svd_distill.evaluation.loading import AdaptedStudent
    from moe_svd_distill.evaluation.sources import measure, record_teacher

    with open_pair(recipe.teacher, recipe.student) as pair:
        text = read_run_text(recipe, pair, recipe.method.split("+")).parts[part]
    record = record_teacher(load(Path(recipe.teacher)), text.student, vocabulary=len(text.student_ids))
    found = {}
    for name, (folder, scales) in adapters.items():
        model = load(Path(recipe.student))
        if folder is not None:
            model = scaled(AdaptedStudent.load(model, folder).model, scales)
        measured = measure(model, record)
        found[name] = float(measured.kl.sum() / measured.tokens.sum())
    return found


@pytest.mark.slow
def test_both_stages_are_never_worse_than_the_weights_alone(tmp_path: Path) -> None:
    pair = lab_pair("sibling")
    common = LITTLE | {"scale_search_tokens": 1024, "rank": 16, "head_rank": 32}
    both = recipe_for(pair.teacher, pair.student, tmp_path / "both", **common, method="weights+calibrated")
    adapter = distill(both)
    shutil.copytree(tmp_path / "both" / "parts", tmp_path / "weights" / "parts")
    alone = {"method": "weights", "scale_search": False}
    weights = distill(recipe_for(pair.teacher, pair.student, tmp_path / "weights", **common | alone))
    assert weights.record.content["execution"]["units_computed"] == 0
    search = adapter.record.content["scale_search"]
    scales = search["weights"]["scales"]
    adapters = {
        "untouched": (None, {}),
        "weights": (weights.folder, scales),
        "both": (adapter.folder, dict.fromkeys(scales, 1.0)),
    }
    found = _kl_on_text(both, adapters)
    assert found["weights"] < 0.9 * found["untouched"]
    assert found["both"] <= found["weights"] + 1e-4
    verify(adapter.folder)
    rows = {row["name"]: row for row in adapter.record.content["tensors"]}
    assert sorted(rows) == sorted(open_model(both.student).checkpoint)
    assert ("stage" in rows["lm_head.weight"]) == (search["calibrated"]["kind"] == "kept")
    before, after = _tensors(weights.folder), _tensors(adapter.folder)
    assert set(before) == set(after)
    for key, tensor in before.items():
        if key not in (A, B):  # the fitted head takes the place of the other; the rest is only scaled
            factor = 1.0 if "lora_A" in key else scales[group_of(key)]
            torch.testing.assert_close(after[key].float(), tensor.float() * factor, rtol=1e-2, atol=1e-6)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tied")
    student = student_with_tokenizer("llama", folder / "student", tokenizer, tie_word_embeddings=True)
    return teacher_with_other_head(student, folder / "teacher"), student


def _whole_head_is_right(adapter: Adapter, teacher: Path, student: Path) -> None:
    from peft import PeftModel

    assert json.loads((adapter.folder / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    head = _tensors(adapter.folder)["base_model.model.lm_head.weight"]
    base, ids = load(student), _ids(300)
    with torch.no_grad():
        wanted = base.model(input_ids=ids).last_hidden_state @ head.float().T
    embeddings = base.get_input_embeddings().weight.detach().clone()
    before, aim = _logits(base, ids), _logits(load(teacher), ids)
    adapted = PeftModel.from_pretrained(base, str(adapter.folder))
    live = _logits(adapted, ids)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(live, wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(_logits(merged, ids), wanted, rtol=0, atol=1e-3)
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert (live - aim).norm() < 0.8 * (before - aim).norm()
    verify(adapter.folder)
    assert adapter.transferred


def test_a_student_with_tied_embeddings_gets_a_head_of_its_own(tied: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = distill(recipe_for(*tied, tmp_path / "out", **MORE_PASSES))
    _whole_head_is_right(adapter, *tied)
    (head,) = [row for row in adapter.record.content["tensors"] if row["fate"] == "lora"]
    assert head["format"] == "whole"


def test_a_pair_for_a_tied_head_is_refused_before_any_work(tied: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ties its head"):
        distill(recipe_for(*tied, tmp_path / "out", **HEAD_ALONE, head_format="pair"))
    assert not (tmp_path / "out").exists()


def test_the_head_can_be_asked_for_whole(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    _whole_head_is_right(distill(recipe_for(*tiny, tmp_path / "out", **MORE_PASSES, head_format="whole")), *tiny)


def test_ranks_that_are_asked_for_are_kept(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    asked = HEAD_ALONE | {"fit_passes": 1, "cache": str(tmp_path / "cache")}
    for number, (values, rank) in enumerate(
        [({"head_rank": 48}, 48), ({"head_rank": "full"}, 32), ({"ranks": {"lm_*": 5}}, 5), ({}, None)]
    ):
        adapter = distill(recipe_for(*tiny, tmp_path / str(number), **asked, **values))
        if rank is None:
            rank = adapter.record.content["calibration"]["rank"]
            assert rank in (16, 32)
        assert _tensors(adapter.folder)[A].shape[0] == rank
        assert json.loads((adapter.folder / "adapter_config.json").read_text())["r"] == rank
        assert (adapter.record.content["calibration"]["streamed"]["teacher"]["layers_computed"] == 0) == (number > 0)
    assert not (tmp_path / "0" / "cache").exists()


def test_a_shortfall_of_text_is_said(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    lines = TEXT.read_text(encoding="utf-8").splitlines()[:40]
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(json.dumps({"text": json.loads(line)["text"][:600]}) for line in lines))
    notes: list[str] = []
    values = HEAD_ALONE | {"calibration": [str(short)], "tokens": 1 << 20, "fit_passes": 1}
    adapter = distill(recipe_for(*tiny, tmp_path / "out", **values), notes_to(notes))
    shortfalls = adapter.record.content["calibration"]["shortfalls"]
    assert set(shortfalls) <= set(notes)
    (of_fit,) = [shortfall for shortfall in shortfalls if shortfall.startswith("fit text: ")]
    assert "1,048,576 asked for" in of_fit
    assert f"{adapter.record.content['calibration']['text']['fit']['tokens']:,} tokens" in of_fit


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    """Random models with tokenizers of their own."""
    folder = tmp_path_factory.mktemp("strangers")
    other = trained_tokenizer(folder / "tokenizer", 600, part=1)
    teacher = student_with_tokenizer("llama", folder / "teacher", other, hidden_size=48)
    return teacher, student_with_tokenizer("qwen3_moe", folder / "student", tokenizer)


def test_different_tokenizers_are_refused_unless_they_are_to_be_compared(
    strangers: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(IncompatiblePairError, match="vocabular") as caught:
        distill(recipe_for(*strangers, tmp_path / "out", **HEAD_ALONE))
    assert caught.value.exit_code == 78
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    adapter = distill(recipe_for(*strangers, tmp_path / "out", **HEAD_ALONE, vocabulary="shared"))
    verify(adapter.folder)
    facts = adapter.record.content["calibration"]
    assert facts["copies_of_the_text"] == 0
    assert "tokenizers differ" in facts["copies_reason"]
    assert 256 < facts["common_tokens"] < 400
    assert facts["text"]["fit"]["places_compared"] < 1
    untouched = _tensors(adapter.folder)[B].float().abs().sum(1) == 0
    assert int((~untouched).sum()) in (0, facts["common_tokens"])
    assert adapter.transferred == (not bool(untouched.all()))
    if not adapter.transferred:
        assert "Nothing was transferred" in adapter.record.content["scale_search"]["decision"]


def test_the_same_weights_are_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny[0], tmp_path / "copy")
    with pytest.raises(NothingToTransferError, match="same weights") as caught:
        distill(recipe_for(tiny[0], copy, tmp_path / "out", **LITTLE))
    assert caught.value.exit_code == 79
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_rate_that_had_to_be_halved_is_said_and_recorded(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_svd_distill.pipeline.schedule.HEAD_RATE", 1e4)
    said: list[str] = []
    adapter = distill(recipe_for(*tiny, tmp_path / "out", **HEAD_ALONE), notes_to(said))
    halvings = adapter.record.content["calibration"]["halvings"]
    assert halvings >= 1
    anew = [note for note in said if "begins anew at half the rate" in note]
    assert len(anew) == halvings


def test_a_head_that_already_agrees_transfers_nothing(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny[0], tmp_path / "copy")
    adapter = distill(recipe_for(tiny[0], copy, tmp_path / "out", **HEAD_ALONE | {"fit_passes": 1}))
    assert adapter.transferred is False
    assert not _tensors(adapter.folder)[B].any()
    assert "Nothing was transferred" in adapter.record.content["scale_search"]["decision"]


def test_a_quantised_teacher_gives_nearly_the_same_head(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = tiny
    coded = in_float8(teacher, tmp_path / "teacher_fp8")
    adapter = distill(recipe_for(coded, student, tmp_path / "out", **MORE_PASSES))
    verify(adapter.folder)
    assert adapter.transferred
    plain = distill(recipe_for(teacher, student, tmp_path / "plain", **MORE_PASSES))
    products = [_tensors(folder)[B].float() @ _tensors(folder)[A].float() for folder in (adapter.folder, plain.folder)]
    assert 0 < float((products[0] - products[1]).norm() / products[1].norm()) < 0.5


def test_models_without_a_longest_sequence_read_the_usual_one(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in tiny]
    with open_pair(str(tiny[0]), str(tiny[1])) as pair:
        assert longest_sequence(pair) == 128
    for folder in copies:
        config = json.loads((folder / "config.json").read_text())
        del config["max_position_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    with open_pair(str(copies[0]), str(copies[1])) as pair:
        assert longest_sequence(pair) == LONGEST_SEQUENCE


@pytest.fixture(scope="module")
def last_layer(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """The default: the student's last layer is fitted with the head."""
    out = tmp_path_factory.mktemp("last_layer") / "out"
    recipe = recipe_for(*tiny, out, **LITTLE | {"method": "calibrated", "last_layers": 1, "rank": 4})
    distill(recipe)
    return recipe, out


def test_the_last_layer_is_fitted_with_the_head(last_layer: tuple[Recipe, Path]) -> None:
    recipe, out = last_layer
    record = load_adapter(out).record.content
    verify(out)
    changed = {row["name"]: row for row in record["tensors"] if row["fate"] == "lora"}
    assert sorted(row["name"] for row in record["tensors"]) == sorted(open_model(recipe.student).checkpoint)
    assert {row["layer"] for row in changed.values()} == {1, None}
    assert len(changed) == 1 + record["calibration"]["last_layers_matrices"]
    assert all(row["delta_norm"] > 0 for row in changed.values())
    assert record["calibration"]["last_layers"] == 1
    scales = dict.fromkeys(("attention", "mlp", "experts", "head", "embeddings"), 1.0)
    found = _kl_on_text(recipe, {"untouched": (None, {}), "adapted": (out, scales)})
    (trial,) = [
        trial for trial in record["scale_search"]["trials"] if trial["scales"] == record["scale_search"]["scales"]
    ]
    assert trial["kl_fall"] > 0
    assert found["adapted"] < found["untouched"] - 0.5 * trial["kl_fall"]


def test_the_last_layer_too_is_reused(last_layer: tuple[Recipe, Path]) -> None:
    recipe, out = last_layer
    before = load_adapter(out)
    again = distill(recipe)
    assert again.sha256 == before.sha256
    facts = again.record.content["calibration"]
    assert [passed["layers_computed"] for passed in facts["streamed"].values()] == [0] * len(STREAMED)
    assert facts["passes_resumed"] == 2


@pytest.mark.slow
def test_a_killed_fit_of_the_last_layer_goes_on_to_the_same_bytes(
    last_layer: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = last_layer
    training = recipe.training.model_copy(update={"save_seconds": 1e-9})
    other = recipe.model_copy(update={"output": tmp_path / "out", "training": training})
    _killed(other, tmp_path, "fitting the head and the last layers", 0.6)
    resumed = distill(other)
    assert resumed.sha256 == load_adapter(out).sha256
    assert resumed.record.content["calibration"]["passes_resumed"] == 1
