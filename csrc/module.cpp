// The Python module: one line per entry point, no logic of any op.
//
// From Python: _C.name(stream, *fields): stream is None for host memory, otherwise a CUDA stream's address; fields are
// the Params' members in the order of its fields(): addresses (0 for none), numbers, or sequences for fixed arrays.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <cstdlib>
#include <string>
#include "antialias/antialias.h"
#include "composite/composite.h"
#include "marching_tets/marching_tets.h"
#include "texture/texture.h"
#include "march_rays/march_rays.h"
#include "interpolate/interpolate.h"
#include "rasterize/rasterize.h"
#include "hash_grid/hash_grid.h"
#include "hash_mlp/hash_mlp.h"
#include "mlp/mlp.h"
#include "render_field/render_field.h"
#include "segmented_scan/segmented_scan.h"

// clang-format off
#define TEXT3D_ENTRIES(TEXT3D_ENTRY)                                    \
  /* hash_grid */                                                       \
  TEXT3D_ENTRY(hash_grid_forward, HashGridForwardParams)                \
  TEXT3D_ENTRY(hash_grid_backward, HashGridBackwardParams)              \
  TEXT3D_ENTRY(hash_grid_second, HashGridSecondParams)                  \
                                                                        \
  /* mlp */                                                             \
  TEXT3D_ENTRY(mlp_forward, MLPForwardParams)                           \
  TEXT3D_ENTRY(mlp_backward, MLPBackwardParams)                         \
  TEXT3D_ENTRY(mlp_second, MLPSecondParams)                             \
                                                                        \
  /* hash_mlp, render_field */                                          \
  TEXT3D_ENTRY(hash_mlp_forward, HashMLPForwardParams)                  \
  TEXT3D_ENTRY(hash_mlp_backward, HashMLPBackwardParams)                \
  TEXT3D_ENTRY(render_field_forward, RenderFieldForwardParams)          \
  TEXT3D_ENTRY(render_field_backward, RenderFieldBackwardParams)        \
                                                                        \
  /* occupancy, march, composite */                                     \
  TEXT3D_ENTRY(march_rays_count, MarchRaysParams)                       \
  TEXT3D_ENTRY(march_rays_emit, MarchRaysParams)                        \
  TEXT3D_ENTRY(composite_forward, CompositeForwardParams)               \
  TEXT3D_ENTRY(composite_backward, CompositeBackwardParams)             \
                                                                        \
  /* marching_tets */                                                   \
  TEXT3D_ENTRY(marching_tets_kuhn_flag, MarchingTetsKuhnFlagParams)     \
  TEXT3D_ENTRY(marching_tets_kuhn_emit, MarchingTetsKuhnEmitParams)     \
  TEXT3D_ENTRY(marching_tets_kuhn_backward, MarchingTetsKuhnBackwardParams)\
  TEXT3D_ENTRY(marching_tets_flag, MarchingTetsFlagParams)              \
  TEXT3D_ENTRY(marching_tets_emit, MarchingTetsEmitParams)              \
  TEXT3D_ENTRY(marching_tets_backward, MarchingTetsBackwardParams)      \
                                                                        \
  /* rasterize, interpolate */                                          \
  TEXT3D_ENTRY(rasterize_forward, RasterizeForwardParams)               \
  TEXT3D_ENTRY(rasterize_backward, RasterizeBackwardParams)             \
  TEXT3D_ENTRY(interpolate_forward, InterpolateForwardParams)           \
  TEXT3D_ENTRY(interpolate_backward, InterpolateBackwardParams)         \
                                                                        \
  /* texture, antialias */                                              \
  TEXT3D_ENTRY(antialias_forward, AntialiasParams)                      \
  TEXT3D_ENTRY(antialias_backward, AntialiasBackwardParams)             \
  TEXT3D_ENTRY(texture_forward, TextureParams)                          \
  TEXT3D_ENTRY(texture_backward, TextureBackwardParams)                 \
                                                                        \
  /* segmented_scan */                                                  \
  TEXT3D_ENTRY(segmented_scan_forward, SegmentedScanForwardParams)      \
  TEXT3D_ENTRY(segmented_scan_backward, SegmentedScanBackwardParams)    \
// clang-format on

namespace py = pybind11;

struct CUstream_st;
using Stream = CUstream_st*;  // cudaStream_t

namespace text3d {

namespace baseline {
#define TEXT3D_ENTRY(name, Params) void name(const Params&);
TEXT3D_ENTRIES(TEXT3D_ENTRY)
#undef TEXT3D_ENTRY
}  // namespace baseline
namespace avx2 {
#define TEXT3D_ENTRY(name, Params) void name(const Params&);
TEXT3D_ENTRIES(TEXT3D_ENTRY)
#undef TEXT3D_ENTRY
}  // namespace avx2
namespace avx512 {
#define TEXT3D_ENTRY(name, Params) void name(const Params&);
TEXT3D_ENTRIES(TEXT3D_ENTRY)
#undef TEXT3D_ENTRY
}  // namespace avx512
namespace cuda {
#define TEXT3D_ENTRY(name, Params) void name(const Params&, Stream);
TEXT3D_ENTRIES(TEXT3D_ENTRY)
#undef TEXT3D_ENTRY
}  // namespace cuda

namespace {

const char* pick_isa() {
#if TEXT3D_ISA_COUNT > 1
  const char* wanted = std::getenv("TEXT3D_CPU_ISA");
  const std::string limit = wanted ? wanted : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") return "avx512";
  if (avx2 && limit != "baseline") return "avx2";
#endif
  return "baseline";
}

const std::string kIsa = pick_isa();

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>> assign(T& field, py::handle value) {
  field = value.cast<T>();
}
template <class T>
void assign(T*& field, py::handle value) {
  field = reinterpret_cast<T*>(value.cast<std::uintptr_t>());
}
template <class T, int N>
void assign(Array<T, N>& field, py::handle value) {
  const auto sequence = value.cast<py::sequence>();
  if (sequence.size() > std::size_t(N)) throw std::invalid_argument("at most " + std::to_string(N) + " values fit");
  for (std::size_t i = 0; i < sequence.size(); ++i) assign(field.data[i], sequence[i]);
}

template <class T, std::size_t N>
void assign(T (&field)[N], py::handle value) {
  const auto sequence = value.cast<py::sequence>();
  if (sequence.size() > N) throw std::invalid_argument("at most " + std::to_string(N) + " values fit");
  for (std::size_t i = 0; i < sequence.size(); ++i) assign(field[i], sequence[i]);
}

template <class Params>
Params unpack(const char* name, const py::args& args) {
  Params params{};
  std::apply(
      [&](auto&... fields) {
        if (args.size() != sizeof...(fields))
          throw std::invalid_argument(std::string(name) + " takes " + std::to_string(sizeof...(fields)) + " fields, got " +
                                      std::to_string(args.size()));
        std::size_t i = 0;
        (assign(fields, args[i++]), ...);
      },
      params.fields());
  return params;
}

template <class Params>
void define(py::module_& module, const char* name, void (*cpu)(const Params&), void (*cuda)(const Params&, Stream)) {
  module.def(name, [=](const py::object& stream, const py::args& args) {
    const auto params = unpack<Params>(name, args);
    const bool on_gpu = !stream.is_none();
    const auto address = on_gpu ? stream.cast<std::uintptr_t>() : 0;
    if (on_gpu && !cuda) throw std::runtime_error("text3d_fast._C was built without CUDA");
    py::gil_scoped_release release;
    if (on_gpu) {
      cuda(params, reinterpret_cast<Stream>(address));
    } else {
      cpu(params);
    }
  });
}

}  // namespace
}  // namespace text3d

#if TEXT3D_ISA_COUNT > 1
#define TEXT3D_CPU(name) \
  (kIsa == "avx512" ? &text3d::avx512::name : kIsa == "avx2" ? &text3d::avx2::name : &text3d::baseline::name)
#else
#define TEXT3D_CPU(name) &text3d::baseline::name
#endif
#if TEXT3D_WITH_CUDA
#define TEXT3D_GPU(name) &text3d::cuda::name
#else
#define TEXT3D_GPU(name) nullptr
#endif

PYBIND11_MODULE(TEXT3D_MODULE, module) {
  using namespace text3d;
  module.attr("cpu_isa") = kIsa;
  module.attr("has_cuda") = bool(TEXT3D_WITH_CUDA);
  module.attr("emulated") = bool(TEXT3D_EMULATED);
#define TEXT3D_ENTRY(name, Params) define<Params>(module, #name, TEXT3D_CPU(name), TEXT3D_GPU(name));
  TEXT3D_ENTRIES(TEXT3D_ENTRY)
#undef TEXT3D_ENTRY
}
