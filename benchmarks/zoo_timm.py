"""timm's networks: all, or the smallest of each of its files."""

from __future__ import annotations

import math

import torch
import zoo_inputs
from zoo_cases import Case, Entry, Inputs, call, refuse_large, runs

_SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)

# The smallest network by parameters of each file of timm.models (its own "test_…" toys aside), found by
# `smallest_of_files`. A name that timm does not know is passed over.
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


def named(which: str) -> list[Entry]:
    import timm

    names = timm.list_models()
    smallest = {name for name in _TIMM_FAMILIES.split() if name in names}
    return [Entry("timm", "timm", name, name in smallest) for name in names if which == "all" or name in smallest]


def smallest_of_files() -> list[str]:
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


def build(entry: Entry, largest: float) -> Case:
    import timm

    name = entry.model
    create = timm.create_model
    refuse_large(lambda: create(name, pretrained=False), largest)
    default = timm.get_pretrained_cfg(name)
    channels, side = (default.input_size[0], default.input_size[-1]) if default else (3, 224)

    def inputs(batch: int, side: int) -> Inputs:
        return zoo_inputs.image(batch, side, channels)

    tries = [(size, settings) for size in _SIDES for settings in ({}, {"img_size": size}) if size <= side]
    for size, settings in [*tries, (side, {})]:
        if (size == side and not settings) or runs(lambda: create(name, **settings), inputs(2, size)):  # noqa: B023
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


if __name__ == "__main__":
    print(" ".join(smallest_of_files()))
