"""Loading a model that fits in memory, after checking that it does, and an adapter around its layers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.checkpoints.llama_cpp.folder import file_behind
from moe_svd_distill.checkpoints.remote.folder import RemoteFolder
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, UsageError, reason_of

if TYPE_CHECKING:
    import torch

Residency: TypeAlias = Literal["resident", "streamed"]
Mode: TypeAlias = Literal["auto", "resident", "streamed"]
"""In memory as transformers loads it, layer by layer from its files, or in memory where it fits."""

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_HEADROOM = 1.1


def load_model(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Load a causal language model for evaluation, by default float32 on the CPU and bfloat16 elsewhere.

    No code from the folder is run and nothing is fetched.
    """
    import torch

    from moe_svd_distill.architecture.building import model_class, parse_config

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise MissingInputError(f"{folder} holds no model (no config.json)", "Check the path")
    if dtype is None:
        dtype = default_dtype(device)
    require_memory(folder, device, dtype)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with _no_progress_bar():
            parsed = parse_config(config, str(folder))
            if _has_files(folder):
                model = model_class(parsed).from_pretrained(
                    str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
                )
            else:
                with open_checkpoint(folder) as checkpoint:
                    checkpoint.prefetch(checkpoint)
                    weights = {name: _Weight(checkpoint, name) for name in checkpoint}
                    model = model_class(parsed).from_pretrained(None, config=parsed, state_dict=weights, dtype=dtype)
    except DistillError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BadDataError(f"The model in {folder} cannot be loaded ({reason_of(error)})", "Check the model") from error
    if torch.device(device).type == "cpu" and hasattr(model, "set_experts_implementation"):
        # On a CPU the loop over experts is 1.7 times as fast as grouped_mm, and 20 times as fast as batched_mm.
        model.set_experts_implementation("eager")
    return model.to(device).eval().requires_grad_(False)


def _has_files(folder: Path) -> bool:
    """Whether transformers finds the weights in the folder; those of a GGUF file or read by range it does not."""
    return file_behind(folder.absolute()) is None and RemoteFolder.of(folder) is None


class _Weight:
    """A weight that transformers reads when it comes to it."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._checkpoint.read(self._name)


class AdaptedStudent:
    """A student model with its adapter loaded by PEFT; `model` is what to measure.

    Attributes:
        model: The causal language model with adapted layers inside.
    """

    def __init__(self, peft_model: Any) -> None:
        self._peft = peft_model
        self.model = peft_model.get_base_model()

    @classmethod
    def load(cls, student: Any, adapter_folder: str | Path) -> AdaptedStudent:
        """Wrap a loaded student's layers, in place, and refuse an adapter that PEFT would half ignore.

        Args:
            student: A transformers causal language model.
            adapter_folder: Folder with adapter_config.json and adapter_model.safetensors.
        """
        from peft import PeftModel

        from moe_svd_distill.adapter.verify import check_loads

        check_loads(adapter_folder, student.config.to_dict())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # check_loads has settled what PEFT warns about
                loaded = PeftModel.from_pretrained(student, str(adapter_folder))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = reason_of(error)
            raise BadDataError(f"PEFT cannot load the adapter in {adapter_folder} ({reason})", "Verify it") from error
        return cls(loaded.eval().requires_grad_(False))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The model computes without the adapter as long as the context lasts."""
        with self._peft.disable_adapter():
            yield

    def detach(self) -> Any:
        """Return the untouched student without any adapter; this object must not be used afterwards."""
        from peft.utils import ModulesToSaveWrapper

        originals = {
            name: module.original_module
            for name, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        }
        student = self._peft.unload()
        for name, original in originals.items():  # PEFT leaves the replacement behind
            student.set_submodule(name, original)
        if hasattr(student, "peft_config"):  # what makes PEFT take the next adapter for a second one
            del student.peft_config
        return student


def require_memory(folder: Path, device: str, dtype: torch.dtype) -> None:
    """Refuse before loading when the free memory of the device is smaller than the model."""
    needed, available = _needed_bytes(folder, dtype), available_bytes(device)
    if needed > available:
        raise UsageError(
            f"{folder} takes {needed / 2**30:.1f} GiB as {dtype_name(dtype)} and {device} has "
            f"{available / 2**30:.1f} GiB free",
            "Free some memory, or take a machine with more; `evaluate --mode streamed` needs less",
        )


def fits(folder: Path, device: str, dtype: torch.dtype | None = None) -> bool:
    """Whether `load_model` would find enough free memory on the device."""
    return _needed_bytes(folder, dtype or default_dtype(device)) <= available_bytes(device)


def residency_of(folder: Path, device: str, mode: Mode, dtype: torch.dtype | None = None) -> Residency:
    """Decide for one model: as asked, or resident where the free memory of the device is enough."""
    if mode == "auto":
        return "resident" if fits(folder, device, dtype) else "streamed"
    return mode


def default_dtype(device: str) -> torch.dtype:
    """float32 on the CPU and bfloat16 elsewhere."""
    import torch

    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes and options name it."""
    return str(dtype).removeprefix("torch.")


def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32; for writing text, where rounding is no figure."""
    import torch

    if torch.device(device).type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def _needed_bytes(folder: Path, dtype: torch.dtype) -> int:
    return int(model_bytes(folder, dtype.itemsize) * _HEADROOM)


def model_bytes(folder: Path, itemsize: int) -> int:
    """Estimate the bytes of a model's weights in memory from its file sizes and the type it is stored in."""
    if not _has_files(folder):
        with open_checkpoint(folder) as checkpoint:
            return sum(math.prod(info.shape) for info in checkpoint.values()) * itemsize
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadDataError(f"{folder / 'config.json'} is not JSON ({error})", "Fetch the model again") from error
    text = config.get("text_config") or {}
    named = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    stored_itemsize = 1 if "quantization_config" in config else _BYTES.get(str(named), 2)
    return stored * itemsize // stored_itemsize


def available_bytes(device: str) -> int:
    """Free memory of a device."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    from moe_svd_distill.streaming.devices import free_memory

    return free_memory()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal, which is the command line's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
