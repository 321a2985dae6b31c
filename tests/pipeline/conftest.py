"""Tiny pairs that several stages are tested on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.heads import student_with_tokenizer, teacher_with_other_head, trained_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"), 400)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    """A teacher and a student that differ in their heads."""
    folder = tmp_path_factory.mktemp("tiny")
    student = student_with_tokenizer("qwen3_moe", folder / "student", tokenizer)
    return teacher_with_other_head(student, folder / "teacher"), student
