"""The zoo: torchvision's classifiers, detectors and segmenters, and sequence models, with random weights and inputs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

CLASSIFIERS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t",
    "vgg11_bn", "vit_b_32", "wide_resnet50_2",
)  # fmt: skip
DETECTORS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
OTHERS = ("encoder", "decoder", "lstm", "gru")
TRANSFORMERS = (
    "bert", "distilbert", "gpt2", "t5", "hf_vit", "clip", "whisper", "wav2vec2", "segformer", "detr",
)  # fmt: skip
NAMES = (*CLASSIFIERS, *DETECTORS, *SEGMENTERS, *OTHERS, *TRANSFORMERS)
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class Listed(nn.Module):
    """torchvision's detectors take and give lists: one picture in, its boxes out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> Any:
        return self.inner([image])[0]


class Decoder(nn.Module):
    """A small causal language model: `ids` INT64 [rows, length] to logits FP32 [rows, length, 500]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 128)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 500)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        out: torch.Tensor = self.head(x)
        return out


def subject(name: str) -> tuple[Any, list[str], tuple[Any, ...]]:
    """The module in eval mode, its inputs as the command line spells them, and an input that the search never sees."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(11)
    if name in OTHERS:
        return _sequences(name, draw)
    if name in TRANSFORMERS:
        net, inputs = _transformer(name)
        return net.eval(), inputs, _unseen(inputs, draw)
    from torchvision import models

    if name in DETECTORS:
        net = models.get_model(name, weights=None, weights_backbone=None)
        side = 320 if name.startswith("ssd") else 224
        return Listed(net).eval(), [f"image:FP32[3,{side},{side}]"], (torch.rand(3, side, side, generator=draw),)
    side = {"inception_v3": 299, "maxvit_t": 224, "vit_b_32": 224, "swin_t": 224}.get(name, 160)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"weights_backbone": None} if name in SEGMENTERS else {}
    net = models.get_model(name, weights=None, **options)
    return net.eval(), [f"image:FP32[-1,3,{side},{side}]"], (torch.randn(3, 3, side, side, generator=draw),)


def _sequences(name: str, draw: Any) -> tuple[Any, list[str], tuple[Any, ...]]:
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        net: Any = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        return net.eval(), ["src:FP32[-1,64,128]"], (torch.randn(3, 64, 128, generator=draw),)
    if name == "decoder":
        inputs = ["ids:INT64[-1,length:1..64]"]
        return Decoder().eval(), inputs, (torch.randint(0, 500, (3, 20), generator=draw),)
    kind = nn.LSTM if name == "lstm" else nn.GRU
    net = kind(32, 64, num_layers=2, batch_first=True, bidirectional=name == "lstm")
    return net.eval(), ["input:FP32[-1,24,32]"], (torch.randn(3, 24, 32, generator=draw),)


def _transformer(name: str) -> tuple[Any, list[str]]:
    """A model of Hugging Face's transformers from a small configuration: caches are among its outputs."""
    hub: Any = importlib.import_module("transformers")

    seq = ["input_ids:INT64[-1,seq:4..64]"]
    mask = ["attention_mask:INT64[-1,seq:4..64]"]
    picture = ["pixel_values:FP32[-1,3,64,64]"]
    coder = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    seen = {**_SMALL, "image_size": 64, "patch_size": 16}
    if name == "bert":
        return hub.BertForSequenceClassification(hub.BertConfig(vocab_size=500, **_SMALL)), seq + mask
    if name == "distilbert":
        return hub.DistilBertModel(
            hub.DistilBertConfig(vocab_size=500, dim=64, n_layers=2, n_heads=4, hidden_dim=128)
        ), seq + mask
    if name == "gpt2":
        return hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4)), seq
    if name == "t5":
        config = hub.T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        return hub.T5ForConditionalGeneration(config), [*seq, *mask, "decoder_input_ids:INT64[-1,said:1..32]"]
    if name == "hf_vit":
        return hub.ViTForImageClassification(hub.ViTConfig(**seen)), picture
    if name == "clip":
        text = {**_SMALL, "vocab_size": 500, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
        fixed = [spec.replace("seq:4..64", "12") for spec in seq + picture + mask]
        return hub.CLIPModel(hub.CLIPConfig(text_config=text, vision_config=seen, projection_dim=32)), fixed
    if name == "whisper":
        lengths = {"max_source_positions": 50, "max_target_positions": 40, "num_mel_bins": 16, "vocab_size": 500}
        net = hub.WhisperForConditionalGeneration(hub.WhisperConfig(**coder, **heads, **ends, **lengths))
        return net, ["input_features:FP32[-1,16,100]", "decoder_input_ids:INT64[-1,said:1..40]"]
    if name == "wav2vec2":
        body = {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "vocab_size": 30}
        wide = {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        return hub.Wav2Vec2ForCTC(hub.Wav2Vec2Config(**_SMALL, **body, **wide)), [
            "input_values:FP32[-1,samples:2000..32000]"
        ]
    if name == "segformer":
        config = hub.SegformerConfig(num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16, num_labels=5, **stages)
        return hub.SegformerForSemanticSegmentation(config), picture
    bones = hub.ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage4"], **stages)
    none = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 10}
    return hub.DetrForObjectDetection(hub.DetrConfig(**none, backbone_config=bones, **coder, **heads)), picture


def _unseen(inputs: list[str], draw: Any) -> tuple[Any, ...]:
    """Three rows that the search does not see, with 20 for every free length; masks are ones."""
    found = []
    for text in inputs:
        name, _, rest = text.partition(":")
        kind, _, axes = rest.rstrip("]").partition("[")
        shape = [3] + [int(axis) if axis.isdigit() else 4000 if "000" in axis else 20 for axis in axes.split(",")[1:]]
        ids = torch.randint(3, 500, shape, generator=draw) if "mask" not in name else torch.ones(shape).long()
        found.append(torch.randn(shape, generator=draw) if kind == "FP32" else ids)
    return tuple(found)


def calibration(name: str) -> list[tuple[Any, ...]]:
    """A few batches of random inputs for quantizers."""
    _, _, unseen = subject(name)
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(6):
        drawn = [
            torch.randn(tensor.shape, generator=draw)
            if tensor.is_floating_point()
            else tensor  # a mask of ones
            if bool((tensor == 1).all())
            else torch.randint(0, 500, tensor.shape, generator=draw)
            for tensor in unseen
        ]
        found.append(tuple(tensor.abs().clamp(max=1) if name in DETECTORS else tensor for tensor in drawn))
    return found
