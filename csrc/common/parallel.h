// Threads of the CPU kernels: OpenMP, the runtime that torch has already mapped, so torch.set_num_threads holds here too.
#pragma once
#include <cstdint>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

inline int thread_count() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// body(begin, end) over [0, n) in chunks of at least `grain`; chunk borders do not depend on the number of threads,
// so a body that is deterministic within a chunk is deterministic altogether. A body may throw std::bad_alloc only: it may
// not leave an OpenMP region, which would end the process, so the loop ends early and it is thrown again here.
template <class Body>
inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const int64_t chunks = (n + grain - 1) / grain;
#if defined(_OPENMP)
  if (chunks > 1 && thread_count() > 1) {
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) continue;
      const int64_t begin = chunk * grain, end = begin + grain;
      try {
        body(begin, end < n ? end : n);
      } catch (const std::bad_alloc&) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * grain, end = begin + grain;
    body(begin, end < n ? end : n);
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
