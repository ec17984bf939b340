"""Runs in turn: each hands its averaged student on to the bit, and the whole resumes where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_toy import DIMENSIONS, ToyMethod, ToyRoles, toy_data, toy_options

from fewstep.errors import FewstepError
from fewstep.training.loop import Hooks
from fewstep.training.options import TrainOptions
from fewstep.training.phases import State, Turn, digest, train_in_turn
from fewstep.training.signals import Stopped


class Chain:
    """Three turns of toy runs; remembers what each was handed."""

    def __init__(
        self, options: Sequence[TrainOptions] | None = None, stop_in: str | None = None, keeps_critic: bool = False
    ) -> None:
        self.handed: dict[str, list[State]] = {}
        self.keeps_critic = keeps_critic
        self.options, self.stop_in = options or [toy_options(iterations=4, warmup=1)] * 3, stop_in

    def turn(self, number: int) -> Turn:
        name = f"phase-{number}"

        def roles(before: Sequence[State]) -> ToyRoles:
            self.handed[name] = list(before)
            made = ToyRoles()
            if before:
                made.student_net.load_state_dict(before[-1])
            return made

        kept = self.keeps_critic and number > 1
        return Turn(name, ToyMethod(), roles, self.options[number - 1], kept, lambda made: self.hooks(name))

    def hooks(self, name: str) -> Hooks | None:
        def stop(iteration: int, folder: Path) -> None:
            raise Stopped(130)

        return Hooks(save=stop) if name == self.stop_in else None

    def run(self, out: Path, resume: bool = False) -> State:
        turns = [self.turn(number) for number in (1, 2, 3)]
        result, roles = train_in_turn(turns, toy_data, out, noise_shape=(DIMENSIONS,), resume=resume)
        with result.ema.applied():
            return {name: value.clone() for name, value in roles.student_state().items()}


def assert_equal(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_turn_is_handed_the_averaged_students_before_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    chain = Chain()
    chain.run(tmp_path)
    assert {name: len(states) for name, states in chain.handed.items()} == {"phase-1": 0, "phase-2": 1, "phase-3": 2}
    for number, state in enumerate(chain.handed["phase-3"], start=1):
        saved = load_file(tmp_path / f"phase-{number}" / "checkpoints" / "000004" / "ema.safetensors")
        assert_equal(state, saved)
    assert_equal(chain.handed["phase-2"][0], chain.handed["phase-3"][0])


@pytest.mark.parametrize("stop_in", ["phase-1", "phase-2", "phase-3"])
def test_a_chain_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path, stop_in: str) -> None:
    expected = Chain().run(tmp_path / "whole")
    with pytest.raises(Stopped):
        Chain(stop_in=stop_in).run(tmp_path / "stopped")
    assert_equal(Chain().run(tmp_path / "stopped", resume=True), expected)
    assert_equal(Chain().run(tmp_path / "stopped", resume=True), expected)  # once more, now that it is finished


@pytest.mark.parametrize("keeps_critic", [False, True])
def test_a_critic_is_new_in_every_turn_unless_it_is_kept(
    tmp_path: Path, keeps_critic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, it is what the checkpoint of the turn before holds, to the bit, also when that turn is only read."""
    from safetensors.torch import load_file

    import fewstep.training.phases as phases

    began: dict[str, State] = {}
    original = phases.train

    def watched(method, roles, data, options, out, hooks, **more):
        began[out.name] = {name: value.clone() for name, value in roles.critic_state().items()}
        return original(method, roles, data, options, out, hooks, **more)

    monkeypatch.setattr(phases, "train", watched)
    with pytest.raises(Stopped):
        Chain(stop_in="phase-3", keeps_critic=keeps_critic).run(tmp_path)
    for again in (False, True):
        saved = load_file(tmp_path / "phase-1" / "checkpoints" / "000004" / "critic.safetensors")
        assert_equal(began["phase-2"], saved if keeps_critic else ToyRoles().critic_state())
        if not again:
            Chain(keeps_critic=keeps_critic).run(tmp_path, resume=True)


def test_a_kept_critic_of_another_kind_is_refused(tmp_path: Path) -> None:
    first, second = Chain().turn(1), Chain(keeps_critic=True).turn(2)
    other = Turn(second.name, second.method, lambda before: ToyRoles(hidden=4), second.options, keeps_critic=True)
    with pytest.raises(FewstepError, match="whose critic has"):
        train_in_turn([first, other], toy_data, tmp_path, noise_shape=(DIMENSIONS,))


def test_a_chain_without_an_average_hands_on_the_students_themselves(tmp_path: Path) -> None:
    chain = Chain([toy_options(iterations=2, warmup=1, ema_decay=0.0)] * 3)
    chain.run(tmp_path)
    assert chain.handed["phase-2"][0]


def test_later_turns_refuse_an_earlier_one_that_was_trained_for_longer(tmp_path: Path) -> None:
    short = toy_options(iterations=2, warmup=1, schedule="constant")
    longer = toy_options(iterations=3, warmup=1, schedule="constant")
    Chain([short] * 3).run(tmp_path)
    with pytest.raises(FewstepError, match="before.phase-1 was"):
        Chain([longer, short, short]).run(tmp_path, resume=True)


def test_a_folder_in_use_and_turns_of_one_name_are_refused(tmp_path: Path) -> None:
    chain = Chain()
    chain.run(tmp_path)
    with pytest.raises(FewstepError, match="found a run"):
        chain.run(tmp_path)
    with pytest.raises(FewstepError, match="different names"):
        train_in_turn([chain.turn(1), chain.turn(1)], toy_data, tmp_path, noise_shape=(DIMENSIONS,))
    with pytest.raises(FewstepError, match="different names"):
        train_in_turn([], toy_data, tmp_path, noise_shape=(DIMENSIONS,))


def test_digests_see_every_bit() -> None:
    state: dict[str, Tensor] = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    assert digest(state) == digest({"b": torch.ones(2, 2), "a": torch.zeros(3)})
    assert digest(state) != digest({"a": torch.tensor([0.0, 0.0, -0.0]), "b": torch.ones(2, 2)})
    assert digest(state) != digest({"a": torch.zeros(3), "c": torch.ones(2, 2)})
    assert digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != digest({"a": torch.zeros(2, dtype=torch.bfloat16)})
