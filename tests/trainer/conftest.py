"""A tiny base for the whole run, one thread, and torch's global switches put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch

from tests.trainer.jobs import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return make_base(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def roberta_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa."""
    return make_base(tmp_path_factory.mktemp("base") / "roberta", "roberta")


@pytest.fixture(autouse=True)
def _torch_switches() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
