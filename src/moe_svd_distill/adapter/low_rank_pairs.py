"""What an adapter does to each matrix of a model, read from its file when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_svd_distill.adapter.adapter_file import adapter_header, read_json, read_tensor, shapes_of
from moe_svd_distill.adapter.configuration import names_in, rank_and_scale
from moe_svd_distill.adapter.keys import Factors, expert_factors, fused_rank, of_matrix
from moe_svd_distill.adapter.naming import PairShape, pair_shapes, whole_key, whole_modules
from moe_svd_distill.adapter.peft_model import lora_config, lora_targets, read_configuration, wrap_student
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.names import CONFIGURATION_FILE

_WRITE_AGAIN = "Write the adapter again, with zeros where nothing changes"
_OTHER_STUDENT = "Use the student the adapter was made for"


@dataclass(frozen=True)
class LowRankPair:
    """The change of one matrix: ``scale · left @ right``.

    Attributes:
        left: (rows, rank).
        right: (rank, columns).
        scale: The factor that PEFT multiplies the product by.
    """

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class _Place:
    """Where in the file the pair of a matrix lies.

    Attributes:
        shape: Of the pair in the file.
        parameter: The parameter that it changes.
        matrix: The matrix in it; None for the head and the embeddings.
        whole: Whether the pair is one for the whole parameter.
    """

    shape: PairShape
    parameter: str
    matrix: Matrix | None
    whole: bool

    @property
    def experts(self) -> int:
        """How many experts share the pair."""
        return self.matrix.experts if self.whole and self.matrix else 1


class LowRankPairs(Mapping[str, LowRankPair]):
    """Name of a matrix, as the architecture has it, to the change of it. They are `keys.Pairs`.

    Attributes:
        header: Of the adapter's file.
        configuration: The content of adapter_config.json.
        head: Key of a head that is saved whole, and has no pair.
    """

    def __init__(self, folder: Path | str, architecture: Architecture, *, configured: bool = True) -> None:
        """Read headers only.

        Args:
            folder: The adapter's folder, or its file.
            architecture: Of the student it was made for.
            configured: Whether its adapter_config.json is to be believed; without it every scale is 1.

        Raises:
            MissingInputError: A file is not there.
            BadDataError: The header is damaged, its tensors are not whole pairs, or the student has no such matrix.
        """
        self.header = adapter_header(folder)
        self.configuration: Mapping[str, object] = read_json(Path(folder) / CONFIGURATION_FILE) if configured else {}
        self._folder, self._architecture = Path(folder), architecture
        shapes = shapes_of(self.header)
        self._places = self._locate(pair_shapes(shapes))
        whole = whole_modules(shapes)
        head = architecture.head_slot
        if other := next((module for module in whole if f"{module}.weight" != head.name), None):
            raise BadDataError(f"the adapter saves {other} whole, expected the head at most", _OTHER_STUDENT)
        self.head: str | None = next((whole_key(module) for module in whole), None)
        for module, shape in whole.items():
            if shape != head.shape:
                raise _unlike(module, shape, head.shape)

    def __getitem__(self, name: str) -> LowRankPair:
        left, right = self._factors(self._places[name])
        return LowRankPair(left, right, self.scale(name))

    def scale(self, name: str) -> float:
        """The factor that PEFT multiplies a matrix's pair by.

        Raises:
            BadDataError: adapter_config.json gives none, or another rank than the file has.
        """
        place = self._places[name]
        if not self.configuration:
            return 1.0
        rank, scale = self._rank_and_scale(place.parameter)
        if rank != (found := self._rank_of_parameter(place)):
            raise BadDataError(
                f"adapter_config.json gives {place.parameter} rank {rank}, expected {found}",
                "Make adapter_config.json again with adapter-config",
            )
        return scale

    @property
    def dtype(self) -> torch.dtype:
        """The type that the factors are stored in."""
        return self._factors(next(iter(self._places.values())))[0].dtype

    def parameter(self, name: str) -> str:
        """The parameter in memory that a matrix lies in."""
        return self._places[name].parameter

    def parameter_ranks(self) -> dict[str, int]:
        """The rank of each changed parameter, as PEFT counts it."""
        return {place.parameter: self._rank_of_parameter(place) for place in self._places.values()}

    def rank(self, name: str) -> int:
        """The rank of a matrix's pair, from the header."""
        place = self._places[name]
        return place.shape.rank // place.experts

    def refuse_partial(self) -> None:
        """Refuse pairs of some of a parameter's matrices alone, and experts whose ranks differ: PEFT takes neither.

        Raises:
            BadDataError: There are some.
        """
        for matrices in self._architecture.parameters.values():
            known = [matrix for matrix in matrices if matrix.name in self._places]
            ranks = {(matrix.piece.begin, self.rank(matrix.name)): matrix.name for matrix in known}
            lacking = [matrix.name for matrix in matrices if matrix.name not in self._places]
            if known and lacking:
                raise BadDataError(f"{lacking[0]} has no pair, expected one as {known[0].name} has", _WRITE_AGAIN)
            if len(ranks) > len({begin for begin, _ in ranks}):
                found = " and ".join(f"{rank} ({name})" for (_, rank), name in ranks.items())
                raise BadDataError(f"the pairs of a layer's experts have ranks {found}, expected one", _WRITE_AGAIN)

    def factors(self, name: str) -> Factors:
        """``(B, A)`` of a matrix with PEFT's scale in B."""
        pair = self[name]
        left = pair.left if pair.scale == 1.0 else (pair.scale * pair.left.float()).to(pair.left.dtype)
        return left, pair.right

    def _rank_of_parameter(self, place: _Place) -> int:
        if place.matrix is None or place.whole:
            return place.shape.rank // place.experts
        return fused_rank(self._architecture.parameters[place.parameter], self.rank)

    def read_pair(self, module: str) -> tuple[Tensor, Tensor, int]:
        """A and B of a module as the file has them, and how many experts share them."""
        place = next(place for place in self._places.values() if place.shape.module == module)
        return *self._read(place), place.experts

    def read_head(self) -> Tensor:
        """The new weight (V, d) of a head that is saved whole, as stored."""
        assert self.head is not None
        return read_tensor(self.header.tensors[self.head])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, place: _Place) -> tuple[Tensor, Tensor]:
        tensors = self.header.tensors
        return read_tensor(tensors[place.shape.key_a]), read_tensor(tensors[place.shape.key_b])

    def _factors(self, place: _Place) -> Factors:
        right, left = self._read(place)
        if place.shape.embedding:
            return right.T, left.T
        if place.matrix is None or not place.whole:
            return left, right
        return of_matrix(place.matrix, expert_factors(left, right, place.matrix.experts, place.matrix.piece.index or 0))

    def _locate(self, pairs: Mapping[str, PairShape]) -> dict[str, _Place]:
        """Stored names come first; what is left must be PEFT's own name of a parameter."""
        architecture = self._architecture
        ends = {
            architecture.head: architecture.head_slot.name,
            architecture.embedding: architecture.embedding_slot.name,
        }
        own = {name.removesuffix(".weight"): name for name in ends}
        own |= {name.removesuffix(".weight"): name for name, matrix in architecture.by_name.items() if matrix.stored}
        by_module = self._parameters_by_module({name: pair for name, pair in pairs.items() if name not in own})
        places: dict[str, _Place] = {}
        for module, shape in pairs.items():
            if (name := own.get(module)) is not None:
                matrix = architecture.by_name.get(name)
                places[name] = _Place(shape, ends[name] if matrix is None else matrix.slot.name, matrix, whole=False)
                self._check(name, places[name])
                continue
            parameter = by_module.get(module)
            matrices = architecture.parameters.get(parameter or "", ())
            if parameter in ends.values():
                name = next(name for name, slot in ends.items() if slot == parameter)
                places[name] = _Place(shape, parameter or "", None, whole=True)
            elif not matrices:
                raise BadDataError(f"{architecture.checkpoint.title} has no {module} to change", _OTHER_STUDENT)
            for matrix in matrices:
                places[matrix.name] = _Place(shape, matrix.slot.name, matrix, whole=True)
        return dict(sorted(places.items()))

    def _parameters_by_module(self, strangers: Mapping[str, PairShape]) -> dict[str, str]:
        """What PEFT calls the parameters of pairs that are not named after a stored tensor, to the parameters."""
        if not strangers:
            return {}
        if self.configuration:
            configuration = read_configuration(self._folder)
        else:
            modules, parameters = self._likely(strangers)
            if not modules and not parameters:
                return {}
            configuration = lora_config({"r": 1, "target_modules": modules, "target_parameters": parameters or None})
        wrapped = wrap_student(self._architecture, configuration)
        return {target.module: target.parameter for target in lora_targets(wrapped)}

    def _likely(self, strangers: Mapping[str, PairShape]) -> tuple[list[str], list[str]]:
        """The modules and parameters that pairs under PEFT's own names change, by their names and shapes."""
        slots, modules, parameters = self._architecture.skeleton.slots, [], []
        for module, pair in strangers.items():
            base = module.replace(".base_layer", "")
            if f"{base}.weight" in (self._architecture.head_slot.name, self._architecture.embedding_slot.name):
                modules.append(base)
            inside = [name for name in self._architecture.parameters if name.rpartition(".")[0] == base]
            several = sum(other.replace(".base_layer", "") == base for other in strangers) > 1
            factors = sorted((pair.out, pair.width))
            parameters += [name for name in inside if several or sorted(slots[name].shape[-2:]) == factors]
        return modules, list(dict.fromkeys(parameters))

    def _check(self, name: str, place: _Place) -> None:
        slot = self._architecture.skeleton.slots[place.parameter]
        expected = (slot.shape[0], slot.shape[1]) if place.matrix is None else place.matrix.shape
        out, width = place.shape.out, place.shape.width
        if (found := (width, out) if place.shape.embedding else (out, width)) != expected:
            raise _unlike(name, found, expected)

    def _rank_and_scale(self, parameter: str) -> tuple[int, float]:
        named = names_in(self.configuration, "target_parameters")
        as_parameter = any(parameter == entry or parameter.endswith(f".{entry}") for entry in named)
        return rank_and_scale(self.configuration, parameter if as_parameter else parameter.rpartition(".")[0])


def _unlike(name: str, found: tuple[int, int], expected: tuple[int, ...]) -> BadDataError:
    sizes = ("×".join(map(str, shape)) for shape in (expected, found))
    return BadDataError(f"{name} is {next(sizes)} in the student, the adapter's is {next(sizes)}", _OTHER_STUDENT)


def norm_of_pair(left: Tensor, right: Tensor, experts: int = 1) -> float:
    """``‖B A‖`` for B (out, r) and A (r, in): the root of the inner product of ``BᵀB`` and ``AAᵀ``.

    The product itself is never formed. With several experts in the pair it is the norm of all their changes.
    """
    square = 0.0
    for number in range(experts):
        b, a = (factor.double() for factor in expert_factors(left, right, experts, number))
        square += float(((b.T @ b) * (a @ a.T)).sum())
    return float(max(square, 0.0) ** 0.5)
