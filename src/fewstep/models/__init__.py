"""Networks: backbones around diffusers pipelines, the three roles, export. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BACKBONES": "backbone",
    "Backbone": "backbone",
    "load_backbone": "loading",
    "register_backbone": "backbone",
    "seeded_noise": "backbone",
    "FunctionTeacher": "function_teacher",
    "Recipe": "recipes",
    "Setting": "recipes",
    "Roles": "roles",
    "build_roles": "roles",
    "Sampling": "schedulers",
    "choose_scheduler": "schedulers",
    "save_pipeline": "export",
    "save_student": "export",
    "Student": "student",
    "load_student": "student",
    "StepsAwarePixArtPipeline": "steps_aware",
    "StepsAwarePixArtTransformer2DModel": "steps_aware",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
