"""Feature spaces and scores on tiny random networks of the classes that the released ones have."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_judges import MEAN, STD, write_clip, write_dinov2

from fewstep.errors import FewstepError
from fewstep.evaluation import inception
from fewstep.evaluation.inception import Inception, resized
from fewstep.evaluation.scores import load_score
from fewstep.evaluation.spaces import Preparation, load_space

PROMPTS = ["a frog", "a pizza", "a very long prompt about very many things"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), head=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    small = torch.randint(0, 256, (3, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return small.repeat_interleave(6, 2).repeat_interleave(6, 3)  # 36 x 48


def test_images_are_prepared_as_by_pillow(images: Tensor) -> None:
    made = Preparation(20, 16, tuple(MEAN), tuple(STD))(images)
    for image, found in zip(images, made, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((26, 20), Image.Resampling.BICUBIC)
        values = np.asarray(picture)[2:18, 5:21].astype(np.float32) / 255
        wanted = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        assert float((found.permute(1, 2, 0) - torch.from_numpy(wanted)).abs().max()) < 1.5 / 255 / min(STD)


def test_dinov2_is_the_class_token(tmp_path: Path, images: Tensor) -> None:
    from transformers import Dinov2Model

    name, embed = load_space(f"dinov2={write_dinov2(tmp_path)}")
    features = embed(images)
    assert (name, features.shape) == ("dinov2", (3, 16))
    network = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = network(Preparation.of(str(tmp_path))(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


def test_clip_scores_are_those_of_its_own_forward(clip: Path, images: Tensor) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    told = tokenizer(PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        out = network(pixel_values=Preparation.of(str(clip))(images), **told)
    logits = out.logits_per_image.diagonal()
    cosine = logits / network.logit_scale.exp()
    for name, wanted in (("clip", 100 * cosine.clamp(min=0)), ("pickscore", logits), ("hpsv2.1", 100 * cosine)):
        torch.testing.assert_close(load_score(f"{name}={clip}")[1](images, PROMPTS), wanted, rtol=1e-3, atol=1e-3)
    features = load_space(f"clip={clip}")[1](images)
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=1), out.image_embeds, rtol=1e-4, atol=1e-5)
    head = load_file(clip / "head.safetensors")
    wanted = (out.image_embeds @ head["layers.0.weight"].T + head["layers.0.bias"]) @ head["layers.2.weight"].T
    found = load_score(f"aesthetic={clip}")[1](images, PROMPTS)
    torch.testing.assert_close(found, wanted[:, 0] + head["layers.2.bias"], rtol=1e-4, atol=1e-4)


def test_the_judge_takes_its_own_scenes_only(images: Tensor) -> None:
    _, embed = load_space("judge")
    assert embed(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 128)
    with pytest.raises(FewstepError, match="48x36 for the judge"):
        embed(images)


@pytest.mark.parametrize(
    ("load", "spec", "expected"),
    [
        (load_space, "moon", "found feature space 'moon', expected one of judge, clip, dinov2, inception"),
        (load_space, "judge=here", "expected no source"),
        (load_space, "dinov2=/nowhere/at/all", "found no usable Dinov2Model at /nowhere/at/all"),
        (load_space, "inception", "pt_inception-2015-12-05"),
        (load_score, "moon", "expected one of clip, pickscore, hpsv2.1, aesthetic, imagereward"),
        (load_score, "clip=/nowhere/at/all", "found no usable CLIPModel"),
        (load_score, "hpsv2.1", r"HPS_v2\.1_compressed\.pt"),
        (load_score, "aesthetic", r"sac\+logos\+ava1-l14-linearMSE\.pth"),
        (load_score, "imagereward", r"ImageReward\.pt"),
    ],
)
def test_missing_weights_are_named(load: object, spec: str, expected: str) -> None:
    with pytest.raises(FewstepError, match=expected):
        load(spec)  # type: ignore[operator]


def test_pickled_weights_are_refused(clip: Path, tmp_path: Path) -> None:
    for path in clip.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FewstepError, match="safetensors"):
        load_space(f"clip={tmp_path}")


def test_inception_has_the_published_shape_and_refuses_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception()
    assert sum(p.numel() for p in network.parameters()) == 21_785_568  # Inception-v3 without classifiers
    tensors = dict(network.state_dict())
    save_file(tensors, tmp_path / "inception.safetensors")
    features = load_space(f"inception={tmp_path / 'inception.safetensors'}")[1](torch.zeros(1, 3, 20, 30).byte())
    assert features.shape == (1, inception.FEATURES)
    tensors.pop("Mixed_7c.branch_pool.conv.weight")
    save_file(tensors, tmp_path / "torn.safetensors")
    with pytest.raises(FewstepError, match="Mixed_7c"):
        Inception.load(tmp_path / "torn.safetensors")


def test_images_are_resized_the_way_of_tensorflow_1() -> None:
    ramp = torch.arange(4.0).expand(1, 3, 2, 4)
    assert resized(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resized(ramp, 2)[0, 0, 0].tolist() == [0, 2]
