"""Block-sparse attention: its identities in float64, what is chosen, and engines that are equal to one another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as dense

from fewstep.attention.sparse import SparseOptions, sparse_attention
from fewstep.attention.sparse.adaptive import Sequence, pooled
from fewstep.attention.sparse.choosing import importance, sampled, seen_blocks
from fewstep.attention.sparse.engines import ENGINES, Coarse, chosen_engine
from fewstep.attention.sparse.order import Grid, gilbert, inverse
from fewstep.errors import FewstepError

BLOCK, WINDOW = 8, 4
GRID = (3, 5, 4)
TEXT = 7
TRAINED = ("gathered", "masked")
"""Engines that have a backward on the CPU."""


def random(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D)."""
    numbers = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, *shape, generator=numbers, dtype=torch.float64)
    return 2 * query, key, value


def options(kind: str = "asa", **more: object) -> SparseOptions:
    usual = {"block": BLOCK, "samples": 4, "mass": 0.8, "least": 0.0, "most": 1.0, "engine": "masked"}
    return SparseOptions(kind=kind, **{**usual, "window": WINDOW if kind == "asa-gt" else 30, **more})  # type: ignore[arg-type]


def some_seen(blocks: int, seed: int = 0) -> Tensor:
    """A map (2, 3, n, n) of rows that see different numbers of blocks, and one that sees all."""
    seen = torch.rand(2, 3, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    seen[..., range(blocks), range(blocks)] = True
    seen[:, 1, -1] = True
    return seen


def explicit(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, coarse: Coarse | None) -> Tensor:
    """Card blade.md, section 2, as two branches: fine and coarse attention, merged by their log-sum-exps."""
    tokens = torch.arange(query.shape[2]) // BLOCK
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~seen[:, :, tokens][:, :, :, tokens], -torch.inf)
    fine, fine_mass = scores.softmax(-1) @ value, scores.logsumexp(-1, keepdim=True)
    if coarse is None:
        return fine
    scores = query @ coarse.key.mT / math.sqrt(query.shape[-1]) + coarse.bias
    share = torch.sigmoid(fine_mass - scores.logsumexp(-1, keepdim=True))
    return share * fine + (1 - share) * (scores.softmax(-1) @ coarse.value)


# Engines


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "with_coarse", "tokens"), [*product(TRAINED, (False, True), (48, 45)), ("flex", True, 45)]
)
def test_an_engine_is_the_formula(name: str, with_coarse: bool, tokens: int) -> None:
    """Also the two-branch form is the joint softmax, for any map, and a last block is not full."""
    query, key, value = random(2, 3, tokens, 16)
    coarse = pooled(key, value, WINDOW) if with_coarse else None
    seen = some_seen(-(-tokens // BLOCK))
    got = ENGINES[name](query, key, value, seen, BLOCK, coarse)
    torch.testing.assert_close(got, explicit(query, key, value, seen, coarse), rtol=0, atol=1e-12)
    assert (got - dense(query, key, value)).abs().max() > 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """Those of the global branch's weight included, which the release leaves out."""
    seen = some_seen(6)

    def gradients(attend: object) -> list[Tensor]:
        parts = [part.requires_grad_() for part in random(2, 3, 45, 16)]
        coarse = pooled(parts[1], parts[2], WINDOW)
        more = () if attend is explicit else (BLOCK,)
        output = attend(*parts, seen, *more, coarse)  # type: ignore[operator]
        return list(torch.autograd.grad((output * torch.linspace(-1, 1, 16)).sum(), parts))

    for got, expected in zip(gradients(ENGINES[name]), gradients(explicit), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TRAINED)
def test_the_whole_operation_has_its_numeric_gradient(name: str) -> None:
    parts = [part.requires_grad_() for part in random(1, 1, 11, 2)]
    seen = some_seen(2)[:1, :1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ENGINES[name](query, key, value, seen, BLOCK, pooled(key, value, WINDOW))

    assert torch.autograd.gradcheck(attend, parts)


def test_the_engine_follows_from_device_length_and_block() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [chosen_engine("auto", cpu, tokens, 128) for tokens in (1024, 1025)] == ["masked", "gathered"]
    assert [chosen_engine("auto", gpu, 1024, block) for block in (128, 64)] == ["flex", "masked"]
    with pytest.raises(FewstepError, match="found FlexAttention for blocks of 128 tokens on cpu"):
        chosen_engine("flex", cpu, 1024, 128)


# Known answers of the whole


@pytest.mark.parametrize("engine", TRAINED)
@pytest.mark.parametrize("text_first", [False, True])
def test_nothing_left_out_is_dense(engine: str, text_first: bool) -> None:
    query, key, value = random(2, 3, math.prod(GRID) + TEXT, 16)
    whole = options(mass=1.0, engine=engine)
    got = sparse_attention(query, key, value, Sequence(GRID, text_first), whole)
    torch.testing.assert_close(got, dense(query, key, value), rtol=0, atol=1e-12)
    less = sparse_attention(query, key, value, Sequence(GRID, text_first), options(engine=engine))
    assert (less - dense(query, key, value)).abs().max() > 0.01


def along_the_curve(grid: Grid, values: Tensor) -> Tensor:
    """`values` (B, H, N, D), which follow the curve, as tokens in their own order."""
    return values[:, :, inverse(gilbert(grid))]


def test_global_tokens_of_equal_keys_are_dense() -> None:
    """Keys that are the same within a window: the global branch alone is exact, and so is its sum with a full map."""
    query, key, value = random(1, 2, math.prod(GRID), 16)
    constant = key[:, :, ::WINDOW].repeat_interleave(WINDOW, 2)
    coarse = pooled(constant, value, WINDOW)
    alone = dense(query, coarse.key, coarse.value, attn_mask=coarse.bias.expand(query.shape[2], -1))
    torch.testing.assert_close(alone, dense(query, constant, value), rtol=0, atol=1e-12)
    whole, sequence = options("asa-gt", mass=1.0), Sequence(GRID, False)
    parts = [along_the_curve(GRID, part) for part in (query, constant, value)]
    torch.testing.assert_close(sparse_attention(*parts, sequence, whole), dense(*parts), rtol=0, atol=1e-12)
    parts[1] = along_the_curve(GRID, key)  # of other keys it is counted twice, as published
    assert (sparse_attention(*parts, sequence, whole) - dense(*parts)).abs().max() > 0.01


def test_a_last_window_is_worth_the_tokens_it_has() -> None:
    _, key, value = random(1, 1, 6, 16)
    coarse = pooled(key, value, WINDOW)
    torch.testing.assert_close(coarse.bias.exp(), torch.tensor([4.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(coarse.key[:, :, 1], key[:, :, 4:].mean(2))


@pytest.mark.parametrize("text_first", [False, True])
def test_text_sees_all_and_is_seen_by_all(text_first: bool) -> None:
    tokens = math.prod(GRID) + TEXT
    query, key, value = (part.requires_grad_() for part in random(1, 2, tokens, 16))
    few = options(mass=0.1, most=0.2)
    output = sparse_attention(query, key, value, Sequence(GRID, text_first), few)
    text = range(TEXT) if text_first else range(tokens - TEXT, tokens)
    visual = [place for place in range(tokens) if place not in text]
    by_text = dense(query, key, value)[:, :, text]
    torch.testing.assert_close(output[:, :, text], by_text, rtol=0, atol=1e-12)
    (of_values,) = torch.autograd.grad(output[0, 0, visual[0]].sum(), value)
    looked_at = of_values[0, 0].abs().sum(-1) > 0
    assert looked_at[list(text)].all()
    assert not looked_at[visual].all()


def test_what_is_seen_does_not_depend_on_the_order_of_tokens_in_the_call() -> None:
    """Tokens of text before or after are the same tokens."""
    visual = math.prod(GRID)
    parts = random(1, 2, visual + TEXT, 16)
    last = sparse_attention(*parts, Sequence(GRID, False), options())
    moved = [torch.cat([part[:, :, visual:], part[:, :, :visual]], 2) for part in parts]
    first = sparse_attention(*moved, Sequence(GRID, True), options())  # type: ignore[call-arg]
    torch.testing.assert_close(torch.cat([first[:, :, TEXT:], first[:, :, :TEXT]], 2), last, rtol=0, atol=1e-12)


def test_a_sample_of_another_size_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"found 59 tokens of a sample of \(3, 5, 4\)"):
        sparse_attention(*random(1, 1, 59, 4), Sequence(GRID, False), options())


# What is chosen


def test_the_fewest_blocks_that_hold_the_mass() -> None:
    shares = importance(*random(2, 3, 80, 16)[:2], BLOCK, sampled(0, 3, BLOCK, 4))
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    for mass in (0.3, 0.5, 0.8, 0.99):
        seen = seen_blocks(shares, mass)
        held = (shares * seen).sum(-1)
        assert (held >= mass - 1e-12).all()
        weakest = shares.masked_fill(~seen, torch.inf).amin(-1)
        assert (held - weakest < mass).all()  # the release stops there, one block earlier
    assert seen_blocks(shares, 1.0).all()


def test_least_and_most_bound_what_is_seen() -> None:
    shares = importance(*random(2, 3, 80, 16)[:2], BLOCK, sampled(0, 3, BLOCK, 4))
    counts = seen_blocks(shares, 0.5, 0.3, 0.4).sum(-1)
    assert set(counts.unique().tolist()) <= {3, 4}
    assert (seen_blocks(shares, 0.99, 0.0, 0.2).sum(-1) == 2).all()
    assert (seen_blocks(shares, 0.5, 0.0, 0.01).sum(-1) == 1).all()


def test_all_tokens_sampled_are_the_exact_importance() -> None:
    query, key, _ = random(1, 2, 40, 16)
    weights = (query @ key.mT / 4).softmax(-1).unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((3, 5))
    got = importance(query, key, BLOCK, sampled(3, 2, BLOCK, BLOCK))
    torch.testing.assert_close(got, weights / weights.sum(-1, keepdim=True), rtol=0, atol=1e-14)


def test_importance_does_not_change_with_a_vector_added_to_all_keys_nor_with_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, _ = random(1, 2, 44, 16)
    places = sampled(0, 2, BLOCK, 4)
    shares = importance(query, key, BLOCK, places)
    torch.testing.assert_close(importance(query, key + torch.randn(16).double(), BLOCK, places), shares)
    monkeypatch.setattr("fewstep.attention.sparse.choosing._AT_A_TIME", 1)
    torch.testing.assert_close(importance(query, key, BLOCK, places), shares, rtol=0, atol=1e-15)


def test_samples_are_those_of_a_layer_and_head() -> None:
    first = sampled.__wrapped__(2, 3, 16, 5)
    assert all(torch.equal(one, other) for one, other in zip(first, sampled.__wrapped__(2, 3, 16, 5), strict=True))
    rows = [tuple(row.tolist()) for part in (*first, *sampled(3, 3, 16, 5)) for row in part]
    assert len(set(rows)) == len(rows)
    assert all(len(set(row)) == 5 and list(row) == sorted(row) and max(row) < 16 for row in rows)


def smooth_fields(tokens: int, seed: int) -> Tensor:
    """(1, 2, N, 32) random along N with a correlation length of 16, as tokens of a picture along a curve are."""
    noise = torch.randn(2, 32, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = torch.arange(-48, 49, dtype=torch.float64)
    kernel = torch.exp(-((places / 16) ** 2))
    smooth = torch.nn.functional.conv1d(
        torch.nn.functional.pad(noise, (48, 48), mode="circular").flatten(0, 1)[:, None], kernel.view(1, 1, -1)
    )
    return (smooth / smooth.std()).view(1, 2, 32, tokens).mT


def test_a_few_samples_find_nearly_all_that_can_be_found() -> None:
    """The mask-quality test of the card: a fifth of the blocks of 1,024 tokens that are alike where they are near."""
    query, key, block, share = 1.5 * smooth_fields(1024, 0), smooth_fields(1024, 1), 32, 0.2
    weights = (query @ key.mT / math.sqrt(32)).softmax(-1)
    of_blocks = weights.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum((3, 5))

    def held(shares: Tensor) -> float:
        return float((of_blocks * seen_blocks(shares, 1.0, 0.0, share)).sum() / 1024 / 2)

    oracle, found = held(of_blocks), held(importance(query, key, block, sampled(0, 2, block, 8)))
    by_chance = held(torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(2)))
    assert found >= 0.97 * oracle
    assert found >= 3 * by_chance


# The curve


def steps(grid: Grid) -> Iterator[float]:
    _, rows, columns = grid
    order = gilbert(grid)
    at = torch.stack([order % columns, order // columns % rows, order // columns // rows], 1)
    yield from (at[1:] - at[:-1]).double().norm(dim=1).tolist()


def test_the_curve_goes_through_every_token_of_any_box() -> None:
    for grid in product(range(1, 6), range(1, 7), range(1, 8)):
        assert gilbert(grid).sort().values.tolist() == list(range(math.prod(grid))), grid
    for grid in ((4, 6, 8), (2, 8, 4), (1, 6, 8)):
        assert set(steps(grid)) == {1.0}


@pytest.mark.parametrize(
    ("grid", "long", "longest"), [((21, 30, 52), 88, 2.0), ((13, 30, 45), 175, 2.0), ((11, 48, 85), None, 4.0)]
)
def test_the_curve_hardly_jumps_at_published_sizes(grid: Grid, long: int | None, longest: float) -> None:
    """Wan2.1 at 480p, CogVideoX-5B, CogVideoX1.5-5B."""
    lengths = list(steps(grid))
    assert max(lengths) <= longest
    assert long is None or sum(length > 1 for length in lengths) == long


def test_blocks_along_the_curve_are_compact() -> None:
    def radius(order: Tensor) -> float:
        at = torch.stack([order % 52, order // 52 % 30, order // 52 // 30], 1).double()[: 255 * 128]
        return float(at.view(255, 128, 3).var(1, unbiased=False).sum(-1).sqrt().mean())

    assert radius(gilbert((21, 30, 52))) < 3.1
    assert radius(torch.arange(21 * 30 * 52)) > 12
