"""torchvision's networks."""

from __future__ import annotations

from typing import Any

import torch
import zoo_inputs
from torch import Tensor
from zoo_cases import Case, Entry, Inputs, refuse_large, runs

_NO_SPECIAL_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
_TORCHVISION_CI = (
    "alexnet densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v3_small resnet18 shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 maxvit_t convnext_tiny regnet_y_400mf lraspp_mobilenet_v3_large "
    "deeplabv3_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large "
    "retinanet_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn fcos_resnet50_fpn raft_small r3d_18 s3d "
    "swin3d_t quantized_resnet18 quantizable_resnet18"
)


def named() -> list[Entry]:
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


def build(entry: Entry, largest: float) -> Case:
    from torchvision.models import get_model

    name, kind = entry.model, entry.kind
    settings: dict[str, Any] = {"weights": None, **_NO_SPECIAL_INIT.get(name.split("_", 1)[-1], {})}
    settings |= _NO_SPECIAL_INIT.get(name, {})
    if kind in ("quantized", "quantizable"):
        model = get_model(name.replace("quantizable_", "quantized_"), quantize=kind == "quantized", **settings)
        return Case(model, zoo_inputs.image, *((299, None) if "inception" in name else (224, 256)))
    if kind == "detection":
        return _build_detection(name, settings)
    if kind == "segmentation":
        return Case(get_model(name, weights_backbone=None, **settings), zoo_inputs.image, 96, 128)
    if kind == "video":
        return _build_video(name, settings)
    if kind == "optical_flow":
        return Case(get_model(name, **settings), zoo_inputs.pair, 128, 160)
    refuse_large(lambda: get_model(name, **settings), largest)
    return Case(get_model(name, **settings), zoo_inputs.image, *((299, 320) if name == "inception_v3" else (224, 256)))


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

    return Case(model, zoo_inputs.image_list, 128, 160, targets, note)


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
    size = next(
        (size for size in sizes if runs(lambda: get_model(name, **settings), zoo_inputs.clip(1, size))), sizes[-1]
    )
    return Case(get_model(name, **settings), zoo_inputs.clip, size, (size[0] + 4, size[1]))
