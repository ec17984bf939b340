"""Each fault is named by its condition in time, and sound runs are told nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.evaluation import faulty_runs, page
from fewstep.evaluation.faulty_runs import FAULT_AT, FAULTS, SOUND, Fault
from fewstep.methods.base import Loss, agreement_metrics, guidance_metrics
from fewstep.training.log import Log, read_alarms, read_log
from fewstep.training.monitors.conditions import CONDITIONS
from fewstep.training.monitors.null import null_numbers
from fewstep.training.monitors.watch import Alarm, Watch

EVERYWHERE = [replace(FAULTS[0], method=method) for method in ("dmd2", "sid-none", "decoupled")]


@pytest.mark.parametrize("fault", [*FAULTS, *EVERYWHERE], ids=lambda fault: f"{fault.title}, {fault.method}")
def test_a_fault_is_named_in_time_and_not_before(fault: Fault, tmp_path: Path) -> None:
    alarms = faulty_runs.run(fault, tmp_path)
    named = [alarm["iteration"] for alarm in alarms if alarm["name"] == fault.condition]
    assert named, f"told only {[alarm['name'] for alarm in alarms]}"
    assert fault.begins <= named[0] < fault.begins + fault.within
    assert min(alarm["iteration"] for alarm in alarms) >= fault.begins


@pytest.mark.parametrize("method", SOUND)
def test_a_sound_run_is_told_nothing(method: str, tmp_path: Path) -> None:
    assert faulty_runs.run(faulty_runs.sound(method, 40), tmp_path) == []


def test_a_critic_that_learns_the_wrong_way_is_far_apart_from_the_teacher(tmp_path: Path) -> None:
    def reverse(role: str, number: int, loss: Loss) -> Loss:
        return replace(loss, values=-loss.values) if role == "critic" and number >= FAULT_AT else loss

    fault = Fault("sign of the critic's loss reversed", "apart", 40, begins=FAULT_AT, bend=reverse)
    alarms = faulty_runs.run(fault, tmp_path, on_alarm="warn")
    told = {alarm["name"]: alarm["iteration"] for alarm in reversed(alarms)}
    assert FAULT_AT + 10 <= told["apart"] < told["critic-lag"]
    assert min(told.values()) >= FAULT_AT


def _looked(numbers: dict[str, float], times: int, start: int = 1) -> list[Alarm]:
    watch = Watch()
    return [alarm for i in range(start, start + times) for alarm in watch.look(i, numbers)]


@pytest.mark.parametrize("condition", [c for c in CONDITIONS if not c.settles], ids=lambda c: c.name)
def test_a_condition_is_told_once_after_so_many_in_a_row(condition: object) -> None:
    for c in (c for c in CONDITIONS if c is condition):
        for name in c.numbers:
            given = {"metric/critic/logit_real": 0.0, "metric/critic/logit_fake": 0.0} if name == "logit_gap" else None
            beyond = c.high + 0.1 if math.isinf(c.low) else c.low - max(c.low * 0.5, 1e-6)
            numbers = given or {name: beyond}
            assert c.name not in [alarm.name for alarm in _looked(numbers, c.after - 1)]
            told = [alarm for alarm in _looked(numbers, c.after + 20, start=5) if alarm.name == c.name]
            assert (told[0].iteration, told[0].since) == (4 + c.after, 5)
            assert len(told) == (21 if c.action == "skip" else 1)  # what is skipped is told each time
            assert c.advice in told[0].text()


def test_a_break_begins_the_count_anew_and_what_is_not_finite_does_not_count() -> None:
    watch = Watch()
    values = [2.0] * 19 + [1.0] + [2.0] * 19 + [math.nan] + [2.0]
    told = [watch.look(i, {"metric/student/contrast": value}) for i, value in enumerate(values)]
    assert [len(alarms) for alarms in told] == [0] * 40 + [1]


def test_growth_is_measured_against_a_level_that_an_explosion_does_not_lift() -> None:
    watch = Watch()
    assert not any(watch.look(i, {"loss/critic": 1.1**i}) for i in range(30))  # slow growth is followed
    (alarm,) = [alarm for i in range(30, 40) for alarm in watch.look(i, {"loss/critic": 1e4})]
    assert (alarm.name, alarm.iteration, alarm.since) == ("explosion", 31, 30)


def test_a_loss_that_scatters_by_itself_is_no_explosion_and_one_that_grows_is() -> None:
    """As in batches of one sample, whose critic loss spans three decades (measured on the embedded teacher)."""
    draw, watch = random.Random(0), Watch()
    assert not any(watch.look(i, {"loss/critic": math.exp(draw.gauss(-3, 2))}) for i in range(2000))
    growing = ({"loss/critic": 1.5**i * math.exp(draw.gauss(-3, 2))} for i in range(30))
    assert [a.name for i, numbers in enumerate(growing, 2000) for a in watch.look(i, numbers)][:1] == ["explosion"]


def test_levels_of_a_checkpoint_without_scatter_are_taken_over() -> None:
    watch, numbers = Watch(), {"loss/critic": 2.0}
    watch.load({"streaks": {}, "since": {}, "quiet": {}, "levels": {"loss/critic": [40, math.log(2.0)]}})
    assert watch.shown(numbers)["monitor/growth/loss/critic"] == pytest.approx(1.0)
    assert watch.look(41, numbers) == []


def test_the_state_of_a_watch_goes_through_a_checkpoint() -> None:
    numbers = {"metric/student/contrast": 3.0, "loss/critic": 1.0}
    watch, other = Watch(), Watch()
    for i in range(10):
        watch.look(i, numbers)
    other.load(watch.state())
    first, second = ([w.look(i, numbers) for i in range(10, 30)] for w in (watch, other))
    assert first == second
    assert [len(alarms) for alarms in first] == [0] * 9 + [1] + [0] * 10


def test_metrics_say_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(16, 3, 8, generator=generator) for _ in range(2))
    real = 0.5 * clean
    told = agreement_metrics(clean, real, 1.5 * real)
    assert float(told["contrast"]) == pytest.approx(1.5)
    assert float(told["critic_lag"]) == pytest.approx(0.5, abs=1e-5)  # 0.25 away where the teacher is 0.5 away
    assert float(agreement_metrics(clean, real, real)["contrast"]) == pytest.approx(1.0)
    assert float(agreement_metrics(clean, real, real + 0.5)["mean_shift"]) == pytest.approx(1.0, rel=0.3)
    assert float(agreement_metrics(10 * clean, clean, clean)["clipped"]) > 0.5
    assert float(agreement_metrics(0.9 * clean, clean, clean)["clipped"]) == 0
    parts = agreement_metrics(clean[:8], real[:8], noise[:8]), agreement_metrics(clean[8:], real[8:], noise[8:])
    whole = agreement_metrics(clean, real, noise)["contrast"]
    logs = torch.stack([part["contrast"].log() for part in parts]).mean()
    torch.testing.assert_close(whole.log(), logs)  # so a micro-batch tells as much
    assert float(guidance_metrics(clean, clean)["guidance_gap"]) == 0
    assert float(guidance_metrics(clean, 0 * clean)["guidance_gap"]) == pytest.approx(1.0)


class _Nulls:
    def __init__(self, value: float) -> None:
        self._value = value

    def null(self, condition: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"text": torch.full_like(condition["text"], self._value)}


def test_an_unconditional_embedding_of_zeros_is_seen_unless_the_family_has_it_so() -> None:
    guided, plain = SOUND["tdm"].build(), SOUND["sid-none"].build()
    condition, nulls = {"text": torch.ones(2, 4)}, _Nulls(0.0)
    assert null_numbers(guided, nulls, condition) == {"null/told": 1.0, "null/filled": 0.0}  # type: ignore[arg-type]
    assert null_numbers(guided, _Nulls(1.0), condition)["null/told"] == 0.0  # type: ignore[arg-type]
    assert null_numbers(guided, _Nulls(0.5), condition) == {"null/told": 1.0, "null/filled": 1.0}  # type: ignore[arg-type]
    assert null_numbers(plain, nulls, condition) == {}  # type: ignore[arg-type]
    nulls.backbone = type("SDXL", (), {"zero_null": True})()  # type: ignore[attr-defined]
    assert null_numbers(guided, nulls, condition) == {"null/told": 1.0}  # type: ignore[arg-type]


def test_alarms_are_lines_of_the_log_that_its_readers_tell_apart(tmp_path: Path) -> None:
    watch = Watch()
    (alarm,) = (
        watch.look(3, {"moved/critic": 0.0})
        + watch.look(4, {"moved/critic": 0.0})
        + watch.look(5, {"moved/critic": 0.0})
    )
    log = Log(tmp_path, 0, tensorboard=False)
    log.write(5, {"loss/critic": 1.0})
    log.alarm(5, replace(alarm, value=math.inf, advice="<b>look</b>").record() | {"done": "stop", "to": 0})
    log.write(6, {"loss/critic": 2.0})
    log.close()
    assert read_log(log.path) == [{"iteration": 5, "loss/critic": 1.0}, {"iteration": 6, "loss/critic": 2.0}]
    (told,) = read_alarms(log.path)
    assert (told["name"], told["number"], told["since"], told["value"]) == ("frozen", "moved/critic", 3, None)
    shown = page._alarms({"mine": log.path})
    assert "<b>frozen</b> (mine, iteration 5): moved/critic = not finite, healthy: always; &lt;b&gt;look" in shown
    assert "(stop)" in shown
    Log(tmp_path, 4, tensorboard=False).close()  # resumed from before the alarm
    assert read_alarms(log.path) == []
    assert page._alarms({"mine": log.path}) == ""
