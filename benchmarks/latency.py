"""Milliseconds from an fp32 image batch to fp32 logits: fxquant's int8 beside float and beside the other int8 paths.

All contenders of a row live in one process and take turns; a turn is a few calls after one that is not counted, and its
median is kept, or with ``--fastest``, for a machine that others use too, its fastest call. A cell shows the median of a
contender's turns; "vs FX" is the median over the rounds of FX's turn over that of fxquant's faster form, so whatever else
the machine does weighs on both. Weights are random and batch norm statistics those of noise: only speed means something
here. "equal" is the share of values for which fxquant's kernels give the very integer that its exact reference gives, op
by op on the same inputs; no value may be off by more than one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from peers import Peer, fx_x86
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

IMAGE = 224
MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"),
    *("efficientnet_b0", "googlenet", "densenet121", "vit_b_16"),
)
TURN = 0.03
"""Seconds that a turn should take."""

Run = Callable[[Tensor], Any]


def _float(model: nn.Module, x: Tensor, threads: int) -> Run:
    return model


def _compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    return torch.compile(model)


def integer_model(model: nn.Module, x: Tensor, threads: int) -> Any:
    """fxquant's int8 model, called as it is."""
    import fxquant

    prepared = fxquant.prepare(model, (x,))
    return fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))


def _frozen(model: nn.Module, x: Tensor, threads: int) -> Run:
    from fxquant.kernels.frozen import Frozen, fastest

    run = fastest(integer_model(model, x, threads), x)
    assert isinstance(run, Frozen) and all(made is not None for _, made in run._made.values()), "was not frozen"
    return run


def _fx_frozen(model: nn.Module, x: Tensor, threads: int) -> Run:
    torch.backends.quantized.engine = "x86"
    converted = fx_x86(model, [(x, torch.zeros(len(x)))])
    frozen = torch.jit.freeze(torch.jit.trace(converted.eval(), x, check_trace=False))
    for _ in range(3):
        frozen(x)
    return frozen


def _pt2e_inductor(model: nn.Module, x: Tensor, threads: int) -> Run:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config.freezing = True
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return lower_pt2e_quantized_to_x86(converted, (x,))


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"x": x.numpy()}])

        def get_next(self) -> Any:
            return next(self.items, None)

    with tempfile.TemporaryDirectory() as folder:
        float_path, path = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(model, (x,), float_path, input_names=["x"], dynamo=False, opset_version=17)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(float_path, path, Once(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


CONTENDERS = {
    "float": Peer("float", "torch", _float),
    "compiled": Peer("compiled", "torch", _compiled),
    "FX x86": Peer("FX x86", "torch", _fx_frozen),
    "PT2E": Peer("PT2E", "torchao", _pt2e_inductor),
    "ORT": Peer("ORT", "onnxruntime", _onnxruntime),
    "fxquant": Peer("fxquant", "fxquant", integer_model),
    "fxquant frozen": Peer("fxquant frozen", "fxquant", _frozen),
}


def example_model(name: str) -> nn.Module:
    """A torchvision network with random weights, and batch norm statistics that fit noise images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    if name == "googlenet":
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, IMAGE, IMAGE))
    return model.eval()


def build(model: nn.Module, x: Tensor, threads: int, names: list[str]) -> tuple[dict[str, Run], dict[str, str]]:
    """Every contender that runs, and the reason of every one that does not."""
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for name in tqdm(names, desc="building", leave=False):
        if missing := CONTENDERS[name].missing:
            skipped[name] = missing
            continue
        try:
            runs[name] = CONTENDERS[name].build(copy.deepcopy(model), x, threads)  # type: ignore[call-arg]
            runs[name](x)
        except Exception as error:  # a peer that fails is a fact about it
            if name.startswith("fxquant"):
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return runs, skipped


def race(runs: dict[str, Run], x: Tensor, rounds: int, kept: Callable[..., float]) -> dict[str, list[float]]:
    """Each contender's turns, in seconds a call."""
    names = list(runs)
    calls = {name: max(1, min(20, int(TURN / max(_call(runs[name], x, 2, min), 1e-6)))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(rounds), desc="rounds", leave=False):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_call(runs[name], x, calls[name], kept))
    return times


def _call(run: Run, x: Tensor, calls: int, kept: Callable[..., float]) -> float:
    run(x)
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run(x)
        found.append(time.perf_counter() - start)
    return kept(found)


def equal_share(model: Any, x: Tensor) -> tuple[float, float]:
    """The share of integers that are exactly the reference's, and the largest difference of any, in steps."""
    from fxquant.kernels.agreement import agreement

    found = [a for a in agreement(model, x[:1]) if a.worst >= 1 or a.equal == a.values]
    return sum(a.equal for a in found) / sum(a.values for a in found), max(a.worst for a in found)


def row_of(name: str, model: nn.Module, batch: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))
    runs, skipped = build(model, x, threads, args.contenders)
    times = race(runs, x, args.rounds, min if args.fastest else statistics.median)
    row: dict[str, Any] = {"model": name, "batch": batch, "threads": threads}
    for contender in args.contenders:
        turns = times.get(contender)
        row[contender] = skipped[contender] if turns is None else float(f"{1e3 * statistics.median(turns):.3g}")
    ours = [n for n in ("fxquant", "fxquant frozen") if n in times]
    for peer, title in (("FX x86", "vs FX"), ("ORT", "vs ORT"), ("float", "vs float")):
        if ours and peer in times:
            best = min(ours, key=lambda n: statistics.median(times[n]))
            ratios = [base / own for base, own in zip(times[peer], times[best], strict=True)]
            row[title] = float(f"{statistics.median(ratios):.3g}")
    if "fxquant" in runs:
        share, worst = equal_share(runs["fxquant"], x)
        row["equal"], row["worst"] = f"{100 * share:.4f} %", int(worst)
    return row


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision model names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images a call (default: 1 8)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--fastest", action="store_true", help="keep the fastest call of a turn, not its median")
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, help=f"default: {', '.join(names)}")
    add_output_option(parser, "latency")
    return parser.parse_args()


def main() -> None:
    """Run the comparison and publish its table."""
    args = options()
    warnings.filterwarnings("ignore")  # every contender but float is deprecated somewhere
    rows = []
    with torch.no_grad():
        for name in args.models:
            model = example_model(name)
            for batch in args.batches:
                for threads in args.threads:
                    rows.append(row_of(name, model, batch, threads, args))
                    tqdm.write(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
                    publish(rows, args)
    print(f"written to {Path(args.output).name}")


if __name__ == "__main__":
    main()
