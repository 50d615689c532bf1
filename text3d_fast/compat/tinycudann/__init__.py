"""tiny-cuda-nn's PyTorch interface on the library's own ops: CPU and CUDA, second order through everything.

    import text3d_fast.compat.tinycudann as tcnn

Configurations, layouts of `params` and initial values are the original's; docs/dropins.md says what differs.
"""

from text3d_fast.compat.tinycudann.modules import (
    Encoding,
    Network,
    NetworkWithInputEncoding,
    free_temporary_memory,
    rtc_set_cache_dir,
    supports_jit_fusion,
)

__all__ = ["Encoding", "Network", "NetworkWithInputEncoding", "free_temporary_memory", "rtc_set_cache_dir",
           "supports_jit_fusion"]
