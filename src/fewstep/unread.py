"""Options that nothing reads are refused: a setting that does nothing is a mistake of whoever made it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from fewstep.errors import FewstepError


def refuse_unread(options: Any, names: Iterable[str], beside: str, *usual: Any) -> None:
    """Raises a FewstepError if one of `names`, which nothing reads here, has been set.

    Args:
        options: a dataclass.
        names: of its fields.
        beside: what would read them, for the error.
        usual: other options of its kind, such as a recipe's, whose values count as not set, as defaults do.
    """
    defaults = {entry.name: entry.default for entry in fields(options)}
    for name in names:
        value = getattr(options, name)
        if value != defaults[name] and all(value != getattr(other, name) for other in usual):
            raise FewstepError(
                f"found {name} = {value!r}, which nothing reads here, expected {beside} beside it, "
                f"fix: ask for that, or leave {name} at {defaults[name]!r}"
            )
