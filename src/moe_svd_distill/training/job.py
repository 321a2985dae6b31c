"""A training run as data, and what every process of it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.whitening import Whitening, whitening
from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.execution.parts import part_path, part_tensors, read_record, verify_part, write_part
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.streaming import Decoder, Head, LayerInputs, load_head
from moe_svd_distill.streaming.tables import EmbeddingChange
from moe_svd_distill.training.engine import Engine, HeadEngine, ResidentEngine, StreamedEngine
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.lora_parameters import LoraParameters
from moe_svd_distill.training.process_group import ProcessGroup
from moe_svd_distill.training.progress import Progress, TrainingCheckpoints
from moe_svd_distill.training.settings import Placement, TrainingSettings, needs_rows
from moe_svd_distill.training.text import TextFile, TrainingText
from moe_svd_distill.training.trials import (
    MULTIPLES,
    NEARLY_THERE,
    POLISHING,
    RateChoice,
    choose_rate,
    with_best,
)

HEAD, EMBEDDING = "head", "embedding"
_MOMENT_TOKENS = 32_768

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """All that a process needs to know.

    Attributes:
        teacher: For its head.
        student: What is trained.
        teacher_ids: Rows of the teacher's head that stand for the common tokens, (v,).
        student_ids: Those of the student's, (v,).
        text: To train on.
        check: To measure on.
        first: The layer that training begins at; the number of layers for the head alone.
        ranks: Hub name to rank of every pair that is trained.
        start: A part with the pairs to begin with, as ``name#A`` and ``name#B``, the head's change over the common
            tokens as ``head``, and what is added to the embeddings as ``embedding#A`` and ``embedding#B``.
        settings: How to train.
        tried: Whether the learning rates of the settings are a guess to be tried; they are taken as they are if not.
        placement: Where to train, in how many processes.
        folder: Where saves lie, and inputs of layers that memory does not hold.
        key: Hash of everything the run depends on.
        save_seconds: Between two saves.
    """

    teacher: Checkpoint
    student: Checkpoint
    teacher_ids: IntArray
    student_ids: IntArray
    text: TextFile
    check: TextFile
    first: int
    ranks: Mapping[str, int]
    start: Path
    settings: TrainingSettings
    tried: bool
    placement: Placement
    folder: Path
    key: str
    save_seconds: float


@dataclass(frozen=True)
class TrainingReport:
    """How training went.

    Attributes:
        outcome: Of the run itself.
        settings: With the learning rate that was chosen.
        choice: Of the learning rate; None where it was given.
        bytes_read: Stored bytes of the student's weights that were read meanwhile, by one process.
        seconds_reading: Time in which a layer was being read, beside other work or not; 0 in memory.
        seconds_waiting: Time without work because a layer was not there yet.
        peak_anonymous_bytes: The process's largest anonymous memory seen, libraries included.
        peak_device_bytes: The most that lay on the GPU of one process at a time; 0 on a CPU.
    """

    outcome: Progress
    settings: TrainingSettings
    choice: RateChoice | None
    bytes_read: int
    seconds_reading: float
    seconds_waiting: float
    peak_anonymous_bytes: int
    peak_device_bytes: int


class StudentInTraining:
    """The student of a job in one process.

    Attributes:
        student_ids: Rows of its head that stand for the common tokens, (v,).
        metric: Second moment of the student's states, where the head moves.
        teacher: The teacher's head, where the loss needs its logits.
    """

    metric: Whitening
    teacher: Head

    def __init__(self, job: TrainingJob, group: ProcessGroup) -> None:
        """Read it, and begin with the job's start.

        Args:
            job: The run.
            group: Its processes.
        """
        self._job, self._group, self.student_ids = job, group, job.student_ids
        self.device, dtype = torch.device(job.placement.devices[group.number]), job.placement.torch_dtype
        self.check = job.check.open(dtype)
        self.text = job.text.open(dtype)
        tensors = {name: tensor.clone() for name, tensor in part_tensors(job.start).items()}
        change = _embedding_change(tensors)
        self.decoder = Decoder(job.student, (self.device,), dtype, gradients=True, embedding_change=change)
        pairs = {
            name.removesuffix("#A"): (tensors[name.removesuffix("A") + "B"], tensors[name])
            for name in tensors
            if name.endswith("#A") and not name.startswith(EMBEDDING)
        }
        self.bank = LoraParameters(self.decoder.matrices.of_layer, job.ranks, self.device, pairs, job.settings.seed)
        self.engine = self._engine()
        device = str(self.device)
        self.student = load_head(job.student, device, torch.float32, tokens=job.student_ids)
        self._closing = ExitStack()
        teacher = load_head(job.teacher, device, torch.float32, tokens=job.teacher_ids)
        self.head = self._head(tensors.get(HEAD), teacher)
        self._first = [values.clone() for values in (self.bank.values, self.head.values)] if job.tried else []
        self._started = bool(pairs) or HEAD in tensors

    def _engine(self) -> Engine:
        """What runs the layers that are trained, and those behind them; after the bank, whose pairs act in them."""
        job, decoder = self._job, self.decoder
        if job.first == decoder.layers:
            return HeadEngine(self.bank)
        if job.text.inputs is not None:
            decoder.knows_inputs(LayerInputs(job.first, job.text.inputs.path))
        if not job.placement.resident:
            return StreamedEngine(decoder, self.bank, job.folder, first=job.first)
        decoder.enter_all(job.first)
        return ResidentEngine(decoder, self.bank, job.first)

    def train(self, on_progress: OnProgress) -> TrainingReport:
        """Train, or go on with it; the best state is then in the bank and the head. An interrupt notes what is kept."""
        saves = TrainingCheckpoints(self._job.folder, self._job.key, self._group.number == 0, self._job.save_seconds)
        try:
            return self._train(saves, on_progress)
        except KeyboardInterrupt as stop:
            stop.add_note(saves.next_run)
            raise

    def _train(self, saves: TrainingCheckpoints, on_progress: OnProgress) -> TrainingReport:
        choice = self._choice()
        settings = self._job.settings if choice is None else with_best(self._job.settings, choice.trials)
        before = self._reading()
        kl_before = choice.start_kl if choice else None
        run = self._run(settings)
        self._first.clear()
        outcome = run.complete(saves, on_progress, kl_before)
        read, reading, waiting = (now - then for now, then in zip(self._reading(), before, strict=True))
        on_device = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        anonymous = self.decoder.watch.look()
        return TrainingReport(outcome, settings, choice, int(read), reading, waiting, anonymous, on_device)

    def _reading(self) -> tuple[float, float, float]:
        """Bytes read so far, seconds of reading, seconds of waiting for it."""
        reader = self.decoder.reader
        return self.decoder.bytes_read, reader.seconds_reading, reader.seconds_waiting

    def _run(self, settings: TrainingSettings, untouched: bool = False) -> Training:
        """A run that begins at the start, to which trials have to return, or with the untouched student."""
        for values, first in zip((self.bank.values, self.head.values), self._first, strict=False):
            values.copy_(first)
        if untouched:
            self.bank.reset_to_zero()
            self.head.reset_to_zero()
        return Training(self.engine, self.head, self.text, self.check, settings, self._group)

    def _choice(self) -> RateChoice | None:
        """The trials of the learning rate, made once in the life of a run."""
        job = self._job
        if not job.tried:
            return None
        key = f"rate-{job.key}"
        path = part_path(job.folder, key)
        if verify_part(path, key):
            return read_as(RateChoice, read_record(path))
        untouched = self._run(job.settings, untouched=True).measure()
        start_kl = self._run(job.settings).measure() if self._started else untouched
        polishing = start_kl < NEARLY_THERE * untouched
        begin = partial(self._run, untouched=not polishing)
        before, multiples = (start_kl, POLISHING) if polishing else (untouched, MULTIPLES)
        choice = RateChoice(choose_rate(begin, job.settings, before, multiples), start_kl, polishing)
        if self._group.number == 0:
            write_part(job.folder, key, {}, asdict(choice))
        return choice

    def states_of(self, text: TrainingText, scale: float) -> Tensor:
        """The student's states at the places of a text, (places, d), with this share of every pair."""
        batches = text.batches(self._job.settings.batch_tokens, self.device)
        with self.bank.scaled(scale):
            return torch.cat([states.float().cpu() for states in self.engine.states(batches)])

    def close(self) -> None:
        """Let go of the student."""
        self._closing.close()
        self.decoder.close()

    def _head(self, start: Tensor | None, teacher: Head) -> TrainedHead | FixedHead:
        """The head; where it stays what it is, the texts are made short at once, without the teacher from then on."""
        job, settings = self._job, self._job.settings
        short = needs_rows(settings.head == "fixed", settings.divergence) and self.student.transform.cap is None
        if not short or start is not None:
            self.teacher, self.metric = teacher, self._metric()
            return TrainedHead(self.student, teacher, self.metric, settings, start)
        head = FixedHead(self.student)

        def short_of(text: TrainingText, share: float, name: str) -> TrainingText:
            rows = head.with_expectations(text, teacher, share, job.folder, f"{self._group.number}-{name}")
            return self._closing.enter_context(rows)[0]

        self.text = short_of(self.text, settings.cross_entropy_share, "text")
        self.check = short_of(self.check, 0.0, "check")
        return head

    def _metric(self) -> Whitening:
        """Second moment of the student's states on some of the text, as it begins."""
        rows = np.arange(min(len(self.text), max(1, _MOMENT_TOKENS // self.text.length)))
        total, count = None, 0
        for states in self.engine.states(self.text.batches(self._job.settings.batch_tokens, self.device, rows)):
            wide = states.float()
            product = (wide.T @ wide).double()
            total = product if total is None else total + product
            count += len(wide)
        assert total is not None
        return whitening((total / count).float())


def _embedding_change(tensors: Mapping[str, Tensor]) -> EmbeddingChange | None:
    if f"{EMBEDDING}#A" not in tensors:
        return None
    rows, columns = tensors[f"{EMBEDDING}#B"], tensors[f"{EMBEDDING}#A"]

    def change(ids: Tensor) -> Tensor:
        return rows[ids.cpu()].float() @ columns.float()

    return change


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many CPU threads as a job says: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
