"""A student in memory with an adapter around its layers, as PEFT loads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, reason_of


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

        check_loads(adapter_folder, student.config.to_dict())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # check_loads has settled what PEFT warns about
                loaded = PeftModel.from_pretrained(student, str(adapter_folder))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = reason_of(error)
            raise BadDataError(f"PEFT cannot load the adapter in {adapter_folder} ({reason})", "Verify it") from error
        return cls(loaded.eval().requires_grad_(False))

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
