"""Does rewriting change what a float model computes? torchvision's classifiers, rewritten, with all quantizers off.

Every network that plain ``torch.fx.symbolic_trace`` can trace gets random weights and statistics under which a wrong
fold shows (see `randomize`), and runs in eval mode at two batch sizes:

- for QAT nothing is folded, so the rewritten model must equal the float one bit for bit;
- for PTQ BatchNorm is folded into weights, so the largest difference must stay below 1e-4 of the largest output.

"signal" is the share of the output that depends on the image: where it is small, equality would say nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from record import add_output_option, publish, seconds
from torch import Tensor, nn
from tqdm import tqdm

import fxquant

TOLERANCE = 1e-4
LEAST_SIGNAL = 1e-2
BATCHES = (1, 2)
IMAGE = {"inception_v3": 299}
NO_SPECIAL_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def images(batch: int, side: int) -> Tensor:
    """Colour blobs under noise, ``(batch, 3, side, side)``: plain noise looks the same to a network image by image."""
    generator = torch.Generator().manual_seed(batch)
    blobs = torch.randn(batch, 3, 6, 6, generator=generator)
    return F.interpolate(blobs, side, mode="bilinear") + 0.5 * torch.randn(batch, 3, side, side, generator=generator)


@torch.no_grad()
def randomize(model: nn.Module, side: int) -> nn.Module:
    """Give ``model`` weights that carry a signal to the output and BatchNorms that a wrong fold would betray.

    Freshly built networks have identity BatchNorms, zero heads and layer scales of 1e-6, and in several the image
    fades out on the way to the logits: comparing those says nothing. Convolution weights ~ N(0, 2/fan_in), norm weights
    ± U(0.5, 1.5), norm biases N(0.5, 0.1), other constant parameters random; BatchNorm statistics are measured on
    `images` layer by layer and disturbed: running_mean by N(0, 0.1) standard deviations, running_var by U(0.5, 1.5).

    The biases are positive because in a deep random network with biases around 0 every activation function multiplies
    float32's own rounding errors, until the float model itself is off by more than the tolerance.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.weight is not None]
    for module in norms:
        signs = torch.randint(0, 2, module.weight.shape) * 2.0 - 1.0
        module.weight.copy_(signs * (0.5 + torch.rand(module.weight.shape)))
        if module.bias is not None:
            module.bias.normal_(0.5, 0.1)
    for convolution in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        convolution.weight.normal_(0, (2 / convolution.weight[0].numel()) ** 0.5)
    for parameter in (parameter for parameter in model.parameters() if parameter.min() == parameter.max()):
        parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter[0].numel() > 1 else 0.1)
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in batch_norms]
    model.eval()
    if batch_norms:
        model(images(4, side))
    for hook in hooks:
        hook.remove()
    return model


def _set_statistics(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
    """Forward pre-hook: take the statistics of the input, bounded where a channel hardly varies, and disturb them."""
    variance, mean = torch.var_mean(args[0], (0, 2, 3))
    variance = variance.clamp(min=variance.mean() / 10)
    norm.running_mean.copy_(mean + 0.1 * torch.randn(mean.shape) * variance.sqrt())
    norm.running_var.copy_(variance * (0.5 + torch.rand(variance.shape)))


def build(name: str) -> nn.Module:
    """The torchvision network ``name`` with random weights and statistics, the same on every call."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **NO_SPECIAL_INIT.get(name, {}))
    return randomize(model, IMAGE.get(name, 224))


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> list[Tensor]:
    """The logits of ``model``, one tensor a batch size."""
    return [model(images(batch, IMAGE.get(name, 224))) for batch in BATCHES]


def signal(logits: Tensor) -> float:
    """How much of the output depends on the image: largest spread of a logit over images, over the largest logit."""
    return float((logits.amax(0) - logits.amin(0)).max() / logits.abs().max())


@dataclass(frozen=True)
class Comparison:
    """A rewritten model against its float model: largest difference over largest output, bit equality, cost."""

    relative: float
    same_bits: bool
    nodes: int
    prepare_s: float


def compare(model: nn.Module, expected: list[Tensor], name: str, *, qat: bool) -> Comparison:
    """Rewrite ``model``, run it with quantizers off and compare with ``expected``."""
    example = images(BATCHES[0], IMAGE.get(name, 224))
    start = time.perf_counter()
    prepared = fxquant.prepare(model, (example,), qat=qat)
    elapsed = time.perf_counter() - start
    prepared.eval()
    with fxquant.quantizers_off(prepared):
        actual = outputs(prepared, name)
    pairs = list(zip(actual, expected, strict=True))
    relative = max(float((own - other).abs().max() / other.abs().max()) for own, other in pairs)
    same_bits = all(torch.equal(own, other) for own, other in pairs)
    return Comparison(relative, same_bits, len(prepared.graph.nodes), elapsed)


def row(name: str) -> dict[str, Any]:
    """One network's row; its verdict says in words what went wrong, if anything did."""
    model = build(name)
    nodes = traced_nodes(model)
    if nodes is None:
        return {"model": name, "verdict": "not traced by torch.fx"}
    expected = outputs(model, name)
    share = signal(expected[-1])
    folded = compare(model, expected, name, qat=False)
    gc.collect()
    unfolded = compare(model, expected, name, qat=True)
    return {
        "model": name,
        "output scale": float(f"{expected[-1].abs().max():.3g}"),
        "signal": round(share, 3),
        "nodes": nodes,
        "PTQ nodes": folded.nodes,
        "PTQ difference": float(f"{folded.relative:.1e}"),
        "QAT nodes": unfolded.nodes,
        "QAT bit for bit": unfolded.same_bits,
        "QAT difference": float(f"{unfolded.relative:.1e}"),
        "prepare s": seconds(folded.prepare_s),
        "verdict": verdict(share, folded, unfolded),
    }


def traced_nodes(model: nn.Module) -> int | None:
    """How many nodes plain torch.fx makes of ``model``, or None where it cannot trace it."""
    try:
        return len(torch.fx.symbolic_trace(model).graph.nodes)
    except Exception:
        return None


def verdict(share: float, folded: Comparison, unfolded: Comparison) -> str:
    """``ok``, or what is wrong."""
    if not share >= LEAST_SIGNAL:
        return "the output hardly depends on the image"
    wrong = [] if folded.relative <= TOLERANCE else ["PTQ differs"]
    wrong += [] if unfolded.same_bits else ["QAT is not bit for bit"]
    return "; ".join(wrong) or "ok"


def try_row(name: str) -> dict[str, Any]:
    """`row`, with an error in the verdict instead of the end of the run."""
    try:
        return row(name)
    except Exception as error:
        message = str(error).strip().splitlines()
        return {"model": name, "verdict": f"{type(error).__name__}: {message[0] if message else ''}"[:100]}
    finally:
        gc.collect()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="names, * and ? allowed")
    add_output_option(parser, "quantizers_off")
    return parser.parse_args()


def main() -> None:
    """Compare every chosen network and publish the table and its summary."""
    args = options()
    names = torchvision.models.list_models(module=torchvision.models)
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.models)]
    if not chosen:
        raise SystemExit(f"--models: no classification model of torchvision matches {' '.join(args.models)}")
    bar = tqdm(chosen)
    rows = []
    for name in bar:
        bar.set_description(name)
        rows.append(try_row(name))
    columns = max(rows, key=len)
    rows = [{column: own.get(column) for column in columns} for own in rows]
    publish(rows, args, summary=summarize(rows))
    print("\n".join(f"{value:8g} {what}" for what, value in summarize(rows).items()))


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many networks were tried, how many meet each demand, and the largest difference of all."""
    ptq = [own["PTQ difference"] for own in rows if own.get("PTQ difference") is not None]
    return {
        "models": len(rows),
        "traced by torch.fx": sum(own["verdict"] != "not traced by torch.fx" for own in rows),
        "QAT bit for bit": sum(bool(own.get("QAT bit for bit")) for own in rows),
        f"PTQ within {TOLERANCE:g}": sum(difference <= TOLERANCE for difference in ptq),
        "ok in all": sum(own["verdict"] == "ok" for own in rows),
        "largest PTQ difference": max(ptq, default=0.0),
    }


if __name__ == "__main__":
    main()
