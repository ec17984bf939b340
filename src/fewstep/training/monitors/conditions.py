"""The named conditions: a number, the range in which it is healthy, and what to do where it is not.

A number is one of the iteration's own (the keys of `log.jsonl`, or those of `watch.derived`). A condition is met when
the number has been out of its range so many times in a row; numbers that are not there are not looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Action = Literal["warn", "skip", "roll back", "finish", "stop"]


@dataclass(frozen=True)
class Condition:
    """One thing that goes wrong."""

    name: str
    numbers: tuple[str, ...]
    """What is looked at, each by itself."""
    advice: str
    """What to do, for the message and the table."""
    low: float = -math.inf
    high: float = math.inf
    after: int = 1
    """So many times in a row."""
    action: Action = "warn"
    """Where alarms are acted on (`on_alarm` act); else they are told, and that is all."""
    settles: int = 0
    """Above 0: what is compared is the number over its own running level, which is there after so many iterations."""
    flag: bool = False
    """The number is 1 (well) or 0, and no curve."""

    def healthy(self) -> str:
        """The range in words."""
        if self.flag:
            return "always"
        if self.settles:
            return f"below {self.high:g} times its running level"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


LOWER_RATES = "lower student_rate and critic_rate together"

CONDITIONS: tuple[Condition, ...] = (
    Condition(
        "not-finite",
        ("finite/student", "finite/critic"),
        "one such batch is skipped; if more come, look for NaN in the data, lower the role's rate, or use bf16",
        low=1,
        action="skip",
        flag=True,
    ),
    Condition(
        "not-finite-for-long",
        ("finite/student", "finite/critic"),
        "the weights themselves may be undefined: lower the role's rate, or use bf16 or fp32",
        low=1,
        after=3,
        action="roll back",
        flag=True,
    ),
    Condition(
        "fp16-overflow",
        ("loss_scale/student", "loss_scale/critic"),
        "gradients or activations are beyond fp16 and steps are being skipped: use --precision bf16, or fp32",
        low=128,
        action="stop",
    ),
    Condition(
        "explosion",
        ("loss/critic", "metric/student/denoised_std"),
        f"{LOWER_RATES} (to a tenth, to see whether that is it), or lengthen the warm-up",
        high=10,
        after=2,
        action="roll back",
        settles=3,
    ),
    Condition(
        "gradient-explosion",
        ("gradient_norm/student", "gradient_norm/critic"),
        f"{LOWER_RATES}, or clip gradients (student_clip, critic_clip)",
        high=30,
        after=3,
        action="roll back",
        settles=20,
    ),
    Condition(
        "reversed-sign",
        ("metric/student/pull_alignment",),
        "the student's gradient leads away from the teacher: look for a sign in the loss, or in the order of teacher "
        "and critic",
        low=-0.2,
        after=5,
        action="stop",
    ),
    Condition(
        "frozen",
        ("moved/student", "moved/critic"),
        "the weights do not change: a rate of 0, an adapter switched off, or steps that bf16 weights round away",
        low=1,
        after=3,
        action="stop",
        flag=True,
    ),
    Condition(
        "no-gradient",
        ("gradient_norm/student", "gradient_norm/critic"),
        "the loss does not depend on the weights: see that nothing is detached on the way, and that the right adapter "
        "is on when the role is called",
        low=1e-30,
        after=3,
        action="stop",
    ),
    Condition(
        "critic-lag",
        ("metric/student/critic_lag",),
        "the critic predicts the student's samples far worse than the teacher does: raise critic_updates or "
        "critic_rate, or lower student_rate",
        high=1.5,
        after=20,
    ),
    Condition(
        "opposed",
        ("metric/student/real_fake_cosine",),
        "seen from the student's samples, critic and teacher lie in opposite directions: the critic learns another law "
        "than the student's (look at its loss, its data and its adapter), or lags: raise critic_updates or critic_rate",
        low=0,
        after=10,
    ),
    Condition(
        "apart",
        ("metric/student/real_fake_gap",),
        "teacher and critic differ by far more than the samples are from the teacher: lower student_rate and "
        "critic_rate, or raise critic_updates",
        high=3,
        after=10,
    ),
    Condition(
        "saturation",
        ("metric/student/contrast",),
        "the student's contrast is beyond the teacher's: lower guidance_scale, or the student's rate",
        high=1.5,
        after=20,
    ),
    Condition(
        "blur",
        ("metric/student/contrast",),
        "the student's contrast falls far short of the teacher's (blur, or one picture for all): raise critic_updates, "
        "and see that prompts reach the student",
        low=0.4,
        after=200,
    ),
    Condition(
        "clipping",
        ("metric/student/clipped",),
        "many values of the student's samples are beyond all of the teacher's: lower guidance_scale, or begin the path "
        "at an earlier time (start_time 0.8 to 0.9)",
        high=0.4,
        after=20,
    ),
    Condition(
        "colour-shift",
        ("metric/student/mean_shift",),
        "the student's samples are brighter or darker than the teacher's, or tinted: lower guidance_scale or both "
        "rates; for flashes in a video look at the autoencoder's precision first",
        low=-0.5,
        high=0.5,
        after=20,
    ),
    Condition(
        "dead-discriminator",
        ("logit_gap",),
        "it sees no difference of data and samples: see that its heads are trained (discriminator_weight, critic_rate)",
        low=1e-5,
        after=10,
    ),
    Condition(
        "saturated-discriminator",
        ("metric/critic/discriminator_loss",),
        "it tells data and samples apart with certainty, and teaches nothing more: lower discriminator_weight",
        low=0.01,
        after=20,
    ),
    Condition(
        "no-guidance",
        ("metric/student/guidance_gap",),
        "the prompt changes nothing in the teacher's answer: see that the unconditional embedding is the encoded empty "
        "prompt, and that conditions reach the teacher",
        low=1e-4,
        after=10,  # one sample near the data, which says by itself what it is, hardly needs its prompt
        action="stop",
    ),
    Condition(
        "missing-unconditional",
        ("null/told", "null/filled"),
        "the unconditional embedding is that of the prompt, or zeros: encode the empty prompt (null_condition)",
        low=1,
        action="stop",
        flag=True,
    ),
    Condition(
        "low-variety",
        ("evaluate/variety",),
        "seeds of one prompt come out more alike than the teacher's: raise critic_updates, or another divergence",
        low=0.4,
        after=3,
    ),
    Condition(
        "drift",
        ("drift",),
        "the distance to the teacher was best earlier and rises, while samples are sharper than the teacher's: use "
        "the best student (OUT/best), --schedule cosine, or --patience",
        high=1.1,
        after=3,
        action="finish",
    ),
    Condition(
        "worse",
        ("behind",),
        "the distance to the teacher was far smaller earlier: use the best student (OUT/best), and train on with lower "
        "rates, --schedule cosine, or --patience",
        high=1.5,
        after=3,
    ),
)
"""In the order of the table."""


def condition(name: str) -> Condition:
    """The condition called `name`."""
    return next(each for each in CONDITIONS if each.name == name)
