"""Size and speed of the comparison page: `python benchmarks/page.py [--prompts 12 2000]`.

Pages of painted pictures, opened in a headless Chromium (playwright and /usr/bin/chromium, or `--chromium`); prints the
table of docs/compare.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from fewstep.evaluation.page import write_page
from fewstep.evaluation.pictures import Candidate

CANDIDATES = {"teacher, 50 steps": 100, "teacher, 4 steps": 8, "student, 4 steps": 4, "student, 1 step": 1}
LEAF = "get('leaves').querySelector('[data-leaf=last]').click()"
SEARCH = "get('find').value='1999';get('find').dispatchEvent(new Event('input'))"


def painted(count: int, side: int, seed: int) -> torch.Tensor:
    """Smooth coloured gradients with a little noise, uint8 (count, 3, side, side)."""
    numbers = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 3, 2, 2, generator=numbers)
    smooth = torch.nn.functional.interpolate(corners, side, mode="bilinear", align_corners=True)
    return ((smooth + 0.02 * torch.randn(smooth.shape, generator=numbers)).clamp(0, 1) * 255).byte()


def make(folder: Path, count: int, side: int) -> Path:
    """A page of `count` prompts."""
    candidates = [
        Candidate(name, painted(count, side, seed), calls, 0.01 * calls, {}, {"steps": calls})
        for seed, (name, calls) in enumerate(CANDIDATES.items())
    ]
    return write_page(
        folder / f"{count}.html", title="Painted", subtitle=f"{count} prompts", candidates=candidates,
        prompts=[f"a picture no. {n}" for n in range(count)], seeds=list(range(count)), runs={}, histograms={},
        value_labels={}, settings={}, notes=[],
    )  # fmt: skip


def measure(page: Path, chromium: str) -> list[str]:
    """Seconds to first paint, first pictures, whole file; with many prompts also milliseconds of a leaf, a search."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector("#grid article img[src]")
        pictures = time.perf_counter() - start
        tab.wait_for_load_state("load")
        read = time.perf_counter() - start
        paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
        drawn = "await new Promise(r=>requestAnimationFrame(()=>setTimeout(r)))"
        timed = f"async()=>{{const t=performance.now();%s;{drawn};return performance.now()-t}}"
        there = tab.evaluate("!!get('leaves').querySelector('[data-leaf=last]')")
        acts = [f"{tab.evaluate(timed % act):.0f} ms" if there else "-" for act in (LEAF, SEARCH)]
        browser.close()
    return [f"{paint:.1f} s", f"{pictures:.1f} s", f"{read:.1f} s", *acts]


def main() -> None:
    """Make and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[12, 2000])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    print("| prompts | file | first contentful paint | first pictures | whole file read | another leaf | search |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.prompts:
            page = make(Path(folder), count, args.side)
            size = f"{page.stat().st_size / 1e6:.1f} MB"
            print("| " + " | ".join([f"{count:,}", size, *measure(page, args.chromium)]) + " |", flush=True)


if __name__ == "__main__":
    main()
