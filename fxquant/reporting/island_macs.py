"""What a model's islands multiply in their own code: counted in one run, since no graph tells it.

The run is on zeros like the example, in eval mode, and leaves no trace. What the graphs do is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxquant.capture.islands import graphs_of, islands_of
from fxquant.capture.values import unchanged
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import make_inputs
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = ["example_call", "own_macs"]


def example_call(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Zeros of the shapes that ``module`` was prepared with, as a call; None where they were not given."""
    settings = next((graph.settings for graph in graphs_of(module).values()), {})
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    made = make_inputs(settings.get("inputs"), device)
    if made is None:
        return None
    return ((), made) if isinstance(made, dict) else (made, {})


def own_macs(module: nn.Module) -> dict[str, int | None]:
    """The MACs of each island's own code, by path; None where the run did not reach it or could not be made."""
    paths = [island.path for island in islands_of(module)]
    unknown: dict[str, int | None] = dict.fromkeys(paths)
    call = example_call(module) if paths else None
    if call is None:
        return unknown
    with _without_trace(module), FlopCounterMode(display=False) as counter:
        ledger = _Ledger(module, counter)
        try:
            with ledger.watching(paths):
                module(*call[0], **call[1])
        except Exception:  # the user's code on zeros: it may refuse them
            return unknown
    return unknown | {path: flops // 2 for path, flops in ledger.flops.items()}


class _Ledger:
    """Charges what is counted to the innermost island or graph that runs."""

    def __init__(self, module: nn.Module, counter: FlopCounterMode) -> None:
        self.module, self.counter = module, counter
        self.flops: dict[str, int] = {}
        self._running: list[str | None] = []
        self._fast_kernels = bool(torch.backends.mkldnn.enabled)
        self._settled = 0

    @contextmanager
    def watching(self, paths: list[str]) -> Iterator[None]:
        owners: dict[nn.Module, str | None] = {self.module.get_submodule(path): path for path in paths}
        owners |= {part: None for part in self.module.modules() if isinstance(part, LeveledModule)}
        handles = []
        for part, owner in owners.items():
            handles.append(part.register_forward_pre_hook(lambda *_, owner=owner: self._enter(owner), prepend=True))
            handles.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            _use_fast_kernels(self._fast_kernels)

    def _enter(self, owner: str | None) -> None:
        self._settle()
        self._running.append(owner)
        if owner is not None:
            self.flops.setdefault(owner, 0)
        self._choose_kernels()

    def _leave(self) -> None:
        self._settle()
        self._running.pop()
        self._choose_kernels()

    def _settle(self) -> None:
        total = self.counter.get_total_flops()
        if self._running and self._running[-1] is not None:
            self.flops[self._running[-1]] += total - self._settled
        self._settled = total

    def _choose_kernels(self) -> None:
        """In an island, no kernel that does many multiplications which the counter does not see."""
        in_island = bool(self._running) and self._running[-1] is not None
        _use_fast_kernels(self._fast_kernels and not in_island)


def _use_fast_kernels(enabled: bool) -> None:
    torch.backends.mkldnn.set_flags(enabled, _fp32_precision=None)  # type: ignore[no-untyped-call]


@contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    numbers = torch.random.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with unchanged(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module.eval()
            for part in module.modules():
                if isinstance(part, FakeQuantize):
                    part.enabled = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.random.set_rng_state(numbers)
