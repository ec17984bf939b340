"""fewstep: distil diffusion and flow models into students that need 1-8 network calls.

    teacher = fewstep.load_teacher("emoji")
    student = fewstep.distill(teacher, "tdm", out="runs/first")
    images = fewstep.sample(student, ["a 3d frog on a blue background"], steps=4)

Names are imported when first used, so that `import fewstep` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = dict.fromkeys(("distill", "evaluate", "load_student", "load_teacher", "sample"), "fewstep.api")
_API["reproduce"] = "fewstep.reproducing"
__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)
