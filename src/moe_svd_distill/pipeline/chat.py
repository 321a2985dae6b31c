"""Chat: what a student answers with its adapter and without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from moe_svd_distill.errors import BadDataError, UsageError, reason_of
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.pipeline.placement import devices_here
from moe_svd_distill.pipeline.record import base_model
from moe_svd_distill.report.record import RunRecord

Speaker: TypeAlias = Literal["student", "adapted"]


@dataclass(frozen=True)
class ChatSettings:
    """How answers are written.

    Attributes:
        new_tokens: Tokens of an answer at most.
        temperature: 0: the likeliest token at a time; above: drawn.
        seed: Of what is drawn.
        device: Where the student runs; `auto` is the first CUDA device, or the CPU.
        template: Whether the tokenizer's chat template is used where there is one.
        remember: Whether a prompt is read behind those before it and their answers; needs a template.
    """

    new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    template: bool = True
    remember: bool = False


class ChatStudent:
    """A student in memory with its adapter around it.

    Args:
        adapter: Its folder.
        student: Folder or hub id; default: the one the adapter was made for.
        settings: How it answers.

    Attributes:
        templated: Whether prompts are put into a chat template.

    Raises:
        DistillError: There is no adapter or no student, it does not fit, or PEFT would not load the adapter whole.
    """

    def __init__(self, adapter: Path, student: str | None = None, settings: ChatSettings | None = None) -> None:
        from moe_svd_distill.calibration.tokenizer import auto_tokenizer
        from moe_svd_distill.evaluation.loading import AdaptedStudent, fastest_dtype, load_model

        self._settings = settings or ChatSettings()
        named = base_model(adapter, student or RunRecord.in_folder(adapter).student.source or None)
        device = devices_here([self._settings.device])[0]
        checkpoint = open_model(named).checkpoint
        checkpoint.close()
        self._tokenizer = auto_tokenizer(checkpoint.folder)
        self._student = AdaptedStudent.load(load_model(checkpoint.folder, device, fastest_dtype(device)), adapter)
        self.templated = bool(self._settings.template and getattr(self._tokenizer, "chat_template", None))
        self._said: dict[Speaker, list[dict[str, str]]] = {"student": [], "adapted": []}

    def answer(self, prompt: str, speaker: Speaker, on_text: Callable[[str], object] = lambda text: None) -> str:
        """The answer to a prompt.

        Args:
            prompt: What is said, or without a template what is gone on with.
            speaker: With the adapter (``adapted``) or without it (``student``).
            on_text: Told every piece of the answer as it is written.

        Raises:
            BadDataError: The chat template cannot be used.
            UsageError: The prompt is longer than the model reads, or the model cannot generate.
        """
        import torch

        messages = [*self._said[speaker], {"role": "user", "content": prompt}]
        read = self._read(messages, prompt)
        torch.manual_seed(self._settings.seed)
        with self._student.untouched() if speaker == "student" else nullcontext():
            answer = self._generate(read, on_text)
        if self._settings.remember and self.templated:
            self._said[speaker] = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _read(self, messages: list[dict[str, str]], prompt: str) -> Any:
        if not self.templated:
            return self._tokenizer(prompt, return_tensors="pt")
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever a template raises
            raise BadDataError(f"the chat template cannot be used ({reason_of(error)})", "Add --raw") from error

    def _generate(self, read: Any, on_text: Callable[[str], object]) -> str:
        from transformers import TextStreamer

        class Told(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                on_text(text)

        model, settings, tokenizer = self._student.model, self._settings, self._tokenizer
        length = read["input_ids"].shape[1]
        if length == 0:
            raise UsageError("the prompt has no tokens", "Say something")
        drawn = {"temperature": settings.temperature} if settings.temperature else {}
        try:
            written = model.generate(
                input_ids=read["input_ids"].to(model.device),
                attention_mask=read["attention_mask"].to(model.device),
                max_new_tokens=settings.new_tokens,
                do_sample=bool(drawn),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=Told(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **drawn,
            )
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                f"{type(model).__name__} cannot go on with {length} tokens ({reason_of(error)})",
                "Give a shorter prompt",
            ) from error
        return str(tokenizer.decode(written[0, length:], skip_special_tokens=True))
