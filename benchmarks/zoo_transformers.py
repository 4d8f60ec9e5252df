"""Networks of transformers, small: two layers of width 32."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_cases import Case, Entry, Inputs
from zoo_inputs import (
    ended_text,
    ids,
    pixels,
    sound,
    spectrum,
    text,
    text_and_pixels,
    text_to_text,
    video_pixels,
)

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
    "BertModel": (text, _TEXT_SIZES, _BERT),
    "BertForSequenceClassification": (text, _TEXT_SIZES, _BERT),
    "BertForMaskedLM": (text, _TEXT_SIZES, _BERT),
    "RobertaModel": (text, _TEXT_SIZES, _ROBERTA),
    "XLMRobertaModel": (text, _TEXT_SIZES, _ROBERTA),
    "CamembertModel": (text, _TEXT_SIZES, _ROBERTA),
    "Data2VecTextModel": (text, _TEXT_SIZES, _ROBERTA),
    "DistilBertModel": (
        text,
        _TEXT_SIZES,
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "DistilBertForTokenClassification": (
        text,
        _TEXT_SIZES,
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "AlbertModel": (text, _TEXT_SIZES, {**_BERT, "embedding_size": 16}),
    "ElectraModel": (text, _TEXT_SIZES, {**_BERT, "embedding_size": 16}),
    "DebertaV2Model": (
        text,
        _TEXT_SIZES,
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "MPNetModel": (text, _TEXT_SIZES, _ROBERTA),
    "SqueezeBertModel": (text, _TEXT_SIZES, {**_BERT, "embedding_size": 32}),
    "MobileBertModel": (
        text,
        _TEXT_SIZES,
        {**_BERT, "hidden_size": 64, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    "FNetModel": (ids, _TEXT_SIZES, _BERT),
    "FunnelModel": (
        text,
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
    "XLNetModel": (text, _TEXT_SIZES, {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "LongformerModel": (text, (16, 24), {**_ROBERTA, "attention_window": [8, 8]}),
    "GPT2Model": (text, _TEXT_SIZES, _GPT),
    "GPT2LMHeadModel": (text, _TEXT_SIZES, _GPT),
    "GPTNeoModel": (
        text,
        _TEXT_SIZES,
        {**_TEXT, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPTNeoXModel": (text, _TEXT_SIZES, _BERT),
    "OPTModel": (text, _TEXT_SIZES, {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BloomModel": (text, _TEXT_SIZES, {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "LlamaModel": (text, _TEXT_SIZES, _LLAMA),
    "LlamaForCausalLM": (text, _TEXT_SIZES, _LLAMA),
    "MistralModel": (text, _TEXT_SIZES, {**_LLAMA, "sliding_window": 8}),
    "Qwen2Model": (text, _TEXT_SIZES, _LLAMA),
    "Gemma2Model": (text, _TEXT_SIZES, {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "MixtralModel": (text, _TEXT_SIZES, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "MambaModel": (
        ids,
        _TEXT_SIZES,
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "T5Model": (text_to_text, _TEXT_SIZES, _T5),
    "T5EncoderModel": (text, _TEXT_SIZES, _T5),
    "T5ForConditionalGeneration": (text_to_text, _TEXT_SIZES, _T5),
    "BartModel": (text_to_text, _TEXT_SIZES, _BART),
    "BartForSequenceClassification": (ended_text, _TEXT_SIZES, _BART),
    "MarianModel": (text_to_text, _TEXT_SIZES, {**_BART, "decoder_vocab_size": 96}),
    "ViTModel": (pixels, _SQUARE, _VIT),
    "ViTForImageClassification": (pixels, _SQUARE, _VIT),
    "DeiTModel": (pixels, _SQUARE, _VIT),
    "BeitModel": (pixels, _SQUARE, {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}),
    "Data2VecVisionModel": (pixels, _SQUARE, {**_VIT, "layer_scale_init_value": 0.1}),
    "Dinov2Model": (pixels, _SQUARE, _VIT),
    "YolosForObjectDetection": (pixels, (32, 48), {**_VIT, "image_size": [32, 32], "num_detection_tokens": 6}),
    "VideoMAEModel": (video_pixels, (32, None), {**_VIT, "num_frames": 4}),
    "SwinModel": (pixels, _FINE, _SWIN),
    "SwinForImageClassification": (pixels, _FINE, _SWIN),
    "Swinv2Model": (pixels, _FINE, _SWIN),
    "FocalNetModel": (
        pixels,
        _FINE,
        {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 64},
    ),
    "ConvNextModel": (pixels, _FINE, {**_STAGES, "num_stages": 2}),
    "ConvNextV2Model": (pixels, _FINE, {**_STAGES, "num_stages": 2}),
    "ResNetModel": (pixels, _FINE, _RESNET),
    "ResNetForImageClassification": (pixels, _FINE, _RESNET),
    "RegNetModel": (pixels, _FINE, {**_RESNET, "groups_width": 8}),
    "BitModel": (pixels, _FINE, {**_STAGES, "embedding_size": 16, "num_groups": 4}),
    "MobileNetV1Model": (pixels, _FINE, {"depth_multiplier": 0.25}),
    "MobileNetV2Model": (pixels, _FINE, {"depth_multiplier": 0.35}),
    "EfficientNetModel": (pixels, _FINE, {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}),
    "MobileViTModel": (
        pixels,
        _FINE,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64},
    ),
    "MobileViTForSemanticSegmentation": (
        pixels,
        _FINE,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "aspp_out_channels": 16},
    ),
    "SegformerModel": (pixels, _FINE, {**_PYRAMID, "sr_ratios": [4, 2], "mlp_ratios": [2, 2]}),
    "SegformerForSemanticSegmentation": (
        pixels,
        _FINE,
        {**_PYRAMID, "sr_ratios": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
    ),
    "PoolFormerModel": (
        pixels,
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
        pixels,
        (64, None),
        {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
        },
    ),
    "LevitModel": (pixels, (224, None), {}),
    "CvtModel": (pixels, _FINE, {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 4]}),
    "DPTForDepthEstimation": (
        pixels,
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
    "DetrModel": (pixels, _FINE, {}),
    "DetrForObjectDetection": (pixels, _FINE, {}),
    "CLIPModel": (text_and_pixels, (96, 72), _CLIP),
    "CLIPVisionModel": (pixels, (32, None), _VISION_TOWER),
    "CLIPTextModel": (text, _TEXT_SIZES, _TEXT_TOWER),
    "SiglipModel": (text_and_pixels, (96, 72), {"text_config": _BERT, "vision_config": _VIT}),
    "WhisperModel": (
        spectrum,
        (64, None),
        {**_BART, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 16},
    ),
    "Wav2Vec2Model": (sound, (1600, 2100), _SOUND),
    "Wav2Vec2ForCTC": (sound, (1600, 2100), _SOUND),
    "HubertModel": (sound, (1600, 2100), _SOUND),
}
_TRANSFORMERS_CI = (
    "BertModel DistilBertModel AlbertModel DebertaV2Model GPT2LMHeadModel LlamaForCausalLM MixtralModel T5Model BartModel "
    "ViTModel SwinModel ConvNextModel SegformerForSemanticSegmentation DetrForObjectDetection MobileViTModel BeitModel "
    "CLIPModel WhisperModel Wav2Vec2Model"
)


def named() -> list[Entry]:
    return [Entry("transformers", "transformers", name, name in _TRANSFORMERS_CI.split()) for name in _TRANSFORMERS]


def build(entry: Entry, largest: float) -> Case:
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
