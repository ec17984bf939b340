"""Options of any values, from Python: accepted, or refused in a paragraph, and quickly."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.fuzzing import NUMBERS, cases, outcome

from fewstep.api import RoleOptions
from fewstep.methods import METHODS, preset
from fewstep.methods.base import Needs
from fewstep.training.options import TrainOptions

COUNTS = st.integers(-2, 12) | st.sampled_from([1001, 2**31, 2**63, 10**30])


def values(kind: type, name: str) -> st.SearchStrategy[Any]:
    """Values that the command line could hand to this field, sound or not."""
    hint = get_type_hints(kind)[name]
    if is_dataclass(hint):
        return changes(hint).map(lambda told: hint(**told))  # type: ignore[arg-type]
    choices = [get_args(one) for one in (hint, *get_args(hint)) if get_origin(one) is Literal]
    if choices:
        return st.sampled_from([*choices[0], "nonsense"])
    if "tuple" in str(hint):
        each = COUNTS if "int" in str(hint) else st.floats()
        size = 2 if name == "ratio_clip" else None
        return st.lists(each, min_size=size or 0, max_size=size or 5).map(tuple)
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.text(max_size=5)
    if "float" in str(hint):
        return NUMBERS.map(float) | st.floats()
    return COUNTS


@st.composite
def changes(draw: Any, kind: type) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from([entry.name for entry in fields(kind)]), max_size=4, unique=True))
    return {name: draw(values(kind, name)) for name in names}


def test_options_of_methods() -> None:
    @cases("options of methods")
    @given(name=st.sampled_from(sorted(METHODS)), data=st.data())
    def fuzz(name: str, data: st.DataObject) -> None:
        options: Any = replace(preset(name), **data.draw(changes(type(preset(name)))))  # type: ignore[type-var]

        def use() -> None:
            method = options.build()
            assert all(torch.isfinite(options.time_grid(count)).all() for count in options.counts)
            assert 0 < method.forwards() < float("inf")

        outcome(use)

    fuzz()


def test_options_of_the_trainer_and_of_roles() -> None:
    @cases("options of trainer and roles")
    @given(
        train=changes(TrainOptions), roles=changes(RoleOptions), needs=st.builds(Needs, st.booleans(), st.booleans())
    )
    def fuzz(train: dict[str, Any], roles: dict[str, Any], needs: Needs) -> None:
        def use() -> None:
            options = TrainOptions(**train)
            options.validate()
            assert all(0 <= options.rate(role, n) < float("inf") for role in ("student", "critic") for n in (1, 2, 400))

        outcome(use)
        outcome(lambda: RoleOptions(**roles).validate(needs))

    fuzz()
