"""Sparse attention against dense: error and time by sparsity and engine: `python benchmarks/sparse_attention.py`.

One call of self-attention on made-up queries, keys and values that are smooth over the grid of tokens, as those of
pictures and videos are. Rows are settings, from few blocks to all; times are of one forward / of forward and backward,
on the CPU as time of the process, on a GPU by events. The GPU's sizes are those of published networks:

    python benchmarks/sparse_attention.py --device cuda --sizes wan-1.3b cogvideox-5b
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from fewstep.attention.sparse import SparseOptions, sparse_attention
from fewstep.attention.sparse.adaptive import Sequence
from fewstep.attention.sparse.choosing import importance, sampled, seen_blocks
from fewstep.attention.sparse.order import gilbert

SHARES = (0.05, 0.1, 0.17, 0.3, 0.5, 1.0)
MASSES = (0.5, 0.8, 0.9, 0.95)
CORRELATION, NOISE, ALIKE, SHARPNESS = 4, 0.5, 0.6, 2.0
"""Tokens over which fields are smooth, what each token has of its own, how much keys are like queries (tokens look at
those that are alike, many of them near), and the scale of scores."""


@dataclass(frozen=True)
class Size:
    """Of one call."""

    grid: tuple[int, int, int]
    text: int
    heads: int
    width: int
    block: int
    samples: int
    window: int


SIZES = {
    "small": Size((6, 16, 20), 32, 2, 64, 64, 16, 16),
    "wan-1.3b": Size((21, 30, 52), 0, 12, 128, 128, 32, 30),
    "cogvideox-5b": Size((13, 30, 45), 226, 48, 64, 128, 32, 15),
}


def fields(size: Size, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values (1, H, N, D), the sample's tokens first."""
    numbers, parts = torch.Generator().manual_seed(0), []
    coarse = [-(-side // CORRELATION) + 1 for side in size.grid]
    for _ in range(3):
        smooth = interpolate(
            torch.randn(1, size.heads * size.width, *coarse, generator=numbers), size.grid, mode="trilinear"
        )
        video = smooth.view(1, size.heads, size.width, -1).mT / smooth.std()
        text = torch.randn(1, size.heads, size.text, size.width, generator=numbers)
        whole = torch.cat([video + NOISE * torch.randn(video.shape, generator=numbers), text], 2)
        parts.append(whole.to(device, dtype))
    query, key, value = parts
    key = ALIKE * query + (1 - ALIKE**2) ** 0.5 * key
    return [SHARPNESS**0.5 * query, SHARPNESS**0.5 * key, value]


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The least of `repeats`, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(repeats):
        if device == "cpu":
            start = time.process_time()
            call()
            best = min(best, time.process_time() - start)
            continue
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        best = min(best, start_event.elapsed_time(end_event) / 1000)
    return best


def timed(attend: Callable[..., Tensor], parts: list[Tensor], device: str, repeats: int) -> tuple[float, float]:
    """Milliseconds of a forward, and of forward and backward."""

    def both() -> None:
        trained = [part.detach().requires_grad_() for part in parts]
        attend(*trained).sum().backward()

    with torch.no_grad():
        forward = seconds(lambda: attend(*parts), device, repeats)
    return 1000 * forward, 1000 * seconds(both, device, repeats)


def settings(size: Size) -> dict[str, SparseOptions]:
    """By name: shares of blocks without and with global tokens, row by row, and shares of importance."""
    usual = SparseOptions(kind="asa", block=size.block, samples=size.samples, mass=1.0, least=0.0, window=size.window)
    rows = {f"{share:.0%} of blocks": replace(usual, most=share) for share in SHARES}
    rows |= {f"{share:.0%}, global tokens": replace(usual, kind="asa-gt", most=share) for share in SHARES[:4]}
    rows |= {f"{share:.0%}, row by row": replace(usual, order="raster", most=share) for share in SHARES[:4]}
    return rows | {f"{mass:.0%} of importance": replace(usual, mass=mass, most=1.0) for mass in MASSES}


def sparsity(parts: list[Tensor], size: Size, options: SparseOptions) -> tuple[float, float]:
    """Share of pairs of blocks of the sample's tokens that is left out, and of rows in which `most` decided."""
    visual = size.grid[0] * size.grid[1] * size.grid[2]
    order = gilbert(size.grid) if options.order == "gilbert" else torch.arange(visual)
    query, key = (part[:, :, :visual][:, :, order.to(part.device)] for part in parts[:2])
    shares = importance(query, key, size.block, sampled(0, size.heads, size.block, size.samples))
    seen = seen_blocks(shares, options.mass, options.least, options.most)
    bound = (seen != seen_blocks(shares, options.mass, options.least)).any(-1)
    return 1 - float(seen.double().mean()), float(bound.double().mean())


def measured(name: str, device: str, engines: list[str], repeats: int) -> list[dict[str, object]]:
    """A row for each setting, the first one dense."""
    size, rows = SIZES[name], []
    parts = fields(size, device, torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.no_grad():
        exact = scaled_dot_product_attention(*parts).float()
    dense = timed(scaled_dot_product_attention, parts, device, repeats)
    rows.append({"setting": "dense", "sparsity": 0.0, "bound": 0.0, "error": 0.0, "dense": dense})
    for setting, options in settings(size).items():
        left_out, bound = sparsity(parts, size, options)
        row: dict[str, object] = {"setting": setting, "sparsity": left_out, "bound": bound}
        for engine in engines:
            told = replace(options, engine=engine)  # type: ignore[arg-type]

            def attend(*three: Tensor, told: SparseOptions = told) -> Tensor:
                return sparse_attention(*three, Sequence(size.grid, False), told)

            with torch.no_grad():
                error = (attend(*parts).float() - exact).norm() / exact.norm()
            row["error"] = float(error)
            if options.order == "gilbert":
                row[engine] = timed(attend, parts, device, repeats)
        rows.append(row)
        print(json.dumps({"size": name, **row}), flush=True)
    return rows


def table(name: str, rows: list[dict[str, object]], engines: list[str]) -> str:
    """Markdown."""
    size = SIZES[name]
    tokens = size.grid[0] * size.grid[1] * size.grid[2] + size.text
    heads = ["setting", "sparsity", "rows at most", "error", *(f"{engine}, ms" for engine in ("dense", *engines))]
    about = ", ".join(f"{key} {value}" for key, value in asdict(size).items())
    lines = [f"{name}: {tokens} tokens ({about})", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [str(row["setting"]), *(f"{row[key]:.3f}" for key in ("sparsity", "bound", "error"))]
        for engine in ("dense", *engines):
            found = row.get(engine)
            cells.append("" if found is None else "{:.1f} / {:.1f}".format(*found))  # type: ignore[misc]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sizes, print tables, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small"])
    parser.add_argument("--engines", nargs="+", choices=("flex", "gathered", "masked"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file of the rows")
    args = parser.parse_args()
    engines = args.engines or (["gathered", "masked"] if args.device == "cpu" else ["flex"])
    found = {name: measured(name, args.device, engines, args.repeats) for name in args.sizes}
    for name, rows in found.items():
        print("\n" + table(name, rows, engines))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
