// Segments in parallel; along a segment one value after the other, in double precision.
#include "segmented_scan/segmented_scan.h"
#include <algorithm>
#include <stdexcept>
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

namespace {

constexpr int64_t kSegmentsPerTask = 64;

void check_offsets(const int32_t* offsets, int64_t segments, int64_t count) {
  bool fine = offsets[0] == 0 && offsets[segments] <= count;
  for (int64_t n = 0; n < segments; ++n) fine &= offsets[n] <= offsets[n + 1];
  if (!fine) throw std::invalid_argument("offsets: expected to rise from 0 to at most the number of values");
}

template <bool kProduct, bool kExclusive>
void scan(const Segment& at, const float* values, float* out) {
  double running = kProduct ? 1 : 0;
  for (int64_t k = 0; k < at.length; ++k) {
    const int64_t i = at(k);
    const double before = running;
    running = kProduct ? running * values[i] : running + values[i];
    out[i] = float(kExclusive ? before : running);
  }
}

using Scan = void (*)(const Segment&, const float*, float*);

Scan pick_scan(bool product, bool exclusive) {
  if (product) return exclusive ? scan<true, true> : scan<true, false>;
  return exclusive ? scan<false, true> : scan<false, false>;
}

template <class Body>
void for_each_segment(int64_t segments, const Body& body) {
  parallel_for(segments, kSegmentsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment) body(segment);
  });
}

void fill_zero(float* target, int64_t begin, int64_t end) { std::fill(target + begin, target + end, 0.0f); }

}  // namespace

void segmented_scan_forward(const SegmentedScanForwardParams& p) {
  check_offsets(p.offsets, p.segments, p.count);
  const Scan run = pick_scan(p.product, p.exclusive);
  for_each_segment(p.segments, [&](int64_t segment) {
    run(segment_of(p.offsets, segment, p.count, p.reverse), p.values, p.out);
  });
  fill_zero(p.out, p.offsets[p.segments], p.count);
}

void segmented_scan_backward(const SegmentedScanBackwardParams& p) {
  check_offsets(p.offsets, p.segments, p.count);
  const int64_t ahead = p.exclusive ? 1 : 0;
  for_each_segment(p.segments, [&](int64_t segment) {
    const Segment at = segment_of(p.offsets, segment, p.count, p.reverse);
    scan<true, true>(at, p.values, p.grad_values);
    double behind = 0;  // x_{j+1} h_{j+1}
    for (int64_t j = at.length - 1; j >= 0; --j) {
      const int64_t i = at(j);
      const double h = behind + (j + ahead < at.length ? p.grad[at(j + ahead)] : 0.f);
      p.grad_values[i] = float(p.grad_values[i] * h);
      behind = p.values[i] * h;
    }
  });
  fill_zero(p.grad_values, p.offsets[p.segments], p.count);
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
