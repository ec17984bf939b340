"""What adapters share: packing, scaling of latents, padding, and pipelines put together anew."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_families import build_flux, build_sdxl

from fewstep.errors import FewstepError
from fewstep.models.pipelines import (
    decoded,
    dynamic_shift,
    encoded_images,
    in_batches,
    pack,
    pixels,
    rebuilt,
    stand_in,
    unpack,
    without_padding,
)
from fewstep.models.sizes import Side, check_size


class IdentityVae:
    """An autoencoder whose latents are the images."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, kind: str, shift: float | None) -> None:
        self.kind, self.config = kind, SimpleNamespace(scaling_factor=0.7, shift_factor=shift)

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        law = SimpleNamespace(mode=lambda: images)
        return SimpleNamespace(**{self.kind: law if self.kind == "latent_dist" else images})

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (latents,)


@pytest.mark.parametrize("kind", ["latent_dist", "latents", "latent"])
@pytest.mark.parametrize("shift", [None, 0.06])
def test_what_is_encoded_decodes_to_itself(kind: str, shift: float | None) -> None:
    vae, images = IdentityVae(kind, shift), torch.rand(2, 3, 4, 4) * 2 - 1
    latents = encoded_images(vae, images)
    torch.testing.assert_close(latents, (images - (shift or 0)) * 0.7)
    torch.testing.assert_close(decoded(vae, latents), images)


def test_pixels_are_rounded() -> None:
    made = pixels(torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0]).view(1, 1, 1, 5))
    assert made.flatten().tolist() == [0, 0, 128, 255, 255]
    assert made.dtype == torch.uint8


def test_packing_is_fluxs(tmp_path) -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 8, 12)
    packed = pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    assert torch.equal(unpack(packed, x.shape[1:]), x)


def test_encoding_in_parts_is_encoding_at_once() -> None:
    sizes = []

    def encode(batch: list[str]) -> dict[str, torch.Tensor]:
        sizes.append(len(batch))
        return {"length": torch.tensor([len(prompt) for prompt in batch])}

    prompts = ["x" * n for n in range(150)]
    assert in_batches(encode, prompts)["length"].tolist() == list(range(150))
    assert sizes == [64, 64, 22]


def test_padding_goes_unless_a_row_is_nothing_else() -> None:
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    short, words = without_padding(states, mask)
    assert torch.equal(short, states[:, [0, 2]])
    assert words.tolist() == [[1, 1], [1, 0]]
    assert without_padding(states, mask * torch.tensor([[1], [0]]))[0] is states


def test_the_shift_grows_with_the_image_where_the_scheduler_says_so(tmp_path) -> None:
    scheduler = build_flux(tmp_path).scheduler
    assert dynamic_shift(scheduler, 256) == {"mu": pytest.approx(0.5)}
    assert dynamic_shift(scheduler, 4096) == {"mu": pytest.approx(1.15)}
    assert dynamic_shift(build_flux(tmp_path, told=False).scheduler, 4096) == {}


def test_a_rebuilt_pipeline_keeps_its_options_and_shares_its_parts(tmp_path) -> None:
    """SDXL's zeros for the unconditional input are an option of the pipeline, which an export must not lose."""
    pipeline = build_sdxl(tmp_path)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    other = stand_in(pipeline.unet, lambda *inputs, **named: "asked")
    made = rebuilt(pipeline, unet=other)
    assert made.config.force_zeros_for_empty_prompt is False
    assert made.vae is pipeline.vae
    assert made.unet(1) == "asked"
    assert made.unet.config is pipeline.unet.config
    assert pipeline.unet.forward.__self__ is pipeline.unet  # the real one is as it was


def test_sizes_are_checked() -> None:
    sides = {"height": Side(16, 8), "num_frames": Side(17, 4, 1)}
    check_size(sides, {"height": 24, "num_frames": 1}, "Mine")
    for told, words in [
        ({"width": 8}, "width = 8 for Mine, expected height or num_frames"),
        ({"height": 20}, "height = 20, expected a multiple of 8, fix: height = 16"),
        ({"num_frames": 16}, "multiple of 4 and 1 more"),
        ({"height": -8}, "height = -8"),
    ]:
        with pytest.raises(FewstepError, match=words):
            check_size(sides, told, "Mine")
    with pytest.raises(FewstepError, match="no size"):
        check_size({}, {"height": 8}, "Mine")
