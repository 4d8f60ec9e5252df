"""The networks of ``capture_zoo.py`` and their inputs: torchvision, timm and transformers, built without any download.

`entries` lists them by name, which costs nothing; `build` makes one, with weights that carry a signal to the output
(`randomize`), and knows how to make its inputs at any batch size and any image size, clip size or length.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FAMILIES", "Case", "Entry", "Inputs", "build", "call", "entries", "leaves", "timm_families"]

FAMILIES = ("torchvision", "timm", "transformers")
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One network by name: ``kind`` groups the rows of a family, ``ci`` marks the small set."""

    family: str
    kind: str
    model: str
    ci: bool = False


@dataclass
class Case:
    """A network in eval mode with its inputs.

    Attributes:
        model: the network.
        inputs: ``inputs(batch, size)`` makes positional arguments (a tuple) or keyword arguments (a dict).
        size: of the example; an image side, a (frames, side) pair, or a length.
        other_size: a second size to try; the network itself may refuse it.
        targets: ``targets(inputs)`` are the further positional arguments that training needs, if any.
        note: what was built otherwise than by default.
    """

    model: nn.Module
    inputs: Callable[[int, Any], Inputs]
    size: Any
    other_size: Any = None
    targets: Callable[[Inputs], tuple[Any, ...]] | None = None
    note: list[str] = field(default_factory=list)


class TooLargeError(Exception):
    """The network has more parameters than the run allows."""


def entries(families: Iterable[str], patterns: Iterable[str] = ("*",), timm: str = "families") -> list[Entry]:
    """Every network of ``families`` whose name matches one of ``patterns``; ``timm`` is ``"families"`` or ``"all"``."""
    found: list[Entry] = []
    for family in families:
        found += {"torchvision": _torchvision, "timm": lambda: _timm(timm), "transformers": _transformers}[family]()
    return [entry for entry in found if any(fnmatch.fnmatch(entry.model, pattern) for pattern in patterns)]


def build(entry: Entry, largest: float = math.inf) -> Case:
    """Build the network of ``entry`` with random weights, the same on every call.

    Raises:
        TooLargeError: its parameters take more than ``largest`` bytes.
    """
    makers = {"torchvision": _build_torchvision, "timm": _build_timm, "transformers": _build_transformers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        case = makers[entry.family](entry, largest)
        case.model.eval()
        if entry.kind == "quantized":
            return case
        sample = case.inputs(4 if _is_small(case) else 2, case.size)
        state = {name: value.clone() for name, value in case.model.state_dict().items()}
        try:
            randomize(case.model, sample)
            finite = _is_finite(case.model, sample)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            finite = False
            case.note.append(f"random weights: {type(error).__name__}")
        if not finite:
            case.model.load_state_dict(state)
            case.note.append("weights as built")
    return case


def call(model: nn.Module, inputs: Inputs, more: tuple[Any, ...] = ()) -> Any:
    """Run ``model`` on keyword or positional ``inputs``."""
    return model(*more, **inputs) if isinstance(inputs, dict) else model(*inputs, *more)


def leaves(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside ``value`` (containers, model outputs, caches) with the way there."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield path, value
    elif id(value) not in seen:
        seen = seen | {id(value)}
        kind = type(value).__name__
        if hasattr(value, "items"):
            parts = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            parts = [(str(index), item) for index, item in enumerate(value)]
        else:
            parts = list(vars(value).items()) if hasattr(value, "__dict__") else []
        yield f"{path}<{kind}>", len(parts)
        for name, item in parts:
            yield from leaves(item, f"{path}.{name}", seen)


# ---- weights that carry a signal ------------------------------------------------------------------------------------

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def randomize(model: nn.Module, sample: Inputs) -> nn.Module:
    """Give ``model`` weights that carry a signal to the output and norms that a wrong rewrite would betray.

    The same as ``quantizers_off.randomize`` for any norm (a module that is called one), any number of dimensions and any
    inputs: convolution weights ~ N(0, 2/fan_in), norm weights ± U(0.5, 1.5), norm biases N(0.5, 0.1), other constant
    parameters random; BatchNorm statistics are measured on ``sample`` layer by layer and disturbed.
    """
    for norm in (module for module in model.modules() if _is_norm(module)):
        signs = torch.randint(0, 2, norm.weight.shape) * 2.0 - 1.0
        norm.weight.copy_(signs * (0.5 + torch.rand(norm.weight.shape)))
        if isinstance(getattr(norm, "bias", None), Tensor):
            norm.bias.normal_(0.5, 0.1)
    for convolution in (module for module in model.modules() if isinstance(module, _CONVOLUTIONS)):
        convolution.weight.normal_(0, (2 / max(convolution.weight[0].numel(), 1)) ** 0.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            size = parameter[0].numel() if parameter.ndim else 1
            parameter.normal_(0, size**-0.5 if size > 1 else 0.1)
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    model.eval()
    try:
        if norms:
            call(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower() or isinstance(module, _BATCH_NORM)
    return named and isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 1


def _set_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: take the statistics of the input, bounded where a channel hardly varies, and disturb them."""
    x = args[0]
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != norm.running_mean.numel():
        return
    variance, mean = torch.var_mean(x.float(), [dim for dim in range(x.ndim) if dim != 1], correction=0)
    variance = variance.clamp(min=max(float(variance.mean()) / 10, 1e-6))
    norm.running_mean.copy_(mean + 0.1 * torch.randn(mean.shape) * variance.sqrt())
    norm.running_var.copy_(variance * (0.5 + torch.rand(variance.shape)))


def _is_finite(model: nn.Module, sample: Inputs) -> bool:
    with torch.no_grad():
        found = [value for _, value in leaves(call(model, sample)) if isinstance(value, Tensor)]
    return all(bool(value.isfinite().all()) for value in found if value.is_floating_point())


def _is_small(case: Case) -> bool:
    return sum(parameter.numel() for parameter in case.model.parameters()) < 50e6 and not isinstance(case.size, tuple)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def _blobs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Colour blobs under noise, ``(batch, channels, *sides)``: plain noise looks the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:2], *(6 for _ in shape[2:]), generator=generator)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 2]
    return F.interpolate(coarse, shape[2:], mode=mode) + 0.5 * torch.randn(shape, generator=generator)


def _image(batch: int, side: int, channels: int = 3) -> Inputs:
    return (_blobs((batch, channels, side, side), batch),)


def _clip(batch: int, size: tuple[int, int]) -> Inputs:
    frames, side = size
    return (_blobs((batch, 3, frames, side, side), batch),)


def _pair(batch: int, side: int) -> Inputs:
    first = _blobs((batch, 3, side, side), batch).tanh()
    return (
        first,
        (first.roll((2, -3), (2, 3)) + 0.1 * _blobs((batch, 3, side, side), batch + 100).tanh()).clamp(-1, 1),
    )


def _image_list(batch: int, side: int) -> Inputs:
    """``batch`` images of different sizes with values in 0…1, as torchvision's detectors take them."""
    shapes = [(side, side + 32), (side + 16, side), (side, side)]
    return ([_blobs((1, 3, *shapes[index % 3]), index)[0].sigmoid() for index in range(batch)],)


def _tokens(batch: int, length: int, vocabulary: int = 90, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length + seed)
    return torch.randint(5, vocabulary, (batch, length), generator=generator)


def _mask(batch: int, length: int) -> Tensor:
    """Ones, with the last two positions of the last item padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length), "attention_mask": _mask(batch, length)}


def _ended_text(batch: int, length: int) -> Inputs:
    ids = _tokens(batch, length)
    ids[:, -1] = 2  # the end mark at which BART classifies
    return {"input_ids": ids}


def _ids(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length)}


def _text_to_text(batch: int, length: int) -> Inputs:
    return {**_text(batch, length), "decoder_input_ids": _tokens(batch, length // 2 + 1, seed=7)}


def _pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": _blobs((batch, 3, side, side), batch)}


def _video_pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": _blobs((batch, 3, 4, side, side), batch).transpose(1, 2).contiguous()}


def _text_and_pixels(batch: int, size: int) -> Inputs:
    return {**_text(batch, size // 8), **_pixels(batch, 32)}


def _sound(batch: int, length: int) -> Inputs:
    return {"input_values": _blobs((batch, 1, length), batch)[:, 0]}


def _spectrum(batch: int, length: int) -> Inputs:
    return {"input_features": _blobs((batch, 16, length), batch), "decoder_input_ids": _tokens(batch, 6)}


# ---- torchvision ----------------------------------------------------------------------------------------------------

_NO_SPECIAL_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
_TORCHVISION_CI = (
    "alexnet densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v3_small resnet18 shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 maxvit_t convnext_tiny regnet_y_400mf lraspp_mobilenet_v3_large "
    "deeplabv3_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large "
    "retinanet_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn fcos_resnet50_fpn raft_small r3d_18 s3d "
    "swin3d_t quantized_resnet18 quantizable_resnet18"
)


def _torchvision() -> list[Entry]:
    from torchvision import models

    modules = {
        "classification": models,
        "detection": models.detection,
        "segmentation": models.segmentation,
        "video": models.video,
        "optical_flow": models.optical_flow,
        "quantized": models.quantization,
    }
    found = [(kind, name) for kind, module in modules.items() for name in models.list_models(module=module)]
    found += [
        ("quantizable", name.replace("quantized_", "quantizable_")) for kind, name in found if kind == "quantized"
    ]
    return [Entry("torchvision", kind, name, name in _TORCHVISION_CI.split()) for kind, name in found]


def _build_torchvision(entry: Entry, largest: float) -> Case:
    from torchvision.models import get_model

    name, kind = entry.model, entry.kind
    settings: dict[str, Any] = {"weights": None, **_NO_SPECIAL_INIT.get(name.split("_", 1)[-1], {})}
    settings |= _NO_SPECIAL_INIT.get(name, {})
    if kind in ("quantized", "quantizable"):
        model = get_model(name.replace("quantizable_", "quantized_"), quantize=kind == "quantized", **settings)
        return Case(model, _image, *((299, None) if "inception" in name else (224, 256)))
    if kind == "detection":
        return _build_detection(name, settings)
    if kind == "segmentation":
        return Case(get_model(name, weights_backbone=None, **settings), _image, 96, 128)
    if kind == "video":
        return _build_video(name, settings)
    if kind == "optical_flow":
        return Case(get_model(name, **settings), _pair, 128, 160)
    _refuse_large(lambda: get_model(name, **settings), largest)
    return Case(get_model(name, **settings), _image, *((299, 320) if name == "inception_v3" else (224, 256)))


def _build_detection(name: str, settings: dict[str, Any]) -> Case:
    from torchvision.models import get_model

    settings = {**settings, "weights_backbone": None}
    note = []
    if not name.startswith("ssd"):  # those two resize to the one size they are made for
        rcnn = "rcnn" in name
        settings |= {"min_size": 160, "max_size": 224, "box_score_thresh" if rcnn else "score_thresh": 1e-3}
        settings |= {"box_detections_per_img" if rcnn else "detections_per_img": 8}
        if rcnn:
            settings |= {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 100}
        note.append("small images, 8 detections each, score threshold 0.001")
    model = get_model(name, **settings)

    def targets(inputs: Inputs) -> tuple[Any, ...]:
        return ([_target(name, image, index) for index, image in enumerate(inputs[0])],)  # type: ignore[index]

    return Case(model, _image_list, 128, 160, targets, note)


def _target(name: str, image: Tensor, index: int) -> dict[str, Tensor]:
    boxes = torch.tensor([[8.0, 12.0, 70.0 + index, 90.0], [30.0, 20.0, 110.0, 60.0 + 3 * index]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2 if "keypoint" not in name else 1])}
    if "mask" in name:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[0, 15:85, 10:65], masks[1, 22:58, 35:100] = 1, 1
        target["masks"] = masks
    if "keypoint" in name:
        corner, extent = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        places = torch.rand(2, 17, 2, generator=torch.Generator().manual_seed(index))
        target["keypoints"] = torch.cat([corner + places * extent, torch.ones(2, 17, 1)], 2)
    return target


def _build_video(name: str, settings: dict[str, Any]) -> Case:
    from torchvision.models import get_model

    sizes = ((8, 64), (16, 64), (16, 112), (16, 224))
    size = next((size for size in sizes if _runs(lambda: get_model(name, **settings), _clip(1, size))), sizes[-1])
    return Case(get_model(name, **settings), _clip, size, (size[0] + 4, size[1]))


# ---- timm -----------------------------------------------------------------------------------------------------------

_SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)

# The smallest network by parameters of each file of timm.models (its own "test_…" toys aside), found by
# `timm_families`. A name that timm does not know is passed over.
_TIMM_FAMILIES = (
    "beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 "
    "convnext_zepto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny "
    "deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 "
    "efficientformerv2_s0 mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_m0 "
    "vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 "
    "hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto "
    "inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto "
    "maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs "
    "mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 "
    "pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d "
    "resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 "
    "swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 "
    "tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 "
    "vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 "
    "ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224"
)


def _timm(which: str) -> list[Entry]:
    import timm

    names = timm.list_models()
    smallest = {name for name in _TIMM_FAMILIES.split() if name in names}
    return [Entry("timm", "timm", name, name in smallest) for name in names if which == "all" or name in smallest]


def timm_families() -> list[str]:
    """The smallest network of each file of timm.models, counted on the meta device: three minutes."""
    import timm
    from timm.models import _registry

    smallest: dict[str, tuple[float, str]] = {}
    for name in timm.list_models(exclude_filters="test_*"):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())
        file = _registry._model_to_module[name]
        smallest[file] = min(smallest.get(file, (math.inf, "")), (count, name))
    return [name for _, (_, name) in sorted(smallest.items())]


def _build_timm(entry: Entry, largest: float) -> Case:
    import timm

    name = entry.model
    create = timm.create_model
    _refuse_large(lambda: create(name, pretrained=False), largest)
    default = timm.get_pretrained_cfg(name)
    channels, side = (default.input_size[0], default.input_size[-1]) if default else (3, 224)

    def inputs(batch: int, side: int) -> Inputs:
        return _image(batch, side, channels)

    tries = [(size, settings) for size in _SIDES for settings in ({}, {"img_size": size}) if size <= side]
    for size, settings in [*tries, (side, {})]:
        if (size == side and not settings) or _runs(lambda: create(name, **settings), inputs(2, size)):  # noqa: B023
            model = create(name, pretrained=False, **settings).eval()
            try:
                with torch.no_grad():
                    call(model, inputs(2, size))
            except Exception:
                if size == side and not settings:
                    raise
                continue
            note = ["img_size"] if settings else []
            return Case(model, inputs, size, size + (32 if size < 256 else 64), None, note)
    raise AssertionError("unreachable")


def _runs(make: Callable[[], nn.Module], inputs: Inputs) -> bool:
    """Whether the network runs on inputs of these shapes, tried without data on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad():
            call(make().eval(), tuple(value.to("meta") for value in inputs))
    except Exception:
        return False
    return True


def _refuse_large(make: Callable[[], nn.Module], largest: float) -> None:
    if largest == math.inf:
        return
    with torch.device("meta"):
        size = sum(parameter.numel() * parameter.element_size() for parameter in make().parameters())
    if size > largest:
        raise TooLargeError(f"{size / 2**30:.1f} GiB of parameters")


# ---- transformers ---------------------------------------------------------------------------------------------------

_TEXT = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BERT = {**_TEXT, **_WIDTH}
_ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    **_TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_VIT = {**_WIDTH, "image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2]}
_RESNET = {"embedding_size": 16, **_STAGES}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
_SOUND = {
    **_WIDTH,
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 2,
}
_TEXT_TOWER = {**_BERT, "projection_dim": 32}
_VISION_TOWER = {**_VIT, "projection_dim": 32}
_CLIP = {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER, "projection_dim": 32}
_T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

_TEXT_SIZES, _SQUARE, _FINE = (12, 9), (32, 48), (64, 96)

# model class: inputs, (size, another size), settings of its config
_TRANSFORMERS: dict[str, tuple[Callable[[int, Any], Inputs], tuple[Any, Any], dict[str, Any]]] = {
    "BertModel": (_text, _TEXT_SIZES, _BERT),
    "BertForSequenceClassification": (_text, _TEXT_SIZES, _BERT),
    "BertForMaskedLM": (_text, _TEXT_SIZES, _BERT),
    "RobertaModel": (_text, _TEXT_SIZES, _ROBERTA),
    "XLMRobertaModel": (_text, _TEXT_SIZES, _ROBERTA),
    "CamembertModel": (_text, _TEXT_SIZES, _ROBERTA),
    "Data2VecTextModel": (_text, _TEXT_SIZES, _ROBERTA),
    "DistilBertModel": (
        _text,
        _TEXT_SIZES,
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "DistilBertForTokenClassification": (
        _text,
        _TEXT_SIZES,
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "AlbertModel": (_text, _TEXT_SIZES, {**_BERT, "embedding_size": 16}),
    "ElectraModel": (_text, _TEXT_SIZES, {**_BERT, "embedding_size": 16}),
    "DebertaV2Model": (
        _text,
        _TEXT_SIZES,
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "MPNetModel": (_text, _TEXT_SIZES, _ROBERTA),
    "SqueezeBertModel": (_text, _TEXT_SIZES, {**_BERT, "embedding_size": 32}),
    "MobileBertModel": (
        _text,
        _TEXT_SIZES,
        {**_BERT, "hidden_size": 64, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    "FNetModel": (_ids, _TEXT_SIZES, _BERT),
    "FunnelModel": (
        _text,
        (16, 24),
        {
            "vocab_size": 96,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
        },
    ),
    "XLNetModel": (_text, _TEXT_SIZES, {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "LongformerModel": (_text, (16, 24), {**_ROBERTA, "attention_window": [8, 8]}),
    "GPT2Model": (_text, _TEXT_SIZES, _GPT),
    "GPT2LMHeadModel": (_text, _TEXT_SIZES, _GPT),
    "GPTNeoModel": (
        _text,
        _TEXT_SIZES,
        {**_TEXT, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPTNeoXModel": (_text, _TEXT_SIZES, _BERT),
    "OPTModel": (_text, _TEXT_SIZES, {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BloomModel": (_text, _TEXT_SIZES, {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "LlamaModel": (_text, _TEXT_SIZES, _LLAMA),
    "LlamaForCausalLM": (_text, _TEXT_SIZES, _LLAMA),
    "MistralModel": (_text, _TEXT_SIZES, {**_LLAMA, "sliding_window": 8}),
    "Qwen2Model": (_text, _TEXT_SIZES, _LLAMA),
    "Gemma2Model": (_text, _TEXT_SIZES, {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "MixtralModel": (_text, _TEXT_SIZES, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "MambaModel": (
        _ids,
        _TEXT_SIZES,
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "T5Model": (_text_to_text, _TEXT_SIZES, _T5),
    "T5EncoderModel": (_text, _TEXT_SIZES, _T5),
    "T5ForConditionalGeneration": (_text_to_text, _TEXT_SIZES, _T5),
    "BartModel": (_text_to_text, _TEXT_SIZES, _BART),
    "BartForSequenceClassification": (_ended_text, _TEXT_SIZES, _BART),
    "MarianModel": (_text_to_text, _TEXT_SIZES, {**_BART, "decoder_vocab_size": 96}),
    "ViTModel": (_pixels, _SQUARE, _VIT),
    "ViTForImageClassification": (_pixels, _SQUARE, _VIT),
    "DeiTModel": (_pixels, _SQUARE, _VIT),
    "BeitModel": (_pixels, _SQUARE, {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}),
    "Data2VecVisionModel": (_pixels, _SQUARE, {**_VIT, "layer_scale_init_value": 0.1}),
    "Dinov2Model": (_pixels, _SQUARE, _VIT),
    "YolosForObjectDetection": (_pixels, (32, 48), {**_VIT, "image_size": [32, 32], "num_detection_tokens": 6}),
    "VideoMAEModel": (_video_pixels, (32, None), {**_VIT, "num_frames": 4}),
    "SwinModel": (_pixels, _FINE, _SWIN),
    "SwinForImageClassification": (_pixels, _FINE, _SWIN),
    "Swinv2Model": (_pixels, _FINE, _SWIN),
    "FocalNetModel": (
        _pixels,
        _FINE,
        {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 64},
    ),
    "ConvNextModel": (_pixels, _FINE, {**_STAGES, "num_stages": 2}),
    "ConvNextV2Model": (_pixels, _FINE, {**_STAGES, "num_stages": 2}),
    "ResNetModel": (_pixels, _FINE, _RESNET),
    "ResNetForImageClassification": (_pixels, _FINE, _RESNET),
    "RegNetModel": (_pixels, _FINE, {**_RESNET, "groups_width": 8}),
    "BitModel": (_pixels, _FINE, {**_STAGES, "embedding_size": 16, "num_groups": 4}),
    "MobileNetV1Model": (_pixels, _FINE, {"depth_multiplier": 0.25}),
    "MobileNetV2Model": (_pixels, _FINE, {"depth_multiplier": 0.35}),
    "EfficientNetModel": (_pixels, _FINE, {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}),
    "MobileViTModel": (
        _pixels,
        _FINE,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64},
    ),
    "MobileViTForSemanticSegmentation": (
        _pixels,
        _FINE,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "aspp_out_channels": 16},
    ),
    "SegformerModel": (_pixels, _FINE, {**_PYRAMID, "sr_ratios": [4, 2], "mlp_ratios": [2, 2]}),
    "SegformerForSemanticSegmentation": (
        _pixels,
        _FINE,
        {**_PYRAMID, "sr_ratios": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
    ),
    "PoolFormerModel": (
        _pixels,
        _FINE,
        {
            "num_encoder_blocks": 2,
            "depths": [2, 2],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    "PvtModel": (
        _pixels,
        (64, None),
        {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
        },
    ),
    "LevitModel": (_pixels, (224, None), {}),
    "CvtModel": (_pixels, _FINE, {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 4]}),
    "DPTForDepthEstimation": (
        _pixels,
        (64, None),
        {
            **_WIDTH,
            "num_hidden_layers": 4,
            "image_size": 64,
            "patch_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 16, 32],
            "fusion_hidden_size": 16,
        },
    ),
    "DetrModel": (_pixels, _FINE, {}),
    "DetrForObjectDetection": (_pixels, _FINE, {}),
    "CLIPModel": (_text_and_pixels, (96, 72), _CLIP),
    "CLIPVisionModel": (_pixels, (32, None), _VISION_TOWER),
    "CLIPTextModel": (_text, _TEXT_SIZES, _TEXT_TOWER),
    "SiglipModel": (_text_and_pixels, (96, 72), {"text_config": _BERT, "vision_config": _VIT}),
    "WhisperModel": (
        _spectrum,
        (64, None),
        {**_BART, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 16},
    ),
    "Wav2Vec2Model": (_sound, (1600, 2100), _SOUND),
    "Wav2Vec2ForCTC": (_sound, (1600, 2100), _SOUND),
    "HubertModel": (_sound, (1600, 2100), _SOUND),
}
_TRANSFORMERS_CI = (
    "BertModel DistilBertModel AlbertModel DebertaV2Model GPT2LMHeadModel LlamaForCausalLM MixtralModel T5Model BartModel "
    "ViTModel SwinModel ConvNextModel SegformerForSemanticSegmentation DetrForObjectDetection MobileViTModel BeitModel "
    "CLIPModel WhisperModel Wav2Vec2Model"
)


def _transformers() -> list[Entry]:
    return [Entry("transformers", "transformers", name, name in _TRANSFORMERS_CI.split()) for name in _TRANSFORMERS]


def _build_transformers(entry: Entry, largest: float) -> Case:
    import transformers

    inputs, (size, other_size), settings = _TRANSFORMERS[entry.model]
    kind = getattr(transformers, entry.model)
    settings = dict(settings)
    if entry.model.startswith("Detr"):
        backbone = transformers.ResNetConfig(**_RESNET, out_features=["stage2"])
        accepted = inspect.signature(transformers.DetrConfig).parameters
        detr = {name: value for name, value in _BART.items() if name not in _TEXT and name in accepted}
        settings = {**detr, "num_queries": 8, "backbone_config": backbone}
        if "use_timm_backbone" in accepted:
            settings |= {"use_timm_backbone": False, "use_pretrained_backbone": False}
    with contextlib.redirect_stdout(None):
        model = kind(kind.config_class(**settings))
    with torch.no_grad():
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.weight.normal_(0, linear.in_features**-0.5)  # at width 32 a deviation of 0.02 lets all signal fade
    return Case(model, inputs, size, other_size)


if __name__ == "__main__":
    print(" ".join(timm_families()))
