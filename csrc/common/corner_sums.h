// Gradients to the corners of triangles from many pixels, on a CPU: without atomics, and added up in an order that does
// not depend on the number of threads. Pixels in a row that see one triangle are summed first, then chunks of pixels sum
// by vertex, then each thread adds, chunk after chunk, what belongs to the vertices that it owns.
#pragma once
#include <cstring>
#include <memory>
#include "common/memory.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

constexpr int64_t kCornerPixels = 8192;  // of a chunk

// The sums of one chunk, ready to be added: those of owner o are [offsets[o], offsets[o + 1]).
struct ChunkSums {
  static constexpr int kOwners = 16;
  int32_t offsets[kOwners + 1] = {};
  Array<int32_t> vertices;  // [count]
  Array<float> sums;        // [count, channels]
};

// Sums by vertex while a chunk is visited. A small table remembers where vertices are; one may have several places.
// kChannels: 0 for any number.
template <int kChannels>
class CornerAdder {
 public:
  CornerAdder(const int32_t* tri, int32_t channels) : tri_(tri), channels_(channels) {
    for (int32_t& slot : slots_) slot = -1;
    grow(1024);
    if (!kChannels) large_.resize(size_t(channels) * 3);
    run_ = kChannels ? small_ : static_cast<float*>(large_);
  }
  CornerAdder(const CornerAdder&) = delete;

  // Where to add for the three corners of this triangle, 3 * channels floats; valid until the next call.
  float* operator()(int32_t triangle) {
    if (triangle != triangle_) {
      end_run();
      triangle_ = triangle;
      for (int32_t c = 0; c < 3 * channels(); ++c) run_[c] = 0.f;
    }
    return run_;
  }

  // The same for sums [3, channels] that are complete. Inlined, so that they need not leave their registers.
  __attribute__((always_inline)) void add(int32_t triangle, const float* sums) {
    if (count_ + 3 > capacity_) grow(2 * capacity_);
    for (int k = 0; k < 3; ++k) {
      const int32_t vertex = tri_[3 * int64_t(triangle) + k];
      int32_t& slot = slots_[(uint32_t(vertex) * 2654435769u) >> 20];
      const float* from = sums + k * channels();
      if (slot >= 0 && vertices_[slot] == vertex) {
        float* to = sums_ + int64_t(slot) * channels();
        for (int32_t c = 0; c < channels(); ++c) to[c] += from[c];
      } else {
        slot = count_++;
        vertices_[slot] = vertex;
        float* to = sums_ + int64_t(slot) * channels();
        for (int32_t c = 0; c < channels(); ++c) to[c] = from[c];
      }
    }
  }

  // The sums by owner of `owned` vertices each; the adder is done with.
  void finish(int64_t owned, ChunkSums& out) {
    end_run();
    for (int32_t i = 0; i < count_; ++i) ++out.offsets[uint32_t(vertices_[i]) / uint32_t(owned) + 1];
    for (int o = 0; o < ChunkSums::kOwners; ++o) out.offsets[o + 1] += out.offsets[o];
    if (out.offsets[1] == count_) {  // a single owner: nothing to sort
      out.vertices.swap(vertices_), out.sums.swap(sums_);
      return;
    }
    out.vertices.resize(size_t(count_)), out.sums.resize(size_t(count_) * channels());
    int32_t next[ChunkSums::kOwners];
    std::memcpy(next, out.offsets, sizeof next);
    for (int32_t i = 0; i < count_; ++i) {
      const int32_t to = next[uint32_t(vertices_[i]) / uint32_t(owned)]++;
      out.vertices[to] = vertices_[i];
      for (int32_t c = 0; c < channels(); ++c) out.sums[int64_t(to) * channels() + c] = sums_[int64_t(i) * channels() + c];
    }
  }

 private:
  static constexpr int32_t kSlots = 4096;
  int32_t channels() const { return kChannels ? kChannels : channels_; }

  void grow(int32_t capacity) {
    capacity_ = capacity;
    vertices_.resize(size_t(capacity)), sums_.resize(size_t(capacity) * channels());
  }

  void end_run() {
    if (triangle_ >= 0) add(triangle_, run_);
    triangle_ = -1;
  }

  const int32_t* tri_;
  int32_t channels_, triangle_ = -1, count_ = 0, capacity_ = 0;
  Array<int32_t> vertices_;
  Array<float> sums_, large_;
  float* run_;
  float small_[kChannels ? 3 * kChannels : 1];
  int32_t slots_[kSlots];
};

// table [images or 1, vertices, channels] += the sums at the corners of tri [F, 3]; `stride` floats from one image's part
// of the table to the next, 0 if they share it. visit(image, begin, end, add) goes through pixels [begin, end) of an image
// and calls add(triangle) for a place of 3 * channels floats to add to; triangles have valid indices.
template <int kChannels, class Visit>
void add_to_corners(int64_t images, int64_t pixels, const int32_t* tri, int64_t vertices, int32_t channels, float* table,
                    int64_t stride, const Visit& visit) {
  const int64_t per_image = (pixels + kCornerPixels - 1) / kCornerPixels, chunks = images * per_image;
  if (chunks == 0 || vertices == 0) return;
  const int64_t wanted = thread_count() < ChunkSums::kOwners ? thread_count() : ChunkSums::kOwners;
  const int64_t owned = (vertices + wanted - 1) / wanted;
  std::unique_ptr<ChunkSums[]> parts(new ChunkSums[size_t(chunks)]);
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t) {
    const int64_t begin = chunk % per_image * kCornerPixels, end = begin + kCornerPixels;
    CornerAdder<kChannels> adder(tri, channels);
    visit(chunk / per_image, begin, end < pixels ? end : pixels, adder);
    adder.finish(owned, parts[chunk]);
  });
  const int32_t width = kChannels ? kChannels : channels;
  parallel_for((vertices + owned - 1) / owned, 1, [&](int64_t owner, int64_t) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const ChunkSums& part = parts[chunk];
      float* base = table + chunk / per_image * stride;
      for (int32_t i = part.offsets[owner]; i < part.offsets[owner + 1]; ++i) {
        float* to = base + int64_t(part.vertices[i]) * width;
        const float* from = part.sums + int64_t(i) * width;
        for (int32_t c = 0; c < width; ++c) to[c] += from[c];
      }
    }
  });
}

// body(std::integral_constant<int, channels>) for 1 to 4 channels, with 0 for any other number: loops of known length.
template <class Body>
void with_channels(int32_t channels, const Body& body) {
  switch (channels) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(std::integral_constant<int, 0>());
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
