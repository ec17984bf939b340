from __future__ import annotations

import torch
from torch import nn

from fewstep.training.ema import Ema


def test_average_follows_its_recursion_with_warm_up() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"w": parameter}, decay=0.2)
    expected = 1.0
    for n, value in enumerate([3.0, -2.0, 5.0, 0.5]):
        parameter.data.fill_(value)
        ema.update()
        decay = min(0.2, (1 + n) / (10 + n))  # 0.1, 0.1818, 0.2, 0.2
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.tensors["w"], torch.tensor([expected]))


def test_average_of_half_precision_parameters_is_kept_in_fp32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, decay=0.999)
    ema.updates = 10**6  # past the warm-up
    parameter.data.fill_(1.0078125)  # the next bfloat16: an average in bfloat16 would never move
    ema.update()
    torch.testing.assert_close(ema.tensors["w"], torch.full((3,), 1 + 0.001 * 0.0078125), rtol=0, atol=1e-7)
    with ema.applied():
        assert parameter.dtype == torch.bfloat16


def test_applied_lends_the_average_and_gives_the_parameters_back_to_the_bit() -> None:
    parameter = nn.Parameter(torch.randn(50))
    ema = Ema({"w": parameter}, decay=0.9)
    parameter.data += 1 / 3
    ema.update()
    before = parameter.detach().clone()
    with ema.applied():
        assert torch.equal(parameter, ema.tensors["w"])
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)


def test_decay_zero_keeps_nothing_and_changes_nothing() -> None:
    parameter = nn.Parameter(torch.randn(5))
    ema = Ema({"w": parameter}, decay=0.0)
    before = parameter.detach().clone()
    ema.update()
    with ema.applied():
        assert torch.equal(parameter, before)
    assert ema.tensors == {}
