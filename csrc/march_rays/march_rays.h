// Cutting rays into intervals on a lattice of times, keeping those whose middle lies in an occupied cell.
//   t_0 = near + jitter * step,  t_{k+1} = t_k + max(step, cone_angle * t_k);  interval k is [t_k, min(t_{k+1}, far)]
// in closed form: linear in k up to the bend, where cone_angle * t reaches step, geometric after it. A ray's part inside
// the outermost box is set up once in double precision; after that single precision is exact enough at any distance,
// because it only counts from where the ray enters the box.
#pragma once
#include "common/host_device.h"

namespace text3d {

struct MarchRay {
  float position[3];  // at the base time, in box units: the box of level 0 is [-1, 1]^3
  float velocity[3];  // box units per t
  float time_high, time_low;  // their sum is the base time, where the first interval below starts
  float far;
  float tail_middle;  // time from the base to the middle of the last interval, if far cuts it short; otherwise negative
  int32_t count;      // intervals to test, the cut one included; 0 for a miss
  float bend;         // cone_angle > 0: intervals before the bend
  double bend_time;   // cone_angle > 0: time at the bend
};

constexpr int32_t kMarchRunSlots = 24;   // runs of samples that the CPU's first pass remembers for the second, per ray
struct MarchRuns {
  int32_t used, next;                    // runs in use; the interval at which the walk goes on
  int32_t first[kMarchRunSlots], length[kMarchRunSlots];
};

// Entries of info; from kMarchTiles on, CUDA: samples of each 1024 rays.
enum MarchInfo { kMarchFound, kMarchNotFinite, kMarchTooManySteps, kMarchTooManySamples, kMarchTiles };

struct MarchRaysParams {
  const float* origins;      // [R, 3]
  const float* directions;   // [R, 3]
  const uint8_t* binaries;   // [levels, x, y, z]
  const float* aabb;         // [6]
  const float* near;         // [R], or null: near_number
  const float* far;          // [R], or null: far_number
  const float* jitter;       // [R], or null: 0
  uint32_t* bits;            // [(cells of all levels + 31) / 32], scratch
  uint8_t* blocks;           // CPU: [levels, (x + 7) / 8, (y + 7) / 8, (z + 7) / 8], scratch: is anything in the block?
  MarchRay* rays;            // [R], scratch
  MarchRuns* runs;           // CPU: [R], scratch
  int32_t* ray_offsets;      // [R + 1]
  int64_t* info;             // [4]: samples found, then flags: wrong rays, rays with too many steps, too many samples;
                             // CUDA: and one for each 1024 rays, scratch
  uint8_t* overflow;         // []: more found than capacity
  int32_t* ray_ids;          // [capacity]; written by march_rays_emit, as the two below
  float* t_starts;           // [capacity]
  float* t_ends;             // [capacity]
  int64_t ray_count;
  int64_t capacity;          // room for samples; -1 while counting in exact mode
  int32_t levels, x, y, z;
  double near_number, far_number, step, cone_angle;
  auto fields() {
    return std::tie(origins, directions, binaries, aabb, near, far, jitter, bits, blocks, rays, runs, ray_offsets, info,
                    overflow, ray_ids, t_starts, t_ends, ray_count, capacity, levels, x, y, z, near_number, far_number,
                    step, cone_angle);
  }
};

namespace TEXT3D_ISA {

constexpr int32_t kMarchMaxSteps = 1 << 24;  // per ray inside the box: beyond, single precision cannot count them
constexpr double kMarchLastTime = 1e38;      // times beyond would not fit single precision

TEXT3D_HD double bits_to_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double((long long)bits);
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// 2^x to double precision for |x| < 1000, without a library call, so that loops over it vectorize.
TEXT3D_HD double exp2_exactly(double x) {
  x = x < -1000. ? -1000. : x > 1000. ? 1000. : x;
  const int32_t whole = int32_t(x + (x < 0 ? -0.5 : 0.5));
  const double y = (x - whole) * 0.69314718055994530942;  // |y| <= 0.35: twelve Taylor terms leave 2e-16
  double sum = 1. / 479001600;
  sum = sum * y + 1. / 39916800;
  sum = sum * y + 1. / 3628800;
  sum = sum * y + 1. / 362880;
  sum = sum * y + 1. / 40320;
  sum = sum * y + 1. / 5040;
  sum = sum * y + 1. / 720;
  sum = sum * y + 1. / 120;
  sum = sum * y + 1. / 24;
  sum = sum * y + 1. / 6;
  sum = sum * y + 0.5;
  sum = sum * y + 1.;
  sum = sum * y + 1.;
  return sum * bits_to_double(uint64_t(whole + 1023) << 52);
}

TEXT3D_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);  // spelled out: the counting and the writing kernel must round alike
#else
  return a * b + c;
#endif
}

// Time from the base to the start of interval j (j + 0.5: its middle, when the lattice is linear).
template <bool kCone>
TEXT3D_HD float lattice_time(const MarchRay& ray, float step, double cone_rate, float j) {
  if (!kCone) return j * step;
  const double beyond = double(j) - double(ray.bend), linear = double(j) * step;
  const double base = ray.bend_time - double(ray.bend) * step;
  const double geometric = ray.bend_time * exp2_exactly(beyond * cone_rate) - base;
  return float(beyond > 0. ? geometric : linear);
}

template <bool kCone>
TEXT3D_HD float lattice_middle(const MarchRay& ray, float step, double cone_rate, int32_t j) {
  if (!kCone) return (float(j) + 0.5f) * step;
  return 0.5f * (lattice_time<true>(ray, step, cone_rate, float(j)) +
                 lattice_time<true>(ray, step, cone_rate, float(j + 1)));
}

TEXT3D_HD float absolute_time(const MarchRay& ray, float since_base) { return ray.time_high + (ray.time_low + since_base); }

struct MarchGrid {
  const uint32_t* bits;
  int32_t last_level;
  float outermost;     // half the edge of the outermost box, in box units
  int32_t size[3];
  float half_size[3];
};

// Half the edge of the outermost box; at most 64 levels (text3d_fast/ops/march_rays.py sees to that).
TEXT3D_HD float outermost_of(int32_t levels) { return bits_to_float(uint32_t(126 + levels) << 23); }

TEXT3D_HD MarchGrid march_grid(const MarchRaysParams& p) {
  MarchGrid grid{p.bits, p.levels - 1, outermost_of(p.levels), {p.x, p.y, p.z}, {}};
  for (int a = 0; a < 3; ++a) grid.half_size[a] = 0.5f * float(grid.size[a]);
  return grid;
}

// The innermost level whose box holds a point at this distance (maximum norm) from the centre.
TEXT3D_HD int32_t level_of(const MarchGrid& grid, float reach) {
  const int32_t level = int32_t(float_to_bits(reach) >> 23) - 126;
  return level < 0 ? 0 : level > grid.last_level ? grid.last_level : level;
}

// Cell coordinate of a point of a level; floats are clamped before they become integers.
TEXT3D_HD int32_t cell_of(float x, float scale, float half_size, int32_t size) {
  return int32_t(clamp(multiply_add(x * scale, half_size, half_size), 0.f, float(size - 1)));
}

// 1 if the ray's point at this time after its base lies in an occupied cell, otherwise 0.
template <bool kNested>
TEXT3D_HD uint32_t occupied_at(const MarchGrid& grid, const MarchRay& ray, float time) {
  const float x = multiply_add(ray.velocity[0], time, ray.position[0]);
  const float y = multiply_add(ray.velocity[1], time, ray.position[1]);
  const float z = multiply_add(ray.velocity[2], time, ray.position[2]);
  const float reach = max_of(fabsf(x), max_of(fabsf(y), fabsf(z)));
  const int32_t level = kNested ? level_of(grid, reach) : 0;
  const float scale = kNested ? bits_to_float(uint32_t(127 - level) << 23) : 1.f;
  const uint32_t i = cell_of(x, scale, grid.half_size[0], grid.size[0]);
  const uint32_t j = cell_of(y, scale, grid.half_size[1], grid.size[1]);
  const uint32_t k = cell_of(z, scale, grid.half_size[2], grid.size[2]);
  const uint32_t row = (uint32_t(level) * grid.size[0] + i) * grid.size[1] + j;
  const uint32_t cell = row * grid.size[2] + k;
  return (grid.bits[cell >> 5] >> (cell & 31u)) & uint32_t(reach <= grid.outermost);
}

// The lattice as a function of the absolute index k, in double precision; used once a ray.
struct MarchLattice {
  double first, step, cone_angle, bend, bend_time, log_growth;

  TEXT3D_HD MarchLattice(double first, double step, double cone_angle) : first(first), step(step), cone_angle(cone_angle) {
    bend = 0., bend_time = first, log_growth = 1.;
    if (cone_angle > 0.) {
      bend = ceil((step / cone_angle - first) / step);
      bend = bend > 0. ? bend : 0.;
      bend_time = first + bend * step;
      log_growth = log1p(cone_angle);
    }
  }
  TEXT3D_HD double time(double k) const {
    if (cone_angle > 0. && k > bend) return bend_time * exp((k - bend) * log_growth);
    return first + k * step;
  }
  TEXT3D_HD double index(double t) const {
    if (cone_angle > 0. && t > bend_time) return bend + log(t / bend_time) / log_growth;
    return (t - first) / step;
  }
};

TEXT3D_HD bool is_finite(double x) { return x - x == 0.; }

// Fill in the ray's state; returns 0, or the index in info of the flag to raise.
TEXT3D_HD int set_up_ray(const MarchRaysParams& p, int64_t r, MarchRay& ray) {
  const double infinity = bits_to_double(0x7ff0000000000000ull);
  ray = MarchRay{};
  ray.tail_middle = -1.f;
  const double near = p.near ? double(p.near[r]) : p.near_number, far = p.far ? double(p.far[r]) : p.far_number;
  const double jitter = p.jitter ? double(p.jitter[r]) : 0.;
  const MarchLattice lattice(near + jitter * p.step, p.step, p.cone_angle);
  double enter = lattice.first, leave = far;
  const bool nothing = near >= far;  // however infinite they are
  bool finite = (is_finite(lattice.first) || nothing) && far == far && jitter >= 0. && jitter < 1., moves = false;
  double position[3], velocity[3];
  for (int a = 0; a < 3; ++a) {
    const double low = p.aabb[a], high = p.aabb[a + 3], half = 0.5 * (high - low), outermost = outermost_of(p.levels);
    position[a] = (double(p.origins[3 * r + a]) - 0.5 * (low + high)) / half;
    velocity[a] = double(p.directions[3 * r + a]) / half;
    finite = finite && half > 0. && is_finite(position[a]) && is_finite(velocity[a]);
    if (velocity[a] == 0.) {
      if (!(fabs(position[a]) <= outermost)) leave = -infinity;
      continue;
    }
    moves = true;
    const double t0 = (-outermost - position[a]) / velocity[a], t1 = (outermost - position[a]) / velocity[a];
    const double t_low = t0 < t1 ? t0 : t1, t_high = t0 < t1 ? t1 : t0;
    if (t_low > enter) enter = t_low;
    if (t_high < leave) leave = t_high;
  }
  if (!finite) return kMarchNotFinite;
  if (!moves || nothing || !(enter < leave)) return 0;
  if (!(fabs(enter) < kMarchLastTime && fabs(leave) < kMarchLastTime)) return kMarchNotFinite;

  // One interval more on each side than needed: the test of the middle decides.
  double begin = floor(lattice.index(enter)) - 1., end = ceil(lattice.index(leave)) + 1.;
  if (begin < 0.) begin = 0.;
  bool tail = false;
  if (lattice.time(end) > far) {  // some candidates may begin beyond far, and one may be cut
    end -= 4.;
    if (end < begin) end = begin;
    for (int i = 0; i < 6 && lattice.time(end) < far; ++i) end += 1.;
    tail = lattice.time(end) > far;
  }
  if (!(end > begin)) return 0;
  if (!(end - begin < double(kMarchMaxSteps))) return kMarchTooManySteps;

  const double base = lattice.time(begin);
  ray.count = int32_t(end - begin);
  ray.time_high = float(base);
  ray.time_low = float(base - double(ray.time_high));
  ray.far = float(far);
  for (int a = 0; a < 3; ++a) {
    ray.position[a] = float(position[a] + base * velocity[a]);
    ray.velocity[a] = float(velocity[a]);
  }
  if (tail) ray.tail_middle = float(0.5 * (lattice.time(end - 1.) + far) - base);
  const double bend = lattice.bend - begin;
  ray.bend = bend <= 0. ? 0.f : bend > double(kMarchMaxSteps) ? float(kMarchMaxSteps) : float(bend);
  ray.bend_time = base + double(ray.bend) * p.step;
  return 0;
}

TEXT3D_HD uint32_t pack_word(const uint8_t* binaries, int64_t cells, int64_t word) {
  uint32_t bits = 0;
  const int64_t begin = word * 32, count = cells - begin < 32 ? cells - begin : 32;
  for (int64_t i = 0; i < count; ++i) bits |= uint32_t(binaries[begin + i] != 0) << i;
  return bits;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
