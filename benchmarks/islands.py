"""Models that torch.fx cannot trace whole, end to end: what runs in graphs, what stays the user's code, what it costs.

Detectors of torchvision, its optical flow, a YOLO of our own (`yolo.py`) and a BERT, all with random weights that carry a
signal (see `give_signal`), take the whole way: ``prepare``, ``calibrate``, ``convert``. The outputs of the fake-quantized
and of the integer model are compared with the float model's on inputs that calibration has not seen:

- on tensors that stand for the same thing in all three (raw outputs, features at the same module path), as the ratio of
  the float tensor's energy to the error's, in decibels; the table shows the worst of them, the JSON all;
- on final detections, whose number and order depend on the data, as the share of the float model's best boxes for which
  the other model has a box of the same class that overlaps by half.

"16 bits, seen" is the ratio with 16-bit weights and activations on a batch that was calibrated on. What 8 bits lose beyond
it is resolution and clipped ranges, which random weights amplify from layer to layer; nothing else is in the way.

Prepared for QAT, with all quantizers off, the model must equal the float one bit for bit.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from record import add_output_option, publish, seconds
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, box_iou
from tqdm import tqdm
from yolo import Yolo

import fxquant
from fxquant.capture.islands import graphs_of, islands_of

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
LEAST_SIGNAL = 1e-2
BEST = 20
FINE = fxquant.Recipe(
    default=fxquant.Setting(
        weight=fxquant.Scheme(bits=16, symmetric=True, signed=True, per_channel=True, narrow_range=True),
        activation=fxquant.Scheme(bits=16),
    )
)
"""So fine that on a calibrated batch, where nothing is clipped, whatever is lost is a defect."""
DIFF_LINES = 30

Batch = Any
"""What one call takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments."""


def call(model: nn.Module, batch: Batch) -> Any:
    """Run ``model`` on one batch of any form."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def blobs(count: int, side: int, seed: int) -> Tensor:
    """Colour blobs of all sizes in [0, 1], the large ones strong, as in photos, ``(count, 3, side, side)``."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((count, 3, side, side), 0.5)
    cells = 4
    while cells < side:
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        image += F.interpolate(coarse, side, mode="bicubic", align_corners=False) / cells**0.75
        cells *= 2
    return image.clamp(0, 1)


def photo_list(count: int, side: int, seed: int) -> tuple[list[Tensor]]:
    """What torchvision's detectors take: one argument, a list of images."""
    return (list(blobs(count, side, seed)),)


def two_frames(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two frames in [-1, 1], the second a few pixels on."""
    scene = 2 * blobs(count, side + 8, seed) - 1
    down, right = torch.randint(0, 9, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    return scene[:, :, 4:-4, 4:-4], scene[:, :, down : down + side, right : right + side]


def sentences(count: int, length: int, seed: int, vocabulary: int) -> dict[str, Tensor]:
    """Token numbers, the small ones often (as words are), of which each sentence leaves another number masked."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    tokens = torch.multinomial(frequencies.expand(count, -1), length, replacement=True, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    return {"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths).long()}


def _blurring(shape: torch.Size) -> Tensor:
    """Random filters that let the coarse through rather than the fine, where the noise of rounding is: as trained."""
    taps = math.prod(shape[2:])
    if taps == 1:
        return torch.randn(shape) * (2 / shape[1]) ** 0.5
    return (torch.randn(*shape[:2], 1, 1) + torch.randn(shape)) * (2 / shape[1]) ** 0.5 / taps


@torch.no_grad()
def give_signal(model: nn.Module, batch: Batch, bias: float = 1.0) -> nn.Module:
    """Weights that carry a signal to the output, and BatchNorms, frozen ones too, that a wrong fold would betray.

    Linear weights ~ N(0, 1/fan_in), convolutions as `_blurring` says; norm weights ± U(0.5, 1.5), norm biases
    N(``bias``, 0.1); other constant parameters ~ N(0, 0.1). BatchNorm statistics are measured on ``batch`` layer by layer,
    and disturbed. Without the blur and the positive bias a deep random network multiplies any rounding, layer by layer,
    until nothing is left of the output: that would say nothing about quantization. The model leaves in eval mode.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS + NORMS) and module.weight is not None:
            signs = torch.randint(0, 2, module.weight.shape) * 2.0 - 1.0
            module.weight.copy_(signs * (0.5 + torch.rand(module.weight.shape)))
            module.bias.normal_(bias, 0.1)
        elif isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            module.weight.copy_(_blurring(module.weight.shape))
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5)
    for parameter in (parameter for parameter in model.parameters() if parameter.min() == parameter.max()):
        parameter.normal_(0, 0.1)
    hooks = [m.register_forward_pre_hook(_set_statistics) for m in model.modules() if isinstance(m, BATCH_NORMS)]
    model.eval()
    call(model, batch)
    for hook in hooks:
        hook.remove()
    return model


def _set_statistics(norm: nn.Module, args: tuple[Tensor]) -> None:
    """Forward pre-hook: the input's statistics, disturbed; no channel is blown up beyond the mean variance."""
    variance, mean = torch.var_mean(args[0], (0, 2, 3))
    variance = variance.clamp(min=variance.mean())
    norm.running_mean.copy_(mean + 0.1 * torch.randn(mean.shape) * variance.sqrt())
    norm.running_var.copy_(variance * (0.5 + torch.rand(variance.shape)))


def _centre_bias(linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
    """Forward hook: move the bias so that each output is 0 on average."""
    linear.bias.sub_(output.mean(0))


def freeze_norms(model: nn.Module) -> nn.Module:
    """Put torchvision's ``FrozenBatchNorm2d`` in place of every BatchNorm2d, as its pretrained detectors have it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
                setattr(parent, name, frozen)
    return model


@dataclass(frozen=True)
class Case:
    """A model and how to judge it.

    Attributes:
        build: the float model in eval mode.
        batch: one batch of inputs, ``batch(count, seed)``.
        watched: paths of modules whose outputs stand for the same thing in every form of the model.
        results: the tensors of the final output that do, by name.
        detections: the final output's ``(boxes, scores, classes)``, one triple an image, best first.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    watched: tuple[str, ...] = ()
    results: Callable[[Any], dict[str, Tensor]] = field(default=lambda output: {})
    detections: Callable[[Any], list[tuple[Tensor, Tensor, Tensor]]] | None = None


def build_fasterrcnn(side: int = 320) -> nn.Module:
    """Faster R-CNN on MobileNetV3 with FPN and frozen norms; regions move gently, and every class has its share of them."""
    torch.manual_seed(0)
    make = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = make(weights=None, weights_backbone=None, min_size=side, num_classes=8, box_detections_per_img=50)
    photos = photo_list(4, side, 1)
    give_signal(freeze_norms(model), photos)
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.mul_(0.1)
        scores = model.roi_heads.box_predictor.cls_score
        hook = scores.register_forward_hook(_centre_bias)
        call(model, photos)
    hook.remove()
    return model


def build_ssdlite(side: int = 320) -> nn.Module:
    """SSDlite on MobileNetV3; a ``side`` other than its own 320 makes it cheaper."""
    torch.manual_seed(0)
    make = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = make(weights=None, weights_backbone=None, score_thresh=0.02, detections_per_img=50)
    model.transform.min_size, model.transform.max_size = (side,), side
    model.transform.fixed_size = (side, side)
    return give_signal(model, photo_list(4, side, 1))


def build_raft(side: int = 128) -> nn.Module:
    """RAFT, small, whose last flow convolution is weak, so that twelve updates add up and do not run away."""
    torch.manual_seed(0)
    model = torchvision.models.optical_flow.raft_small(weights=None)
    give_signal(model, two_frames(2, side, 1))
    with torch.no_grad():
        model.update_block.flow_head.conv2.weight.mul_(0.1)
    return model


def build_yolo(side: int = 160, head: str = "anchor", nms: bool = False, width: int = 16) -> nn.Module:
    """`yolo.Yolo` with a signal."""
    torch.manual_seed(0)
    model = Yolo(classes=8, width=width, depth=1, head=head, nms=nms, confidence=0.3)
    return give_signal(model, blobs(4, side, 1))


def build_bert(vocabulary: int = 500, hidden: int = 128, layers: int = 4) -> nn.Module:
    """A small BERT of transformers, from its configuration alone."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
    )
    return give_signal(BertModel(config), sentences(4, 32, 1, vocabulary), bias=0.0)


def torchvision_detections(output: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, scores and labels of torchvision's detectors."""
    return [(image["boxes"], image["scores"], image["labels"]) for image in output]


def yolo_detections(output: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, scores and classes of `yolo.Yolo` with suppression."""
    return [(rows[:, :4], rows[:, 4], rows[:, 5]) for rows in output]


def yolo_results(output: Any) -> dict[str, Tensor]:
    """Decoded boxes and scores, and the levels' raw outputs."""
    decoded, levels = output
    named = {"boxes": decoded[..., :4], "scores": decoded[..., 4:]}
    return named | {f"level {number}": level for number, level in enumerate(levels)}


def bert_results(output: Any) -> dict[str, Tensor]:
    """The last layer's tokens, those that are masked too, and the pooled sentence."""
    return {"last_hidden_state": output.last_hidden_state, "pooled": output.pooler_output}


def cases() -> dict[str, Case]:
    """All that is measured, by name."""
    rcnn = ("backbone", "rpn.head")
    yolo = {"batch": lambda count, seed: blobs(count, 160, seed)}
    return {
        "fasterrcnn_mobilenet_v3_large_320_fpn": Case(
            build_fasterrcnn, lambda n, seed: photo_list(n, 320, seed), rcnn, detections=torchvision_detections
        ),
        "ssdlite320_mobilenet_v3_large": Case(
            build_ssdlite,
            lambda n, seed: photo_list(n, 320, seed),
            ("backbone", "head"),
            detections=torchvision_detections,
        ),
        "raft_small": Case(build_raft, lambda n, seed: two_frames(n, 128, seed), results=lambda out: {"flow": out[-1]}),
        "yolo_anchor": Case(build_yolo, results=yolo_results, **yolo),
        "yolo_dfl": Case(lambda: build_yolo(head="dfl"), results=yolo_results, **yolo),
        "yolo_anchor_nms": Case(
            lambda: build_yolo(nms=True), watched=("model.22",), detections=yolo_detections, **yolo
        ),
        "bert": Case(build_bert, lambda n, seed: sentences(n, 32, seed, 500), results=bert_results),
    }


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


@contextmanager
def watching(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what the modules at ``paths`` give is kept, by path and number, where it is a real tensor.

    A module that the quantized model does not have, or does not call as a whole, leaves nothing.
    """
    kept: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> None:
        for number, tensor in enumerate(tensors_of(output)):
            if tensor.is_floating_point():
                kept[f"{path} {number}"] = tensor.detach().clone()

    parts = {path: part for path, part in model.named_modules() if path in paths}
    hooks = [
        part.register_forward_hook(lambda module, args, output, path=path: keep(path, output))
        for path, part in parts.items()
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Seen:
    """What a model gave on one batch: its output, and the tensors by name that can be compared."""

    output: Any
    tensors: dict[str, Tensor]


@torch.no_grad()
def look(model: nn.Module, case: Case, batch: Batch) -> Seen:
    """Run ``model`` and keep what ``case`` wants compared."""
    with watching(model, case.watched) as kept:
        output = call(model, batch)
    return Seen(output, {**kept, **case.results(output)})


def decibels(actual: Tensor, expected: Tensor) -> float:
    """The energy of ``expected`` over that of the error, in dB."""
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    error = float((actual.double() - expected.double()).square().sum())
    energy = float(expected.double().square().sum())
    return math.inf if not error else 10 * math.log10(energy / error) if energy else -math.inf


def fidelity(actual: Seen, expected: Seen) -> dict[str, float | None]:
    """Decibels by tensor; None for one that the quantized model does not compute as such."""
    return {
        name: round(decibels(actual.tensors[name], tensor), 1) if name in actual.tensors else None
        for name, tensor in expected.tensors.items()
    }


def matched(actual: Any, expected: Any, case: Case, overlap: float = 0.5) -> float | None:
    """The share of the expected best boxes that have a partner: same class, and an overlap of at least ``overlap``."""
    if case.detections is None:
        return None
    found = count = 0
    for own, other in zip(case.detections(actual), case.detections(expected), strict=True):
        boxes, _, kinds = (part[:BEST] for part in other)
        same = own[2][:, None] == kinds[None]
        hits = (box_iou(own[0], boxes) >= overlap) & same
        found += int(hits.any(0).sum()) if len(own[0]) else 0
        count += len(boxes)
    return round(found / count, 3) if count else None


def signal(first: Seen, second: Seen) -> float:
    """How much of the compared tensors depends on the input: the smallest relative distance of two inputs' tensors."""
    return min(
        float((second.tensors[name] - tensor).norm() / tensor.norm())
        for name, tensor in first.tensors.items()
        if second.tensors[name].shape == tensor.shape
    )


def megabytes(module: nn.Module) -> float:
    """What ``module``'s state takes in a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return round(len(file.getvalue()) / 1e6, 3)


@torch.no_grad()
def same_bits(case: Case, model: nn.Module, batch: Batch) -> bool:
    """Whether ``model``, prepared for QAT and in eval mode with quantizers off, gives the float model's very bits."""
    prepared = fxquant.prepare(model, batch, qat=True, processor="vnni").eval()
    with fxquant.quantizers_off(prepared):
        actual = list(tensors_of(call(prepared, batch)))
    expected = list(tensors_of(call(model, batch)))
    return len(actual) == len(expected) and all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def timed(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """A function's result and the seconds it took."""
    start = time.perf_counter()
    result = function(*args, **options)
    return result, seconds(time.perf_counter() - start)


def smallest(values: Mapping[str, float | None]) -> float | None:
    """The worst of the figures that there are."""
    known = [value for value in values.values() if value is not None]
    return min(known) if known else None


def measure(case: Case, row: dict[str, Any], detail: dict[str, Any], args: argparse.Namespace) -> None:
    """Take one model all the way, and fill its row and what the JSON keeps beside it as figures come in."""
    model = case.build()
    example, unseen = case.batch(args.batch, 10), case.batch(args.batch, 100)
    expected = look(model, case, unseen)
    if expected.tensors:
        row["signal"] = round(signal(look(model, case, example), expected), 3)
    prepared, row["prepare s"] = timed(fxquant.prepare, model, example, processor="vnni")
    islands = list(islands_of(prepared))
    row["graphs"], row["islands"] = len(list(graphs_of(prepared))), len(islands)
    detail["islands"] = [{"path": i.path, "cause": str(i.cause)} for i in islands]
    covered = fxquant.coverage(prepared)
    row["MACs in integers"] = None if covered.macs_share is None else round(covered.macs_share, 4)
    row["QAT bit for bit"] = same_bits(case, model, example)
    loader = [case.batch(args.batch, seed) for seed in range(20, 20 + args.calibration)]
    row["calibrate s"] = timed(fxquant.calibrate, prepared, loader, forward=call, progress=False)[1]
    if args.show:
        print(fxquant.coverage(prepared), *str(fxquant.diff(model, prepared)).splitlines()[:DIFF_LINES], sep="\n")
    compare(row, detail, "fake-quant", look(prepared, case, unseen), expected, case)
    integer, row["convert s"] = timed(fxquant.convert, prepared)
    compare(row, detail, "int8", look(integer, case, unseen), expected, case)
    row["float MB"], row["int8 MB"] = megabytes(model), megabytes(integer)
    fine = fxquant.prepare(model, example, recipe=FINE, processor="vnni")
    fxquant.calibrate(fine, loader, forward=call, progress=False)
    seen = fidelity(look(fine, case, loader[0]), look(model, case, loader[0]))
    detail["16 bits, seen dB"], row["16 bits, seen dB"] = seen, smallest(seen)


def compare(row: dict[str, Any], detail: dict[str, Any], form: str, actual: Seen, expected: Seen, case: Case) -> None:
    """Add one form's figures."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(actual.output)):
        raise ValueError(f"{form}: the output is not finite")
    detail[f"{form} dB"] = fidelity(actual, expected)
    row[f"{form} dB"] = smallest(detail[f"{form} dB"])
    row[f"{form} boxes"] = matched(actual.output, expected.output, case)


COLUMNS = (
    "model", "graphs", "islands", "MACs in integers", "QAT bit for bit", "signal", "fake-quant dB", "int8 dB",
    "16 bits, seen dB", "fake-quant boxes", "int8 boxes", "float MB", "int8 MB", "prepare s", "calibrate s", "convert s",
    "verdict",
)  # fmt: skip


def try_row(name: str, case: Case, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row and its details; an error ends in the verdict, and what was measured before it stays."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["model"] = name
    detail: dict[str, Any] = {}
    try:
        measure(case, row, detail, args)
        row["verdict"] = verdict(row)
    except Exception as error:
        if args.show:
            raise
        message = str(error).strip().splitlines()
        row["verdict"] = f"{type(error).__name__}: {message[0] if message else ''}"[:100]
    gc.collect()
    return row, detail


def verdict(row: Mapping[str, Any]) -> str:
    """``ok``, or what is wrong."""
    if row["signal"] is not None and row["signal"] < LEAST_SIGNAL:
        return "the output hardly depends on the input"
    return "ok" if row["QAT bit for bit"] else "QAT is not bit for bit"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="names, * and ? allowed")
    parser.add_argument("--batch", type=int, default=2, help="inputs a batch (default: 2)")
    parser.add_argument("--calibration", type=int, default=4, help="calibration batches (default: 4)")
    parser.add_argument("--show", action="store_true", help="print coverage and the top of the diff; stop at an error")
    add_output_option(parser, "islands")
    return parser.parse_args()


def main() -> None:
    """Take every chosen model the whole way and publish the table."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    chosen = {n: case for n, case in cases().items() if any(fnmatch.fnmatch(n, pattern) for pattern in args.models)}
    if not chosen:
        raise SystemExit(f"--models: none of {', '.join(cases())} matches {' '.join(args.models)}")
    rows, details = [], {}
    bar = tqdm(chosen.items())
    for name, case in bar:
        bar.set_description(name)
        row, details[name] = try_row(name, case, args)
        rows.append(row)
    publish(rows, args, details=details)


if __name__ == "__main__":
    main()
