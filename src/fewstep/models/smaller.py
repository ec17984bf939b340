"""Students with fewer weights than the teacher: the teacher's class with fewer layers or narrower ones.

Depth buys speed everywhere, width not on every machine: MSD's students with 42 % fewer parameters in narrower layers
are 7 % faster on a GPU (card `msd.md`, section 5). The embedded teacher on one core (`benchmarks/smaller_students.py`):
half the layers are 55 % of the parameters and 2.0 times as fast, half the heads 26 % and 2.7 times; only the former
begin as parts of the teacher.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.roles import Roles, Seat, build_roles


class OwnStudentRoles(Roles):
    """`roles` with the network `student`, trained in full, in the student's place."""

    def __init__(self, roles: Roles, student: nn.Module) -> None:
        seat = Seat(student.float().requires_grad_(True))
        super().__init__(roles.backbone, roles._teacher, seat, roles._critic, roles._discriminator)
        if roles.sparse is not None:
            assert isinstance(roles.backbone, Backbone)
            roles.backbone.sparse(student, roles.sparse)
            self.sparse = roles.sparse


def build_smaller_roles(
    backbone: Backbone, student: nn.Module, *, checkpointing: bool = False, **options: Any
) -> Roles:
    """Roles of kind "mixed", whose student is `student`, of the teacher's class but another shape.

    Args:
        backbone: the teacher.
        student: what is trained, such as `smaller_network` makes.
        checkpointing: keep only block inputs for the backward pass.
        options: more for `build_roles`; steps-aware students have the teacher's shape.
    """
    if checkpointing:
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    return OwnStudentRoles(build_roles(backbone, "mixed", checkpointing=checkpointing, **options), student)


def smaller_network(network: Any, *, depth: float = 0.5, width: float = 1.0, seed: int = 0) -> nn.Module:
    """A float32 network of the class of `network` with `depth` of its layers and `width` of its attention heads.

    At full width all it shares with `network` is copied, and every other layer or so, first and last among them, so
    that training begins near the teacher; a narrower one begins at random.

    Args:
        network: the teacher's (PixArt's transformer).
        depth: share of the layers, in (0, 1]; at least one is left.
        width: share of the heads, in (0, 1]; at least one is left.
        seed: of the random weights.
    """
    if not (0 < depth <= 1 and 0 < width <= 1):
        raise FewstepError(f"found depth {depth} and width {width}, expected shares in (0, 1], fix: 0.5 is half")
    if type(network).__name__ != "PixArtTransformer2DModel":
        raise FewstepError(
            f"found a {type(network).__name__}, expected PixArtTransformer2DModel, fix: build the smaller network "
            "yourself and seat it with build_smaller_roles"
        )
    layers = max(1, round(depth * network.config.num_layers))
    heads = max(1, round(width * network.config.num_attention_heads))
    config = dict(network.config) | {"num_layers": layers, "num_attention_heads": heads}
    if config["cross_attention_dim"] is not None:
        config["cross_attention_dim"] = heads * config["attention_head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = type(network).from_config(config).float()
    if heads == network.config.num_attention_heads:
        chosen = torch.linspace(0, network.config.num_layers - 1, layers).round().long().tolist()
        small.load_state_dict(_with_layers(network, chosen))
    return small.to(next(network.parameters()).device)


def _with_layers(network: nn.Module, chosen: list[int]) -> dict[str, torch.Tensor]:
    """The state of `network` with only the `chosen` of its transformer blocks, numbered anew."""
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("transformer_blocks.")}
    for new, old in enumerate(chosen):
        block = network.get_submodule(f"transformer_blocks.{old}").state_dict()
        state |= {f"transformer_blocks.{new}.{name}": value for name, value in block.items()}
    return copy.deepcopy(state)
