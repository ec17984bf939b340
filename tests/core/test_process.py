from __future__ import annotations

import json

import pytest
import torch
from core_examples import PROCESSES
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from fewstep.core.process import VE, DiscreteVP, Flow, Process, process_from_scheduler
from fewstep.errors import FewstepError

TIMES = torch.linspace(0, 1, 4001, dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_ends_and_direction(name: str) -> None:
    process = PROCESSES[name]
    assert process.alpha(TIMES)[0] == 1
    assert process.sigma(TIMES)[0] == 0
    assert (process.sigma(TIMES).diff() > 0).all()
    assert (process.alpha(TIMES).diff() <= 0).all()
    assert (process.snr(TIMES)[1:].diff() < 0).all()
    assert process.snr(TIMES)[0] == torch.inf
    if name != "ve" and name != "flow":
        torch.testing.assert_close(
            process.alpha(TIMES).square() + process.sigma(TIMES).square(), torch.ones(4001).double()
        )


@pytest.mark.parametrize("name", ["zero_snr", "flow"])
def test_no_signal_is_left_where_none_should_be(name: str) -> None:
    assert PROCESSES[name].alpha(TIMES)[-1] == 0
    assert PROCESSES[name].sigma(TIMES)[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_values_keep_shape_and_at_least_float32(dtype: torch.dtype) -> None:
    t = torch.rand(2, 3).to(dtype)
    for process in PROCESSES.values():
        for value in (process.alpha(t), process.sigma(t), process.snr(t), process.network_time(t)):
            assert value.shape == t.shape
            assert value.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", PROCESSES)
def test_transition_composes_and_reproduces_marginals(name: str) -> None:
    process = PROCESSES[name]
    s, t, u = torch.rand(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(0).values
    s[:3], t[:2], u[:1] = 0, 0, 0
    t[-3:], u[-4:], s[-2:] = 1, 1, 1
    (r_st, b_st), (r_tu, b_tu), (r_su, b_su) = (process.transition(*pair) for pair in ((s, t), (t, u), (s, u)))
    torch.testing.assert_close(r_tu * r_st, r_su, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close((r_tu * b_st).square() + b_tu.square(), b_su.square(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(r_st * process.alpha(s), process.alpha(t), atol=1e-12, rtol=1e-9)
    variance = (r_st * process.sigma(s)).square() + b_st.square()
    torch.testing.assert_close(variance, process.sigma(t).square(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_transition_from_data_is_the_marginal_and_to_itself_is_nothing(name: str) -> None:
    process = PROCESSES[name]
    r, beta = process.transition(torch.zeros_like(TIMES), TIMES)
    torch.testing.assert_close(r, process.alpha(TIMES))
    torch.testing.assert_close(beta, process.sigma(TIMES))
    r, beta = process.transition(TIMES, TIMES)
    assert (r == 1).all()
    assert (beta == 0).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_transition_adds_noise_exactly_when_the_snr_falls(name: str) -> None:
    """Card 8.1, identity 1."""
    process = PROCESSES[name]
    s, t = torch.rand(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ratio = process.alpha(t) / process.alpha(s)
    variance = process.sigma(t).square() - (ratio * process.sigma(s)).square()
    assert ((variance >= 0) == (process.snr(t) <= process.snr(s))).all()
    forward = t >= s
    torch.testing.assert_close(process.transition(s[forward], t[forward])[1].square(), variance[forward])


def test_transition_back_in_time_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"from time 0\.5.* back to 0\.4"):
        Flow().transition(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.4]))
    with pytest.raises(FewstepError, match=r"from time 0\.5.* back to 0\.4"):
        Flow().transition(torch.tensor(0.5), torch.tensor([0.6, 0.4]))
    _, beta = Flow().transition(torch.tensor([0.5 + 5e-7]), torch.tensor([0.5]))
    assert beta == 0


DISCRETE = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_levels_are_those_of_diffusers(name: str) -> None:
    scheduler = DDIMScheduler(**DISCRETE[name])
    process, prediction = process_from_scheduler(scheduler.config)
    assert prediction == "eps"
    assert process.to_config() == PROCESSES[name].to_config()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    wanted = scheduler.alphas_cumprod.double()
    # diffusers rescales betas, not their products, and so rounds once more
    rtol, atol = (3e-5, 1e-9) if name == "zero_snr" else (1e-14, 0)
    torch.testing.assert_close(process.alpha(t).square(), wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(process.sigma(t).square(), 1 - wanted, rtol=max(rtol, 1e-9), atol=atol)


def test_between_levels_alpha_is_linear() -> None:
    process = PROCESSES["short"]
    t = torch.tensor([0.0, 0.05, 0.1, 0.425, 0.4, 0.5], dtype=torch.float64)
    a = process.alpha(t)
    torch.testing.assert_close(a[1], (a[0] + a[2]) / 2)
    torch.testing.assert_close(a[3], 0.75 * a[4] + 0.25 * a[5])


def test_network_times() -> None:
    indices = torch.tensor([999, 749, 499, 249, 0])
    times = (indices + 1) / 1000
    assert times.dtype == torch.float32
    assert DiscreteVP.linear().network_time(times).equal(indices.float())
    assert DiscreteVP.linear().network_time(torch.zeros(1)) == 0
    torch.testing.assert_close(DiscreteVP.linear().network_time(torch.tensor([0.5005])), torch.tensor([499.5]))
    assert Flow().network_time(torch.tensor([1.0, 0.25])).tolist() == [1000, 250]
    sigma = torch.tensor([80.0, 1.0, 0.002], dtype=torch.float64)
    torch.testing.assert_close(VE().network_time(VE().time_of(sigma)), sigma.log() / 4)
    assert VE().network_time(torch.zeros(1)).isfinite().all()


def test_every_float32_level_is_hit_exactly() -> None:
    indices = torch.arange(1000)
    process = PROCESSES["scaled_linear"]
    assert process.network_time((indices + 1) / 1000).equal(indices.float())
    assert process.alpha((indices + 1) / 1000).equal(process.alpha((indices + 1).double() / 1000).float())


def test_ve_levels() -> None:
    process = VE(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    assert process.noise_scale == 50
    torch.testing.assert_close(
        process.sigma(torch.tensor([1.0, 1e-3, 5e-4, 0.0]).double()), torch.tensor([50.0, 0.01, 0.005, 0.0]).double()
    )
    middle = (0.5 * 0.01**0.2 + 0.5 * 50**0.2) ** 5
    torch.testing.assert_close(process.sigma(torch.tensor(0.5005, dtype=torch.float64)).item(), middle)
    torch.testing.assert_close(process.time_of(process.sigma(TIMES)), TIMES)


def test_a_largest_ve_level_rounded_up_by_float32_is_still_time_1() -> None:
    rounded = torch.tensor(0.1)
    assert rounded.double() > 0.1
    assert VE(sigma_max=0.1).time_of(rounded) == 1


@pytest.mark.parametrize("name", PROCESSES)
def test_config_round_trip_through_json(name: str) -> None:
    process = PROCESSES[name]
    again = Process.from_config(json.loads(json.dumps(process.to_config())))
    assert type(again) is type(process)
    assert again.to_config() == process.to_config()
    assert again.alpha(TIMES).equal(process.alpha(TIMES))
    assert again.sigma(TIMES).equal(process.sigma(TIMES))
    assert again.network_time(TIMES).equal(process.network_time(TIMES))


def test_config_round_trip_of_a_bare_table() -> None:
    process = DiscreteVP.from_betas(torch.linspace(0.01, 0.3, 7), zero_terminal=True)
    again = Process.from_config(json.loads(json.dumps(process.to_config())))
    assert again.alpha(TIMES).equal(process.alpha(TIMES))


@pytest.mark.parametrize(("scheduler", "kind", "prediction"), [
    (FlowMatchEulerDiscreteScheduler(shift=3.0), Flow, "flow"),
    (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), Flow, "flow"),
    (DDIMScheduler(prediction_type="v_prediction"), DiscreteVP, "v"),
    (DDIMScheduler(prediction_type="sample"), DiscreteVP, "x0"),
    (EulerDiscreteScheduler(beta_schedule="scaled_linear"), DiscreteVP, "eps"),
    (EDMEulerScheduler(sigma_max=70.0), VE, "edm"),
])  # fmt: skip
def test_schedulers_are_recognised(scheduler: object, kind: type, prediction: str) -> None:
    process, found = process_from_scheduler(scheduler.config)
    assert type(process) is kind
    assert found == prediction
    process, found = process_from_scheduler({"_class_name": type(scheduler).__name__, **scheduler.config})
    assert type(process) is kind
    assert found == prediction


def test_scheduler_values_are_used() -> None:
    process, _ = process_from_scheduler(EDMEulerScheduler(sigma_max=70.0, sigma_min=0.01, rho=5.0).config)
    assert process.to_config() == VE(0.01, 70.0, 5.0).to_config()
    process, _ = process_from_scheduler(DDIMScheduler(trained_betas=[0.1, 0.2, 0.4]).config)
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor([0.9, 0.72, 0.432]).double(), rtol=1e-6, atol=0)
    assert process_from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500).config)[0].time_scale == 500


@pytest.mark.parametrize("zero", [False, True])
def test_cogvideox_shifted_snr(zero: bool) -> None:
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=zero, prediction_type="v_prediction")
    process, prediction = process_from_scheduler(scheduler.config)
    assert prediction == "v"
    torch.testing.assert_close(process.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    stored = {"_class_name": "CogVideoXDDIMScheduler", **scheduler.config}
    del stored["snr_shift_scale"]  # 3 is the default of that class, and only of that class
    assert process_from_scheduler(stored)[0].to_config() == process.to_config()


@pytest.mark.parametrize(("config", "word"), [
    ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler"),
    ({"beta_schedule": "sigmoid"}, "sigmoid"),
    ({"beta_schedule": "linear", "prediction_type": "trigflow"}, "trigflow"),
    ({"beta_schedule": "linear", "timestep_type": "continuous"}, "discrete beta schedule"),
    ({"sigma_data": 0.5, "sigma_schedule": "exponential"}, "exponential"),
])  # fmt: skip
def test_unknown_configs_are_refused(config: dict[str, object], word: str) -> None:
    with pytest.raises(FewstepError, match=f"found .*{word}.*expected .*fix: "):
        process_from_scheduler(config)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(FewstepError, match="strictly fall"):
        DiscreteVP(torch.tensor([0.5, 0.7]))
    with pytest.raises(FewstepError, match="sigma_max"):
        VE(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(FewstepError, match="found process 'nothing'"):
        Process.from_config({"process": "nothing"})
