"""What every test starts from: one thread, and the same random numbers in any order of tests."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # a second thread waits longer than it computes where workers share the cores


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)
