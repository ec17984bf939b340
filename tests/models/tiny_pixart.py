"""A PixArt pipeline with random weights, in the shape of the embedded teacher but a hundred times smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]


def build_pipeline(*, learned_sigma: bool = True, sample_size: int = 8, heads: int = 2, image_size: bool = False):
    """PixArtAlphaPipeline: latents 4 x sample_size^2, 2 layers, 16 a head, random weights; images 4 times as wide."""
    from diffusers import AutoencoderTiny, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False,
            use_cache=False, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=16, num_layers=2, cross_attention_dim=16 * heads, in_channels=4,
        out_channels=8 if learned_sigma else 4, sample_size=sample_size, patch_size=2, caption_channels=16,
        use_additional_conditions=image_size,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4, scaling_factor=0.7,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    return PixArtAlphaPipeline(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder,
        vae,
        transformer,
        scheduler,
    )


def perturb(parameters: list[nn.Parameter], seed: int = 0, scale: float = 0.05) -> None:
    """As if trained: every parameter moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def assert_latents_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest latent: random networks make latents of several hundred."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
