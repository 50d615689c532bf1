"""Text to 3D.

Names are imported when they are first used, so that light commands stay light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from text3d_fast.pipelines.config import DreamFusionConfig, Magic3DConfig, ProlificDreamerConfig
    from text3d_fast.pipelines.dreamfusion import DreamFusion
    from text3d_fast.pipelines.magic3d import Magic3D
    from text3d_fast.pipelines.prolificdreamer import ProlificDreamer
    from text3d_fast.pipelines.results import Result

__all__ = [
    "DreamFusion", "DreamFusionConfig", "Magic3D", "Magic3DConfig", "ProlificDreamer", "ProlificDreamerConfig",
    "Result",
]

_HOMES = {
    "DreamFusion": "dreamfusion", "DreamFusionConfig": "config", "Magic3D": "magic3d", "Magic3DConfig": "config",
    "ProlificDreamer": "prolificdreamer", "ProlificDreamerConfig": "config", "Result": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
