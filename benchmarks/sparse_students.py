"""Sparse attention trained by TDM against the same mask put on afterwards: `python benchmarks/sparse_students.py`.

A known law of 32 tokens: six patterns, each of one random number a token, and noise. Which pattern it is shows in all
tokens together, so that a token that sees a quarter of them has to be told by the others. A small transformer is fitted
to the exact teacher, and is then distilled to four calls with dense and with sparse attention, the critic always dense.
Printed is the sliced Wasserstein distance of each student to the data; two sets of data are as far apart as the first
line says. About a minute of one core.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewstep.attention.sparse import SparseOptions, sparse_attention
from fewstep.attention.sparse.adaptive import Sequence
from fewstep.core.process import Flow
from fewstep.core.solvers import ddim
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import MixtureTeacher
from fewstep.evaluation.metrics import sliced_wasserstein
from fewstep.evaluation.toy import distil
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

GRID, TOKENS, PATTERNS, WIDTH, HEADS, LAYERS = (2, 4, 4), 32, 6, 32, 2, 2
SAMPLES = 8192
ASA = SparseOptions(kind="asa", block=4, samples=2, mass=1.0, least=0.0, most=0.25)
ASA_GT = replace(ASA, kind="asa-gt", window=4)
OPTIONS = TDMOptions(
    steps=4, guidance_scale=1.0, normaliser="none", loss_on="landing", critic_weight="inverse_sigma", margin=0.02
)


class Transformer(nn.Module):
    """A denoiser of (B, 32) numbers; `options` say what its attention sees."""

    def __init__(self) -> None:
        super().__init__()
        self.options: SparseOptions | None = None
        self.place = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH))
        self.entry = nn.Linear(10, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.exit = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t.to(x.dtype)[:, None]
        angles = time * torch.pi * 2.0 ** torch.arange(4)
        told = torch.cat([time, angles.sin(), angles.cos()], 1)[:, None].expand(-1, TOKENS, -1)
        states = self.entry(torch.cat([x[:, :, None], told], 2)) + self.place
        for layer in range(LAYERS):
            parts = self.qkv[layer](self.norms[2 * layer](states)).chunk(3, 2)
            query, key, value = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
            if self.options is None:
                seen = scaled_dot_product_attention(query, key, value)
            else:
                seen = sparse_attention(query, key, value, Sequence(GRID, False), self.options, layer)
            states = states + self.out[layer](seen.transpose(1, 2).flatten(2))
            states = states + self.feed[layer](self.norms[2 * layer + 1](states))
        gain, offset = self.exit(self.norms[-1](states)).unbind(2)
        return gain * x + offset


def law() -> MixtureTeacher:
    """The data and their exact denoiser."""
    means = torch.randn(PATTERNS, TOKENS, generator=torch.Generator().manual_seed(0)).sign()
    spread = (0.2**2 * torch.eye(TOKENS)).expand(PATTERNS, TOKENS, TOKENS)
    return MixtureTeacher(Flow(), 1.0 + torch.arange(PATTERNS) % 3, means, spread)


def fitted(teacher: MixtureTeacher, iterations: int) -> Transformer:
    """A dense network that answers as the exact teacher does."""
    torch.manual_seed(0)
    network, numbers = Transformer(), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        clean, t = teacher.sample(128, numbers), torch.rand(128, generator=numbers).clamp(0.01, 1)
        x = (1 - t)[:, None] * clean + t[:, None] * torch.randn(clean.shape, generator=numbers)
        adam.zero_grad()
        (network(x, t, {}) - teacher(x, t, {})).square().mean().backward()
        adam.step()
        schedule.step()
    return network


def trained(teacher: MixtureTeacher, start: Transformer, sparse: SparseOptions | None, iterations: int) -> Transformer:
    """A four-step student."""
    student, critic = copy.deepcopy(start), copy.deepcopy(start)
    student.options = sparse
    distil(
        TDM(OPTIONS), teacher, student, critic,
        iterations=iterations, batch=96, student_rate=5e-4, critic_rate=2e-3, average=0.97,
    )  # fmt: skip
    return student


def masked(student: Transformer, sparse: SparseOptions) -> Transformer:
    """The same weights under a mask."""
    twin = copy.deepcopy(student)
    twin.options = sparse
    return twin


@torch.no_grad()
def distance(student: Transformer, data: Tensor) -> float:
    """Of the student's samples to the data."""
    noise = torch.randn(len(data), TOKENS, generator=torch.Generator().manual_seed(2))
    return sliced_wasserstein(ddim(student, noise, OPTIONS.time_grid(4), Flow(), {}), data, 128)


def main() -> None:
    """Train and print, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=700, help="iterations of the fit to the exact teacher")
    parser.add_argument("--iterations", type=int, default=250, help="iterations of TDM")
    args = parser.parse_args()
    teacher = law()
    data, others = (teacher.sample(SAMPLES, torch.Generator().manual_seed(seed)) for seed in (3, 4))

    def told(what: str, value: float) -> None:
        print(f"| {what} | {value:.4f} |", flush=True)

    told("data against other data", sliced_wasserstein(others, data, 128))
    start = fitted(teacher, args.fit)
    told("fitted network, 4 calls, dense", distance(start, data))
    for name, sparse in (("asa", ASA), ("asa-gt", ASA_GT)):
        told(f"fitted network, 4 calls, {name}, training-free", distance(masked(start, sparse), data))
    dense = trained(teacher, start, None, args.iterations)
    told("TDM, dense", distance(dense, data))
    for name, sparse in (("asa", ASA), ("asa-gt", ASA_GT)):
        told(f"TDM, dense, then {name} put on", distance(masked(dense, sparse), data))
        told(f"TDM with {name}", distance(trained(teacher, start, sparse, args.iterations), data))


if __name__ == "__main__":
    main()
