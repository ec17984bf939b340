"""Tiny pipelines with random weights of Qwen-Image, Z-Image, CogVideoX, Wan and the embedded video teacher."""

from __future__ import annotations

from typing import Any

import torch

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]


def tokenizer(words: str = "", chat: str | None = None) -> Any:
    """A vocabulary of the prompts' words, those of `words`, and padding; texts end in </s> unless for a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    known = {word for text in [*PROMPTS, words] for word, _ in split.pre_tokenize_str(text)}
    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(known)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = split
    if chat is None:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=chat
    )


def t5(kind: str, words: Any) -> Any:
    import transformers

    config = getattr(transformers, kind.replace("EncoderModel", "Config"))(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False,
        use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    words = tokenizer("Describe the image by detailing the color, shape: user assistant <|im_start|>", chat="")
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": len(words), "rope_theta": 1e6,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            },
        )
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=6, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler, vae, encoder, words, transformer)


def z_image() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    chat = "{% for message in messages %}user {{ message['content'] }}{% endfor %} assistant"
    words = tokenizer("user assistant", chat=chat)
    encoder = Qwen3Model(
        Qwen3Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, vocab_size=len(words),
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # empty in a new network, not in a trained one
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4,
        block_out_channels=[8, 8], latent_channels=4, scaling_factor=0.36, shift_factor=0.12,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoder, words, transformer)


def cogvideox(kind: str = "2b") -> Any:
    """Of the kind "2b" (fixed positions, shifted noise), "5b" (rotary positions) or "1.5" (patches in time)."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    words = tokenizer()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=12,
        use_rotary_positional_embeddings=kind != "2b", patch_size_t=2 if kind == "1.5" else None,
        patch_bias=kind != "1.5",
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 3, up_block_types=["CogVideoXUpBlock3D"] * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, scaling_factor=0.7,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        snr_shift_scale=3.0 if kind == "2b" else 1.0,
    )  # fmt: skip
    return CogVideoXPipeline(words, t5("T5EncoderModel", words), vae, transformer, scheduler)


def wan(kind: str = "2.1") -> Any:
    """Of the kind "2.1", "a14b" (two networks) or "5b" (a time for each token)."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    words = tokenizer()

    def transformer() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    )  # fmt: skip
    return WanPipeline(
        words, t5("UMT5EncoderModel", words), vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer(),
        transformer_2=transformer() if kind == "a14b" else None, boundary_ratio=0.875 if kind == "a14b" else None,
        expand_timesteps=kind == "5b",
    )  # fmt: skip


def film() -> Any:
    """As the embedded video teacher: each frame is a latent."""
    from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from fewstep.models.film import FilmPipeline
    from fewstep.models.tracks import TrackHead

    torch.manual_seed(0)
    words, head = tokenizer(), TrackHead(3)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4 + head.width, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3, latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FilmPipeline(words, t5("UMT5EncoderModel", words), vae, scheduler, transformer, head)
