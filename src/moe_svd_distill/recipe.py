"""What is asked for: one validated, frozen description of a run, from file, environment and command line.

Precedence: command line > environment (``MOE_SVD_DISTILL_<KEY>``) > recipe file > defaults. Layer, expert and dimension
counts are not here: they are read from the models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError

ENVIRONMENT_PREFIX = "MOE_SVD_DISTILL_"
DEFAULT_HEAD_RANK = 64
Rank = Annotated[int, Field(ge=1)] | Literal["full"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ExpertSettings(_Section):
    """How the experts of a mixture-of-experts layer are made."""

    fingerprint: Literal["weights", "router", "function"] = Field(
        "weights",
        description="What experts are clustered by: their concatenated weights, their router rows, or a "
        "neuron-order-free sample of the function they compute.",
    )
    clusters: Literal["student"] | Annotated[int, Field(ge=1)] = Field(
        "student", description="Number of clusters; 'student' is the number of experts in the student's layer."
    )
    blend: Literal["frobenius", "uniform"] = Field(
        "frobenius", description="Weights of a cluster's experts: by Frobenius norm, or equal."
    )
    assignment: Literal["optimal", "index"] = Field(
        "optimal",
        description="Which student expert a cluster becomes: the most similar one (optimal assignment), or cluster "
        "number = expert number as in the first generation.",
    )


class Recipe(_Section):
    """Everything a run depends on besides the models themselves."""

    teacher: str = Field(description="Folder or hub id (with optional @revision) of the teacher.")
    student: str = Field(description="Folder or hub id (with optional @revision) of the student.")
    output: Path = Field(Path("out"), description="Folder the adapter is written to.")
    method: Literal["auto", "weights", "calibrated", "weights+calibrated"] = Field(
        "auto",
        description="Stages to run. weights: the projected weight difference, no text needed. calibrated: the head "
        "fitted to the teacher's distributions on the calibration text. auto measures how related the pair is.",
    )

    depth_map: Literal["linear", "endpoints", "tanh"] | list[Annotated[float, Field(ge=0)]] = Field(
        "linear", description="Teacher layer of each student layer; a list gives it explicitly, fractions interpolate."
    )
    interpolation: Literal["linear", "spherical"] = Field(
        "linear", description="How two adjacent teacher layers are blended."
    )
    projection: Literal["svd", "fourier", "slice", "procrustes"] = Field(
        "svd", description="How a teacher tensor is brought to the student's shape."
    )
    alignment: Literal["auto", "none"] = Field(
        "auto", description="Find and undo permutations of neurons, attention heads and experts."
    )
    experts: ExpertSettings = Field(default_factory=lambda: ExpertSettings(), description="Experts.")
    norms: Literal["fold", "keep"] = Field(
        "fold", description="fold: the teacher's norm gains go into the weights that read them, where widths are equal."
    )
    embeddings: Literal["auto", "keep", "delta"] = Field(
        "auto",
        description="Whether the embeddings get a LoRA pair; auto: where those of teacher and student are related. "
        "Not every server takes one: keep leaves it out.",
    )
    head: Literal["keep", "delta"] = Field("delta", description="Whether the head gets a LoRA pair.")
    delta_sparsity: float = Field(
        1.0, gt=0, le=1, description="Fraction of each delta's largest entries that is kept, norm restored; 1 is off."
    )

    rank: Rank = Field(64, description="LoRA rank of the body, or 'full'.")
    head_rank: Rank | Literal["auto"] = Field(
        "auto",
        description="LoRA rank of the head and the embeddings, or 'full'. auto: where the head is fitted on text, the "
        "smallest rank servers take that keeps 98 % of the gain (512 at most); otherwise 64.",
    )
    head_format: Literal["auto", "pair", "whole"] = Field(
        "auto",
        description="How the adapter carries a fitted head: a LoRA pair, or the whole head (modules_to_save), which "
        "few servers take. auto: a pair; whole where the student's embeddings are tied to its head.",
    )
    ranks: dict[str, Rank] = Field(
        default_factory=dict, description="Rank by pattern of tensor names, for example '*.self_attn.*': 32."
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="Choose ranks that keep this share of each delta's energy; rank is the limit."
    )
    alpha: float | None = Field(
        None, gt=0, description="lora_alpha; default: the rank, so that the scale is 1. The product stays the same."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Stored type of the factors.")
    nan: Literal["fail", "skip", "zero"] = Field("fail", description="What to do with NaN or Inf in a weight.")

    calibration: list[str] = Field(
        default_factory=list,
        description="Text the adapter is fitted and its scale searched on: files, folders, datasets:NAME.",
    )
    scale_search: bool = Field(True, description="Scale the adapter by what helps on the calibration text, if any.")
    scale_search_tokens: int = Field(
        16384, ge=512, description="Tokens of calibration text the scale search looks at, at most."
    )
    tokens: int = Field(
        65536, ge=512, description="Tokens of calibration text the adapter is fitted on; the weights stage needs none."
    )
    copies: Literal["auto"] | Annotated[int, Field(ge=0, le=31)] = Field(
        "auto",
        description="Copies of the fitting text with tokens replaced by the student's own predictions; the teacher "
        "labels them too. auto: 7 for little text, 2 for much.",
    )
    fit_passes: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Passes over the cached states in the fit. auto: about 2,000 steps, in 4 to 16 passes."
    )
    last_layers: int = Field(
        1,
        ge=0,
        description="Decoder layers at the student's end fitted together with the head; 0 fits the head alone.",
    )
    vocabulary: Literal["equal", "shared"] = Field(
        "equal",
        description="equal refuses a pair with different tokenizers; shared compares it on what both have in common.",
    )
    text_field: str | None = Field(
        None, description="Field of JSON lines that holds the text; default: text, messages or conversations."
    )
    cache: Path | None = Field(
        None,
        description="Folder for hidden states, reused by every run on the same model and text; default: the output's.",
    )

    devices: list[str] = Field(default_factory=lambda: ["auto"], description="auto, cpu, or cuda:0, cuda:1, …")
    workers: int | None = Field(None, ge=1, description="Worker processes; default: one per device, or per CPU core.")
    threads: int = Field(1, ge=1, description="CPU threads of one worker; part of the result's identity.")
    seed: int = Field(42, ge=0, description="Seed of every random choice.")

    @field_validator("devices", mode="before")
    @classmethod
    def _split_devices(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(part) if isinstance(part, Path) else part for part in value] if isinstance(value, list) else value

    @field_validator("devices")
    @classmethod
    def _known_devices(cls, value: list[str]) -> list[str]:
        for device in value:
            name, _, number = device.partition(":")
            if device not in ("auto", "cpu", "cuda") and not (name == "cuda" and number.isdigit()):
                raise ValueError(f"device {device!r} is not auto, cpu or cuda:N")
        return value

    @model_validator(mode="after")
    def _different_folders(self) -> Recipe:
        output = self.output.resolve()
        for role in ("teacher", "student"):
            folder = Path(getattr(self, role))
            if folder.is_dir() and folder.resolve() == output:
                raise ValueError(f"output is the {role}'s own folder")
        return self

    @model_validator(mode="after")
    def _something_to_fit(self) -> Recipe:
        if "calibrated" in self.method:
            if self.head == "keep":
                raise ValueError("method calibrated fits the head, and head: keep leaves it as it is")
            if not self.calibration:
                raise ValueError(f"method {self.method} needs calibration text: give calibration")
        return self

    def rank_of(self, name: str, role: str, shape: tuple[int, int]) -> int:
        """The rank asked for a tensor: the last matching pattern, else the body's or the head's rank.

        A rank above the least dimension is kept for numbers (padded with zeros later, so that ranks stay uniform for
        servers) and means the least dimension for 'full'.
        """
        head_rank = DEFAULT_HEAD_RANK if self.head_rank == "auto" else self.head_rank
        asked: int | str = head_rank if role in ("head", "embedding") else self.rank
        for pattern, rank in self.ranks.items():
            if fnmatchcase(name, pattern):
                asked = rank
        return min(shape) if asked == "full" else int(asked)


def load_recipe(
    file: Path | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """Join recipe file, environment and command line into a validated recipe.

    Args:
        file: A YAML file, or None.
        overrides: Command-line values; None means not given.
        environment: Defaults to the process environment.

    Raises:
        MissingInputError: The file does not exist.
        BadDataError: The file is not YAML or not a mapping.
        UsageError: An unknown key (named with its nearest known name) or a value out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_yaml(file))
    values.update(_from_environment(os.environ if environment is None else environment))
    values.update({key: value for key, value in overrides.items() if value is not None})
    return parse_recipe(values, source=str(file) if file else "the command line")


def parse_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Validate a mapping.

    Raises:
        UsageError: As ``load_recipe``.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(error, source) from None


def _explain(error: ValidationError, source: str) -> UsageError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    same_place = [other for other in error.errors() if other["loc"][:1] == first["loc"][:1]]
    if first["type"] == "extra_forbidden":
        section = ExpertSettings if first["loc"][0] == "experts" else Recipe
        near = get_close_matches(str(first["loc"][-1]), section.model_fields, n=1, cutoff=0.4)
        action = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(section.model_fields)}"
        return UsageError(f"{source}: unknown key {place!r}", action.rstrip("?"))
    if first["type"] == "missing":
        return UsageError(f"{source}: {place} is not given", f"Give --{place} or the recipe key {place!r}")
    message = " or ".join(dict.fromkeys(other["msg"].removeprefix("Value error, ") for other in same_place))
    found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
    return UsageError(f"{source}: {place or 'recipe'}: {message}{found}", "Correct that value")


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "constrained-int"))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"recipe {file} does not exist", "Write one with: moe-svd-distill init") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadDataError(f"recipe {file} is not readable as YAML: {error}", "Correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadDataError(f"recipe {file} holds a {type(content).__name__}, expected keys and values", "Correct it")
    return content


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            values[key] = text if key in ("teacher", "student", "output", "devices") else yaml.safe_load(text)
    return values


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as commented YAML, every key present."""
    values = recipe.model_dump(mode="json")
    lines = []
    for key, field in Recipe.model_fields.items():
        lines.append(f"# {field.description}")
        lines.append(yaml.safe_dump({key: values[key]}, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines) + "\n"
