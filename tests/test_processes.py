"""Several processes with a part of every batch are one process with the whole of it: ranges, learned scales, calibration."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.calibration import activation_quantizers
from fxquant.errors import InputError, LevelError
from fxquant.nn.processes import fold_of_all
from fxquant.numerics.estimator_names import ESTIMATORS
from fxquant.numerics.histogram import MinMax
from fxquant.numerics.ranges import ESTIMATOR
from fxquant.training import synchronize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.head((y + F.avg_pool2d(y, 3, 1, 1)).mean((2, 3)))


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """float64: float32's noise would now and then round a number to the other neighbour, which is no noise any more."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 7, 6, generator=generator, dtype=dtype) * (1 + k) for k in range(count)]


def recipe(rule: str, estimator: str = "moving_average") -> fxquant.Setting:
    if rule == "observed":
        return fxquant.Setting(
            weight=fxquant.Scheme.weight(8), activation=fxquant.Scheme.activation(8, estimator=estimator)
        )
    return fxquant.Setting(
        weight=fxquant.Scheme.weight(4, quantizer=rule), activation=fxquant.Scheme.activation(4, quantizer=rule)
    )


def trained(rank: int, world: int, rule: str, estimator: str, steps: int = 4) -> dict[str, Any]:
    """The state after some steps, and the ranges after the first forward pass; without a calibration before."""
    data = batches(steps)
    if world > 1:
        alone = fxquant.prepare(Net().double().train(), data[0], qat=True)
        with pytest.warns(UserWarning, match=r"each follows the ranges of its own batches(.|\n)*training.synchronize"):
            alone(data[0])
    prepared = fxquant.prepare(Net().double().train(), data[0], qat=True, recipe=recipe(rule, estimator))
    synchronize(prepared)
    model = nn.parallel.DistributedDataParallel(prepared) if world > 1 else prepared
    if rule != "observed":  # scales that have no start yet are 0, and DDP has to know which parameters take part
        prepared.train()(data[0][rank::world])
    optimizer = torch.optim.SGD(fxquant.parameter_groups(prepared, lr=0.01), 0.05, momentum=0.9)
    first: dict[str, Tensor] = {}
    for x in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::world]), torch.arange(len(x))[rank::world] % 3).backward()
        if not first:
            first = {n: b.clone() for n, b in prepared.named_buffers() if "quantizer" in n}
        optimizer.step()
    return {"first": first, "last": dict(prepared.state_dict())}


def calibrated(rank: int, world: int, rule: str, estimator: str) -> dict[str, Any]:
    """The buffers of every quantizer; with two processes, one of them has most of the batches, and no batch stays last."""
    whole, settings = batches(6, dtype=torch.float32), fxquant.Scheme.activation(8, estimator=estimator)
    share = whole if world == 1 else (whole[:4] if rank == 0 else whole[4:])
    prepared = fxquant.prepare(Net().eval(), whole[0], recipe=fxquant.Setting(activation=settings), processor="any")
    synchronize(prepared)
    fxquant.calibrate(prepared, share, progress=False)
    again = fxquant.calibrate(prepared, share, progress=False) if estimator == "percentile" else prepared
    return dict(again.state_dict())


def sharded(rank: int, world: int, rule: str, estimator: str) -> dict[str, Any]:
    """Trained, saved and resumed with FSDP2, and the integer model of what was trained."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def start() -> tuple[Any, Any]:
        prepared = fxquant.prepare(Net().train(), data[0], qat=True, recipe=recipe(rule, estimator))
        fxquant.calibrate(synchronize(prepared), [data[0][rank::world]], progress=False)
        if world > 1:
            fully_shard(prepared, mesh=torch.distributed.init_device_mesh("cpu", (world,)))
        return prepared.train(), torch.optim.SGD(prepared.parameters(), 0.05)

    def steps(model: Any, optimizer: Any, chosen: list[Tensor]) -> None:
        for x in chosen:
            optimizer.zero_grad()
            F.cross_entropy(model(x[rank::world]), torch.arange(len(x))[rank::world] % 3).backward()
            optimizer.step()

    data, whole = batches(4, dtype=torch.float32), StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = start()
    steps(model, optimizer, data[:2])
    middle = copy.deepcopy(get_model_state_dict(model, options=whole))
    steps(model, optimizer, data[2:])
    resumed, again = start()
    set_model_state_dict(
        resumed, middle, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=world > 1)
    )
    steps(resumed, again, data[2:])
    if world > 1:
        for verb in (fxquant.convert, fxquant.freeze, lambda m: fxquant.calibrate(m, data)):
            with pytest.raises(LevelError, match=r"conv.weight' is spread over processes"):
                verb(model)
    ends = [get_model_state_dict(one, options=whole) for one in (model, resumed)]
    if rank:
        return {}
    alone = fxquant.prepare(Net().train(), data[0], qat=True, recipe=recipe(rule, estimator))
    alone.load_state_dict(ends[0])
    with torch.no_grad():
        int8 = fxquant.convert(alone.eval())(data[0])
        return {"last": ends[0], "resumed": ends[1], "prepared": alone(data[0]), "int8": int8}


def work(rank: int, world: int, folder: str, what: Callable[..., Any], cases: list[tuple[str, str]]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", message="rounding to 8 bits leaves")  # estimators that clip, on few batches
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    if world > 1:
        store = torch.distributed.FileStore(f"{folder}/store", world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.save([what(rank, world, rule, estimator) for rule, estimator in cases], f"{folder}/{rank}.pt")
        if world > 1:
            torch.distributed.barrier()  # one that leaves early aborts the others
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def run(folder: Path, world: int, what: Callable[..., Any], cases: list[tuple[str, str]]) -> list[list[dict[str, Any]]]:
    """What each of ``world`` processes found, case by case: processes take seconds to begin."""
    folder = folder / f"{world}"
    folder.mkdir()
    torch.multiprocessing.spawn(work, (world, str(folder), what, cases), nprocs=world)
    founds = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return [[found[case] for found in founds] for case in range(len(cases))]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one(world, tmp_path):
    cases = [("observed", "moving_average"), ("observed", "mse"), ("lsq", "mse")]
    for (alone,), founds in zip(run(tmp_path, 1, trained, cases), run(tmp_path, world, trained, cases), strict=True):
        for found in founds:
            close(found["first"], alone["first"], atol=0, rtol=0)
            close(found["last"], alone["last"], atol=1e-6, rtol=1e-6)


@pytest.mark.long
def test_shares_of_a_loader_give_the_ranges_of_the_whole(tmp_path):
    cases = [("observed", estimator) for estimator in ("minmax", "mse", "percentile", "kl")]
    for (alone,), founds in zip(run(tmp_path, 1, calibrated, cases), run(tmp_path, 2, calibrated, cases), strict=True):
        for found in founds:
            close(found, alone, atol=0, rtol=0)


@pytest.mark.long
def test_a_sharded_model_trains_saves_resumes_and_converts(tmp_path):
    cases = [("observed", "moving_average"), ("lsq", "mse")]
    for (alone,), (found, _) in zip(run(tmp_path, 1, sharded, cases), run(tmp_path, 2, sharded, cases), strict=True):
        close(found["resumed"], found["last"], atol=0, rtol=0)
        torch.testing.assert_close(found["int8"], found["prepared"], atol=2e-5, rtol=1e-4)
        assert float((found["int8"] - alone["int8"]).abs().max()) <= 0.05 * float(alone["int8"].abs().max())


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_merged_states_are_those_of_all_data(estimator):
    """Parts on scales from 1e-3 to 1e3, in an order in which bins have to widen and not, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 3, generator=generator) * 10.0**k for k in (0, 3, -3, 1)] + [torch.zeros(0, 3)]
    one, merged = (ESTIMATOR[estimator].initial_state(None) for _ in range(2))
    for part in parts:
        ESTIMATOR[estimator].update(one, part, axis=None)
        other = ESTIMATOR[estimator].initial_state(None)
        ESTIMATOR[estimator].update(other, part, axis=None)
        ESTIMATOR[estimator].merge(merged, other)
    close(merged, one, atol=0, rtol=0)


@pytest.mark.parametrize("estimator", ["minmax", "moving_average", "mse"])
@pytest.mark.parametrize("shape", [(6, 3, 2), (5,), (0, 4), ()])
def test_one_process_alone_folds_what_it_sees(estimator, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    wanted, found = (ESTIMATOR[estimator].initial_state(None) for _ in range(2))
    for part in (x, x * 0.5):
        ESTIMATOR[estimator].update(wanted, part, axis=None, lower=-1.0, upper=0.5)
        fold_of_all(ESTIMATOR[estimator], found, part, lower=-1.0, upper=0.5)
    close(found, wanted, atol=0, rtol=0)


def test_what_cannot_be_merged_is_refused_and_nothing_changed():
    """Counts of log_entropy were forgotten, and an estimator of a user's own was given extrema for values."""

    class Middle(MinMax):
        def update(self, state: dict[str, Tensor], x: Tensor, **settings: Any) -> None:
            super().update(state, x.quantile(torch.tensor([0.1, 0.9])), axis=None)

    x = batches(1, dtype=torch.float32)[0]
    fxquant.quantizers.register_estimator("middle", Middle())
    try:
        activations = [
            fxquant.Scheme.activation(8, estimator="middle"),
            fxquant.Scheme.activation(4, quantizer="log_entropy", signed=False, symmetric=False),
        ]
        for activation in activations:
            recipe = fxquant.Recipe({"relu": fxquant.Setting(activation=activation)})
            prepared = fxquant.prepare(Net().train(), x, qat=True, recipe=recipe)
            with pytest.raises(InputError, match=rf"'relu(.|\n)*{activation.quantizer}(.|\n)*cannot be merged"):
                synchronize(prepared)
            assert not any(one.synchronized for one in activation_quantizers(prepared).values())
    finally:
        del ESTIMATOR["middle"]
        ESTIMATORS.remove("middle")


def test_what_is_synchronized_has_ranges():
    with pytest.raises(InputError, match="Net without quantizers"):
        synchronize(Net())
    prepared = synchronize(fxquant.prepare(Net().eval(), batches(1, dtype=torch.float32)[0]))
    assert all(quantizer.synchronized for quantizer in activation_quantizers(prepared).values())
    assert not any(quantizer.synchronized for quantizer in activation_quantizers(synchronize(prepared, False)).values())
