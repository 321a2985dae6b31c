"""What is asked for: one validated, frozen description of a run.

Layer, expert and dimension counts are not here: they are read from the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moe_svd_distill.recipe.presets import Preset, with_preset
from moe_svd_distill.recipe.section import Section
from moe_svd_distill.recipe.sections import ExpertSettings, TrainingRecipe
from moe_svd_distill.recipe.text_source import TextSource, text_sources

DEFAULT_HEAD_RANK = 64
Tracker = Literal["tensorboard", "wandb"]
Rank = Annotated[int, Field(ge=1)] | Literal["full"]


class Recipe(Section):
    """Everything a run depends on besides the models themselves."""

    teacher: str = Field(
        description="Folder, GGUF file, hub id (with optional @revision) or address (hf://…: read by range) of the "
        "teacher."
    )
    student: str = Field(
        description="Folder, GGUF file, hub id (with optional @revision) or address (hf://…: read by range) of the "
        "student."
    )
    base_model: str | None = Field(
        None,
        description="What the adapter names as its base model; default: the student, of a GGUF file the checkpoint "
        "that its metadata names.",
    )
    output: Path = Field(Path("out"), description="Folder the adapter is written to.")
    preset: Preset | None = Field(
        None,
        description="Values for keys that are not given at the same place. fast: 16,384 tokens. balanced: method "
        "refined, 131,072 tokens. best: method refined, 393,216 tokens.",
    )
    method: Literal["auto", "weights", "calibrated", "weights+calibrated", "refined"] = Field(
        "auto",
        description="Stages to run. weights: the projected weight difference, no text needed. calibrated: the head "
        "fitted to the teacher's distributions on the calibration text. refined: training, see start. "
        "auto measures how related the pair is.",
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
    experts: ExpertSettings = Field(default_factory=lambda: ExpertSettings(), description="How experts are made.")
    norms: Literal["fold", "keep"] = Field(
        "fold",
        description="fold: the teacher's norm gains are multiplied into the weights that read them, where widths are "
        "equal.",
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

    start: str = Field(
        "auto",
        description="What training begins with: zero, weights, calibrated, weights+calibrated, or the folder of an "
        "adapter for this student; auto: what method auto would choose for the pair, of more than 65,536 tokens "
        "without the calibrated stage.",
    )
    training: TrainingRecipe = Field(
        default_factory=lambda: TrainingRecipe(), description="How the refined stage trains."
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

    calibration: list[str | TextSource] = Field(
        default_factory=list,
        description="Text the adapter is fitted and its scale searched on: files, folders, datasets:NAME; of several, "
        "{path: a, share: 0.3} for their shares of the tokens, and field: body for where a source's text is.",
    )
    scale_search: bool = Field(True, description="Scale the adapter by what helps on the calibration text, if any.")
    scale_search_tokens: int = Field(
        16384, ge=512, description="Tokens of calibration text the scale search looks at, at most."
    )
    tokens: int = Field(
        65536, ge=512, description="Tokens of calibration text the adapter is fitted on; the weights stage needs none."
    )
    sequence_tokens: Literal["auto"] | Annotated[int, Field(ge=32)] = Field(
        "auto",
        description="Tokens of a sequence the models read, at most what they take. auto: 512.",
    )
    copies: Literal["auto"] | Annotated[int, Field(ge=0, le=31)] = Field(
        "auto",
        description="Copies of the fitting text with tokens replaced by the student's own predictions; the teacher "
        "labels them too. auto: 7 for little text, 2 for much, none in a training whose head stands still.",
    )
    own_text: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="How many of the copies are text the student draws by itself, so that a fit on one kind of text "
        "does not harm others. auto: 3 of 7, 1 of 2 or 3.",
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
        None,
        description="Field of records that holds the text; default: text, messages, conversations, prompt and "
        "completion, or instruction and output.",
    )
    text_group: str | None = Field(
        None,
        description="Field of records that names the source a record belongs to; no source is both fitted and "
        "searched on. Default: group, repo, repository, repo_name, package or conversation_id; a record without is a "
        "source by itself.",
    )
    cache: Path | None = Field(
        None,
        description="Folder for hidden states, reused by every run on the same model and text; default: the output's.",
    )

    remote_cache_gb: float | None = Field(
        None,
        gt=0,
        description="GB on the disk that tensors of a model read by range (hf://, s3://) may take, in HF_HOME; the "
        "ones used longest ago go first. Default: what was said before for this model, or all that are fetched.",
    )

    report_to: list[Tracker] = Field(
        default_factory=list,
        description="Trackers that curves and figures go to: event files of TensorBoard in the folder runs of the "
        "output, a run of Weights & Biases (offline with WANDB_MODE=offline).",
    )
    devices: list[str] = Field(default_factory=lambda: ["auto"], description="auto, cpu, or cuda:0, cuda:1, …")
    workers: int | None = Field(None, ge=1, description="Worker processes; default: one per device, or per CPU core.")
    threads: int = Field(1, ge=1, description="CPU threads of one worker; part of the result's identity.")
    seed: int = Field(42, ge=0, description="Seed of every random choice.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, Mapping) else values

    @field_validator("devices", "report_to", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_at_all(cls, value: Any) -> Any:
        return [] if value in ("none", ["none"]) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str | Path) else value
        return [str(part) if isinstance(part, Path) else part for part in parts] if isinstance(parts, list) else parts

    @field_validator("calibration")
    @classmethod
    def _shares(cls, value: list[str | TextSource]) -> list[str | TextSource]:
        text_sources(value)
        return value

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
                raise ValueError(f"output is the {role}'s own folder: give another output")
        return self

    @model_validator(mode="after")
    def _start_of_something(self) -> Recipe:
        if self.start != "auto" and self.method != "refined":
            raise ValueError(f"start is {self.start}, but method {self.method} trains nothing: give method refined")
        return self

    @model_validator(mode="after")
    def _something_to_fit(self) -> Recipe:
        if "calibrated" in self.method or self.method == "refined":
            if self.head == "keep":
                raise ValueError(
                    f"method {self.method} fits the head, and head: keep leaves it as it is: give head: delta"
                )
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
