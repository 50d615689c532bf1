"""DreamFusion (Poole et al., 2022): a radiance field whose pictures, from every side, please an image prior."""

from __future__ import annotations

from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.pipeline import Pipeline
from text3d_fast.pipelines.volume_stage import VolumeStage


class DreamFusionStage(VolumeStage):
    """The paper's one stage is what `VolumeStage` does."""

    name = "dreamfusion"


class DreamFusion(Pipeline):
    """Text to a mesh by score distillation; arguments as `Pipeline`."""

    config_type = DreamFusionConfig
    stages = (DreamFusionStage,)
