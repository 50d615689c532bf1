// A small host emulation of a CUDA block, for checking the sources of cooperative kernels without a GPU.
//
// setup.py includes this ahead of every .cu file when TEXT3D_EMULATE=1. Each thread of a block is a fiber; fibers switch
// only at barriers and warp operations. Successive launches run the threads in ascending, descending and shuffled order
// (ascending alone hides missing barriers); shared memory starts poisoned; a barrier that not every thread of the block
// reaches, or that threads reach at different lines, is an error. Not emulated: data races within one phase (racecheck
// on a GPU finds those), timing, and code behind #if defined(__CUDA_ARCH__).
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define TEXT3D_EMULATE 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static

struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace text3d_emulation {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const char* waiting_file = nullptr;  // null: runnable
  int waiting_line = 0;
  unsigned waiting_mask = 0;           // 0: the whole block, otherwise lanes of this warp
  bool done = false;
};

struct Fragment {  // of the operands of an mma instruction, of one lane
  uint32_t a[4], b[2];
};

struct Block {
  static constexpr std::size_t kStack = 64 << 10;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> slots;  // one exchange slot a thread, for warp operations
  std::vector<Fragment> fragments;
  std::unordered_map<const void*, std::vector<uint64_t>> shared;
  std::vector<uint64_t> dynamic_shared;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string error;
  unsigned current = 0;
};

inline Block* block = nullptr;
inline unsigned launches = 0;

inline void set_thread(unsigned index) {
  block->current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
}

// Order of threads, or of elements: ascending, descending, shuffled; turn by turn over the launches.
inline std::vector<int64_t> order(int64_t n) {
  std::vector<int64_t> indices(n);
  std::iota(indices.begin(), indices.end(), int64_t(0));
  if (launches % 3 == 1) std::reverse(indices.begin(), indices.end());
  if (launches % 3 == 2) {
    uint64_t state = 88172645463325252ull + launches;
    for (int64_t i = n - 1; i > 0; --i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      std::swap(indices[i], indices[state % uint64_t(i + 1)]);
    }
  }
  return indices;
}

inline void wait(unsigned mask, const char* file, int line) {
  Fiber& self = block->fibers[block->current];
  self.waiting_mask = mask, self.waiting_line = line, self.waiting_file = file;
  const unsigned index = block->current;
  swapcontext(&self.context, &block->scheduler);
  set_thread(index);
}

inline void fiber_main() {
  const unsigned index = block->current;
  try {
    block->body();
  } catch (const std::exception& failure) {
    block->error = failure.what();
  }
  block->fibers[index].done = true;
  swapcontext(&block->fibers[index].context, &block->scheduler);
}

// Release the fibers of [begin, end) selected by mask if all of them wait at one place; 0 mask selects all.
inline bool release(std::size_t begin, std::size_t end, unsigned mask) {
  const Fiber* first = nullptr;
  for (std::size_t i = begin; i < end; ++i) {
    if (mask && !(mask >> (i - begin) & 1u)) continue;
    const Fiber& fiber = block->fibers[i];
    if (fiber.done || !fiber.waiting_file || fiber.waiting_mask != mask) return false;
    if (!first) first = &fiber;
    if (fiber.waiting_line != first->waiting_line || fiber.waiting_file != first->waiting_file) return false;
  }
  if (!first) return false;
  for (std::size_t i = begin; i < end; ++i)
    if (!mask || (mask >> (i - begin) & 1u)) block->fibers[i].waiting_file = nullptr;
  return true;
}

inline void run_block(std::size_t dynamic_bytes) {
  const std::size_t threads = std::size_t(blockDim.x) * blockDim.y * blockDim.z;
  block->shared.clear();
  block->dynamic_shared.assign(dynamic_bytes / 8 + 1, 0x7ff8dead7fc0deadull);  // NaN as a double and as two floats
  block->slots.assign(threads, 0);
  block->fragments.resize(threads);
  const auto sequence = order(int64_t(threads));
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.done = false, fiber.waiting_file = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Block::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (true) {
    bool moved = false, finished = true;
    for (const int64_t i : sequence) {
      Fiber& fiber = block->fibers[i];
      if (fiber.done || fiber.waiting_file) continue;
      set_thread(unsigned(i));
      swapcontext(&block->scheduler, &fiber.context);
      if (!block->error.empty()) throw std::runtime_error(block->error);
      moved = true;
    }
    for (std::size_t warp = 0; warp < threads; warp += 32)
      for (std::size_t i = warp; i < std::min(warp + 32, threads); ++i) {
        const Fiber& fiber = block->fibers[i];
        if (!fiber.done && fiber.waiting_file && fiber.waiting_mask)
          moved |= release(warp, std::min(warp + 32, threads), fiber.waiting_mask);
      }
    moved |= release(0, threads, 0);
    for (const Fiber& fiber : block->fibers) finished &= fiber.done;
    if (finished) return;
    if (!moved) {
      std::string message = "emulated block is stuck at a barrier or warp operation that not every thread reaches:";
      for (std::size_t i = 0; i < threads && message.size() < 600; ++i) {
        const Fiber& fiber = block->fibers[i];
        message += "\n  thread " + std::to_string(i) + ": " +
                   (fiber.done ? "exited" : std::string(fiber.waiting_file) + ":" + std::to_string(fiber.waiting_line));
      }
      throw std::runtime_error(message);
    }
  }
}

inline void launch(dim3 grid, dim3 block_size, std::size_t dynamic_bytes, std::function<void()> body) {
  Block state;
  block = &state;
  const std::size_t threads = std::size_t(block_size.x) * block_size.y * block_size.z;
  state.fibers.resize(threads);
  for (auto& fiber : state.fibers) fiber.stack.reset(new char[Block::kStack]);
  state.body = std::move(body);
  gridDim = grid, blockDim = block_size;
  for (const int64_t i : order(int64_t(grid.x) * grid.y * grid.z)) {
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (int64_t(grid.x) * grid.y)));
    run_block(dynamic_bytes);
  }
  ++launches;
  block = nullptr;
}

// Whether any thread of the block says so.
inline int any_of_block(bool predicate, const char* file, int line) {
  block->slots[block->current] = predicate;
  wait(0u, file, line);
  int any = 0;
  for (const uint64_t slot : block->slots) any |= int(slot != 0);
  wait(0u, file, -line);
  return any;
}

inline void* shared(const void* site, std::size_t bytes) {
  auto& memory = block->shared[site];
  if (memory.empty()) memory.assign(bytes / 8 + 1, 0x7ff8dead7fc0deadull);
  return memory.data();
}

inline std::size_t warp_begin() { return block->current / 32 * 32; }
inline unsigned lane() { return block->current % 32; }

// Deposit a value, wait for all lanes of the mask, read with `pick(lane values)`, wait until all have read.
template <class T, class Pick>
inline auto exchange(unsigned mask, T value, const char* file, int line, const Pick& pick) {
  static_assert(sizeof(T) <= 8);
  const std::size_t threads = block->fibers.size(), begin = warp_begin();
  if (threads - begin < 32) mask &= (1u << (threads - begin)) - 1u;
  if (!(mask >> lane() & 1u)) throw std::runtime_error("a lane calls a warp operation whose mask leaves it out");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  block->slots[block->current] = bits;
  wait(mask, file, line);
  const auto read = [&](unsigned source) {
    T out;
    const std::size_t index = begin + source;
    if (source > 31 || index >= threads || !(mask >> source & 1u)) return value;
    std::memcpy(&out, &block->slots[index], sizeof out);
    return out;
  };
  const auto result = pick(read, mask);
  wait(mask, file, -line);
  return result;
}

template <class T>
inline T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  return exchange(mask, value, file, line, [&](const auto& read, unsigned) { return read(unsigned(source)); });
}

inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  return exchange(mask, int(predicate), file, line, [](const auto& read, unsigned lanes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes >> i & 1u) bits |= unsigned(read(i) != 0) << i;
    return bits;
  });
}

template <class T>
inline unsigned match_any(unsigned mask, T value, const char* file, int line) {
  return exchange(mask, value, file, line, [&](const auto& read, unsigned lanes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes >> i & 1u) bits |= unsigned(read(i) == value) << i;
    return bits;
  });
}

template <class T, class Combine>
inline T reduce(unsigned mask, T value, const char* file, int line, const Combine& combine) {
  return exchange(mask, value, file, line, [&](const auto& read, unsigned lanes) {
    bool first = true;
    T total{};
    for (unsigned i = 0; i < 32; ++i) {
      if (!(lanes >> i & 1u)) continue;
      total = first ? read(i) : combine(total, read(i));
      first = false;
    }
    return total;
  });
}

// Roundings and products of tensor cores.
inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline uint32_t round_tf32(float x) {
  const uint32_t u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}
inline uint32_t round_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, u = bits & 0x7fffffffu;
  if (u >= 0x477ff000u) return sign | (u > 0x7f800000u ? 0x7e00u : 0x7c00u);
  if (u < 0x38800000u) return sign | uint32_t(std::nearbyint(float_of(u) * 16777216.f));
  return sign | (u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13;
}
inline uint32_t round_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
inline uint32_t round_pair(bool half, float low, float high) {
  return half ? round_half(low) | round_half(high) << 16 : round_bfloat16(low) | round_bfloat16(high) << 16;
}
inline float from_half(uint32_t bits) {
  const float magnitude = float_of((bits & 0x7fffu) << 13) * 5.192296858534828e33f;  // 2^112
  const float value = (bits & 0x7c00u) == 0x7c00u ? float_of((bits & 0x3ffu) << 13 | 0x7f800000u) : magnitude;
  return bits & 0x8000u ? -value : value;
}

// kind: 0 tf32 (k of 8), 1 half, 2 bfloat16 (k of 16)
inline void mma(int kind, float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  Fragment& own = block->fragments[block->current];
  std::memcpy(own.a, a, sizeof own.a), std::memcpy(own.b, b, sizeof own.b);
  wait(~0u, file, line);
  const Fragment* lanes = &block->fragments[warp_begin()];
  const unsigned g = lane() / 4, t = lane() % 4;
  const auto read = [&](const uint32_t* registers, unsigned k) {  // of the lane that has it
    if (kind == 0) return float_of(registers[0]);
    const uint32_t bits = registers[0] >> (k % 2 * 16) & 0xffffu;
    return kind == 1 ? from_half(bits) : float_of(bits << 16);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < (kind == 0 ? 8u : 16u); ++k) {
      const unsigned place = kind == 0 ? k % 4 : k % 8 / 2, part = kind == 0 ? k / 4 : k / 8;
      sum += double(read(&lanes[row % 8 * 4 + place].a[row / 8 + 2 * part], k)) *
             double(read(&lanes[column * 4 + place].b[part], k));
    }
    d[i] = float(sum);
  }
  wait(~0u, file, -line);
}

// Fibers switch only at barriers, so a plain read-modify-write is atomic.
template <class T, class U>
inline T add(T* target, U value) { T old = *target; *target = T(old + T(value)); return old; }
template <class T, class U>
inline T minimum(T* target, U value) { T old = *target; if (T(value) < old) *target = T(value); return old; }
template <class T, class U>
inline T maximum(T* target, U value) { T old = *target; if (old < T(value)) *target = T(value); return old; }

}  // namespace text3d_emulation

#define __syncthreads() ::text3d_emulation::wait(0u, __FILE__, __LINE__)
#define __syncthreads_or(predicate) ::text3d_emulation::any_of_block(bool(predicate), __FILE__, __LINE__)
#define __syncwarp(...) ::text3d_emulation::ballot(~0u __VA_OPT__(& __VA_ARGS__), true, __FILE__, __LINE__)
#define __shfl_sync(mask, value, source) ::text3d_emulation::shuffle(mask, value, int(source), __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  ::text3d_emulation::shuffle(mask, value, int(::text3d_emulation::lane() ^ unsigned(bits)), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, by)                                                                          \
  ::text3d_emulation::shuffle(mask, value,                                                                       \
                              int(::text3d_emulation::lane()) - int(by) < 0 ? int(::text3d_emulation::lane())    \
                                                                            : int(::text3d_emulation::lane()) - int(by), \
                              __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, by) \
  ::text3d_emulation::shuffle(mask, value, std::min(int(::text3d_emulation::lane()) + int(by), 63), __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) ::text3d_emulation::ballot(mask, bool(predicate), __FILE__, __LINE__)
#define __any_sync(mask, predicate) (::text3d_emulation::ballot(mask, bool(predicate), __FILE__, __LINE__) != 0)
#define __all_sync(mask, predicate) (::text3d_emulation::ballot(mask, !bool(predicate), __FILE__, __LINE__) == 0)
#define __match_any_sync(mask, value) ::text3d_emulation::match_any(mask, value, __FILE__, __LINE__)
#define __reduce_add_sync(mask, value) \
  ::text3d_emulation::reduce(mask, value, __FILE__, __LINE__, [](auto a, auto b) { return a + b; })
#define __reduce_min_sync(mask, value) \
  ::text3d_emulation::reduce(mask, value, __FILE__, __LINE__, [](auto a, auto b) { return a < b ? a : b; })
#define __reduce_max_sync(mask, value) \
  ::text3d_emulation::reduce(mask, value, __FILE__, __LINE__, [](auto a, auto b) { return a < b ? b : a; })

template <class T, class U> inline T atomicAdd(T* p, U v) { return text3d_emulation::add(p, v); }
template <class T, class U> inline T atomicSub(T* p, U v) { return text3d_emulation::add(p, T(0) - T(v)); }
template <class T, class U> inline T atomicMin(T* p, U v) { return text3d_emulation::minimum(p, v); }
template <class T, class U> inline T atomicMax(T* p, U v) { return text3d_emulation::maximum(p, v); }
template <class T, class U> inline T atomicOr(T* p, U v) { T old = *p; *p = T(old | T(v)); return old; }
template <class T, class U> inline T atomicAnd(T* p, U v) { T old = *p; *p = T(old & T(v)); return old; }
template <class T, class U> inline T atomicExch(T* p, U v) { T old = *p; *p = T(v); return old; }
template <class T, class U, class V> inline T atomicCAS(T* p, U seen, V v) { T old = *p; if (old == T(seen)) *p = T(v); return old; }

inline void __threadfence() {}
inline void __threadfence_block() {}
// A GPU faults at a vector load from an address that is not a multiple of the vector's size.
template <class T> inline T __ldg(const T* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) throw std::runtime_error("a load from an address that is not aligned");
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
inline float __int_as_float(int v) { return __uint_as_float(unsigned(v)); }
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float __saturatef(float v) { return v < 0.f ? 0.f : v > 1.f ? 1.f : v; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

#define TEXT3D_LAUNCH(kernel, grid, block_size, shared_bytes, stream, ...) \
  ::text3d_emulation::launch((grid), (block_size), (shared_bytes), [&] { kernel(__VA_ARGS__); }), (void)(stream)
#define TEXT3D_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::text3d_emulation::block->dynamic_shared.data())
#define TEXT3D_SHARED(type, name, count) \
  static char name##_site;               \
  type* name = static_cast<type*>(::text3d_emulation::shared(&name##_site, sizeof(type) * (count)))

namespace text3d {
namespace cuda {

template <class Functor>
inline void launch(int64_t n, const Functor& functor, cudaStream_t, int = 256) {
  for (const int64_t i : text3d_emulation::order(n)) functor(i);
  ++text3d_emulation::launches;
}

inline void check_launch(const char*) {}

}  // namespace cuda
}  // namespace text3d
