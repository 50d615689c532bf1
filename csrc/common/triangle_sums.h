// Gradients to the corners of triangles from many pixels, on a CPU: without atomics, and added up in an order that does
// not depend on the number of threads. Chunks of pixels sum by triangle; then each thread adds, chunk after chunk, what
// belongs to the vertices that it owns.
#pragma once
#include <cstdlib>
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {

// The sums of one chunk. A small table remembers where recent triangles are; a triangle may have several entries.
struct TriangleSums {
  static constexpr int32_t kSlots = 1024;
  int32_t width = 0, count = 0, capacity = 0;  // width: floats a triangle, corner after corner
  int32_t* triangles = nullptr;                // [count]
  float* sums = nullptr;                       // [count, width]

  // Where to add for this triangle; valid until the next call.
  float* at(int32_t triangle, int32_t* slots) {
    int32_t& slot = slots[uint32_t(triangle) % kSlots];
    if (slot < 0 || triangles[slot] != triangle) {
      if (count == capacity) {
        capacity = capacity ? 2 * capacity : 256;
        triangles = static_cast<int32_t*>(std::realloc(triangles, size_t(capacity) * sizeof(int32_t)));
        sums = static_cast<float*>(std::realloc(sums, size_t(capacity) * width * sizeof(float)));
      }
      slot = count++;
      triangles[slot] = triangle;
      std::memset(sums + int64_t(slot) * width, 0, size_t(width) * sizeof(float));
    }
    return sums + int64_t(slot) * width;
  }
};

// table [vertices, channels] += the sums at the corners of tri [F, 3]. visit(begin, end, add) goes through pixels
// [begin, end) and calls add(triangle) for a place of 3 * channels floats to add to; triangles are valid indices.
template <class Visit>
void add_to_corners(int64_t pixels, const int32_t* tri, int64_t vertices, int32_t channels, float* table,
                    const Visit& visit) {
  constexpr int64_t kPixels = 4096;
  const int64_t chunks = (pixels + kPixels - 1) / kPixels;
  TriangleSums* parts = new TriangleSums[size_t(chunks)];
  parallel_for(pixels, kPixels, [&](int64_t begin, int64_t end) {
    TriangleSums& part = parts[begin / kPixels];
    part.width = 3 * channels;
    int32_t slots[TriangleSums::kSlots];
    for (int32_t& slot : slots) slot = -1;
    visit(begin, end, [&](int32_t triangle) { return part.at(triangle, slots); });
  });
  const int64_t owners = thread_count() < 16 ? thread_count() : 16, owned = (vertices + owners - 1) / owners;
  parallel_for(vertices, owned > 0 ? owned : 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const TriangleSums& part = parts[chunk];
      for (int32_t i = 0; i < part.count; ++i)
        for (int k = 0; k < 3; ++k) {
          const int64_t vertex = tri[3 * int64_t(part.triangles[i]) + k];
          if (vertex < begin || vertex >= end) continue;
          float* to = table + vertex * channels;
          const float* from = part.sums + int64_t(i) * part.width + k * channels;
          for (int32_t c = 0; c < channels; ++c) to[c] += from[c];
        }
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) std::free(parts[chunk].triangles), std::free(parts[chunk].sums);
  delete[] parts;
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
