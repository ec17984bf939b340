"""Pipelines of every image family with tiny random parts, written to a folder as their releases are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PROMPTS = ["a frog", "a red apple on blue"]
SIZE = 16
"""Side of the images in pixels, except Sana's, which are 32."""


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters, from the two files that the released ones have too."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_encoder(projection: bool = False, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=77,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def word_tokenizer(bos: bool = False) -> Any:
    """A tokenizer of whole words, in the place of SentencePiece's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "<bos>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, special = ("<bos> $A", ("<bos>", 3)) if bos else ("$A </s>", ("</s>", 1))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>"
    )


def t5_encoder(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=20, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False,
        use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        scaling_factor=0.7, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    ).eval()  # fmt: skip


def unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    defaults = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": SIZE // 2, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(**defaults | config).eval()


def schedule(kind: str, **more: Any) -> Any:
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(**betas, **more)


def build_sd15(files: Path, *, prediction: str = "epsilon", scheduler: Any = None, **network: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    own = schedule(
        "DDIMScheduler", clip_sample=False, set_alpha_to_one=True, steps_offset=1, prediction_type=prediction
    )
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(files), unet=unet(**network),
        scheduler=scheduler or own, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sdxl(files: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    network = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(), text_encoder_2=clip_encoder(True), unet=network,
        tokenizer=clip_tokenizer(files), tokenizer_2=clip_tokenizer(files), add_watermarker=False,
        scheduler=schedule("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def build_sd3(files: Path, **network: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=40, pooled_projection_dim=32,
        pos_embed_max_size=8, **network,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(0.06),
        text_encoder=clip_encoder(True), tokenizer=clip_tokenizer(files), text_encoder_2=clip_encoder(True),
        tokenizer_2=clip_tokenizer(files), text_encoder_3=t5_encoder(40), tokenizer_3=word_tokenizer(),
    )  # fmt: skip


def build_sd35(files: Path) -> Any:
    return build_sd3(files, qk_norm="rms_norm", dual_attention_layers=(0,))


def build_flux(files: Path, *, told: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=told,
    )  # fmt: skip
    shifting = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        transformer=transformer.eval(), vae=autoencoder(0.06), text_encoder=clip_encoder(), text_encoder_2=t5_encoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(shifting if told else {})),
        tokenizer=clip_tokenizer(files), tokenizer_2=word_tokenizer(),
    )  # fmt: skip


def build_schnell(files: Path) -> Any:
    return build_flux(files, told=False)


def build_sana(files: Path) -> Any:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), scaling_factor=0.41,
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=3,
        )
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=word_tokenizer(bos=True), text_encoder=encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def build_pixart(files: Path, *, sigma: bool = False) -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
    from tiny_pixart import build_pipeline

    pipeline = build_pipeline()
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(**pipeline.components)


def build_pixart_sigma(files: Path) -> Any:
    return build_pixart(files, sigma=True)


def guided_by_scale(scale: float) -> dict[str, Any]:
    return {"guidance_scale": scale}


@dataclass(frozen=True)
class Family:
    """How one family's stock pipeline is built and called."""

    build: Callable[[Path], Any]
    adapter: str
    guided: Callable[[float], dict[str, Any]] = guided_by_scale
    """Guidance scale -> arguments of the pipeline's call."""
    call: dict[str, Any] = field(default_factory=dict)
    """More arguments of every call."""
    size: dict[str, int] = field(default_factory=dict)
    """What `load_teacher` has to be told, where the stock size is too large for a test."""


def _true_guidance(scale: float) -> dict[str, Any]:
    return {"true_cfg_scale": scale, "negative_prompt": "", "guidance_scale": 3.5}


_SQUARE = {"height": SIZE, "width": SIZE}
_UNBINNED = {"use_resolution_binning": False}
FAMILIES = {
    "pixart-alpha": Family(build_pixart, "PixArt", call=_UNBINNED),
    "pixart-sigma": Family(build_pixart_sigma, "PixArt", call=_UNBINNED),
    "sd15": Family(build_sd15, "StableDiffusion"),
    "sdxl": Family(build_sdxl, "StableDiffusionXL"),
    "sd3": Family(build_sd3, "StableDiffusion3"),
    "sd35": Family(build_sd35, "StableDiffusion3"),
    "flux-dev": Family(build_flux, "Flux", _true_guidance, _SQUARE, _SQUARE),
    "flux-schnell": Family(build_schnell, "Flux", _true_guidance, _SQUARE, _SQUARE),
    "sana": Family(build_sana, "Sana", call={"height": 32, "width": 32} | _UNBINNED),
}


def save(family: str, folder: Path) -> Path:
    """The family's tiny pipeline in `folder`/`family`."""
    torch.manual_seed(0)
    FAMILIES[family].build(folder / "files").save_pretrained(folder / family)
    return folder / family
