"""What every test starts from: one thread a worker, and the same random numbers in any order of tests."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)
