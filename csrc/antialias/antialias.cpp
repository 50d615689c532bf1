// First, each pixel's triangle is asked for silhouette edges, many triangles at once; then only the pairs next to such a
// pixel are looked at, each once. The backward pass starts from the flags of the forward pass. Chunks of rows write to
// their own pixels only, and what they have for vertices is added up chunk after chunk: no atomics, one order of summation.
#include "common/lanes.h"
#include "antialias/antialias.h"
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include "common/memory.h"
#include "common/parallel.h"

namespace text3d {
namespace TEXT3D_ISA {
namespace {

constexpr int64_t kRows = 8;         // of a chunk

enum Trouble : int32_t { kNone, kBadId, kBadVertex, kBadTopology };

// Fills p.flags.
struct SilhouetteFlags {
  const AntialiasParams& p;
  int32_t trouble = kNone;

  void find() {
    std::memset(p.flags + p.batch * p.height * p.width, 0, 8);
    parallel_for(p.batch * p.height, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) flag_row(row);
    });
    if (!trouble) return;
    const std::string limit = std::to_string((trouble == kBadId ? p.faces : p.vertices) - 1);
    const std::string what = trouble == kBadId ? "rast: expected triangles of tri, up to " :
                             trouble == kBadVertex ? "tri: expected indices from 0 to " : "topology: expected indices from -1 to ";
    throw std::invalid_argument(what + limit + ", got some out of this range");
  }

  void flag_row(int64_t row) {
    uint8_t* out = p.flags + row * p.width;
    const float* rast = p.rast + row * p.width * 4;
    const int64_t image = row / p.height;
    std::memset(out, 0, size_t(p.width));
    int32_t faces[kLanes], begins[kLanes], ends[kLanes], count = 0, last = -1;
    for (int64_t x = 0; x < p.width; ++x) {
      const int32_t face = decode_triangle_id(rast[4 * x + 3]);
      if (face >= p.faces) return fail(kBadId);
      if (face < 0) {
        last = -1;
      } else if (face == last) {
        ends[count - 1] = int32_t(x) + 1;
      } else {
        if (count == kLanes) {
          flag_triangles(image, faces, begins, ends, count, out);
          count = 0;
        }
        faces[count] = last = face, begins[count] = int32_t(x), ends[count++] = int32_t(x) + 1;
      }
    }
    if (count > 0) flag_triangles(image, faces, begins, ends, count, out);
  }

  void flag_triangles(int64_t image, const int32_t* faces, const int32_t* begins, const int32_t* ends, int32_t count,
                      uint8_t* out) {
    const float* rows[6][kLanes];  // three corners, then what lies across the edges opposite to them
    const float* pos = p.pos + first_vertex(p, image) * 4;
    for (int32_t l = 0; l < kLanes; ++l) {
      const int64_t face = faces[l < count ? l : 0];
      const int32_t* corners = p.tri + 3 * face;
      const int32_t* opposite = p.opposite + 3 * face;
      for (int k = 0; k < 3; ++k) {
        const int32_t own = corners[k], across = opposite[k] < 0 ? own : opposite[k];
        if (uint64_t(own) >= uint64_t(p.vertices)) return fail(kBadVertex);
        if (across >= p.vertices || opposite[k] < -1) return fail(kBadTopology);
        rows[k][l] = pos + 4 * int64_t(own), rows[3 + k][l] = pos + 4 * int64_t(across);
      }
    }
    ClipPoint<Floats> v[6];
    Floats z;
    for (int k = 0; k < 6; ++k) load_rows(rows[k], v[k].x, v[k].y, z, v[k].w);
    const Ints found = on_silhouette(v[1], v[2], v[0], v[3]) | on_silhouette(v[2], v[0], v[1], v[4]) |
                       on_silhouette(v[0], v[1], v[2], v[5]);
    if (!any(found)) return;
    for (int32_t l = 0; l < count; ++l)
      if (found[l]) std::memset(out + begins[l], 1, size_t(ends[l] - begins[l]));
  }

  void fail(Trouble what) { __atomic_store_n(&trouble, what, __ATOMIC_RELAXED); }
};

// visit(pair, neighbours) for the pairs of a row with itself and with the next one, as far as they blend.
template <class Params, class Visit>
void visit_row(const Params& p, int64_t row, const Visit& visit) {
  const int64_t image = row / p.height, y = row % p.height;
  const bool last = y + 1 == p.height;
  const uint8_t* here = p.flags + row * p.width;
  const uint8_t* next = last ? here : here + p.width;
  for (int64_t begin = 0; begin < p.width; begin += 8) {
    uint64_t own, right, above;
    std::memcpy(&own, here + begin, 8), std::memcpy(&right, here + begin + 1, 8), std::memcpy(&above, next + begin, 8);
    if (!(own | right | above)) continue;
    for (int64_t x = begin; x < begin + 8 && x < p.width; ++x)
      for (int axis = 0; axis < 2; ++axis) {
        if (axis == 0 ? x + 1 == p.width || !(here[x] | here[x + 1]) : last || !(here[x] | next[x])) continue;
        const Pair pair = blend(p, image, y, x, axis);
        const int64_t first = row * p.width + x;
        if (pair.alpha != 0.f || pair.movable) visit(pair, Neighbours{first, first + (axis == 0 ? 1 : p.width), axis});
      }
  }
}

// body(chunk, first pixel, end pixel, pairs) in parallel, where pairs(visit) goes through all pairs that touch the chunk.
template <class Params, class Body>
void for_chunks(const Params& p, const Body& body) {
  parallel_for(p.batch * p.height, kRows, [&](int64_t begin, int64_t end) {
    body(begin / kRows, begin * p.width, end * p.width, [&](const auto& visit) {
      for (int64_t row = begin % p.height ? begin - 1 : begin; row < end; ++row) visit_row(p, row, visit);
    });
  });
}

// Gradients to vertices from one chunk, in the order of its pairs.
struct VertexGradients {
  struct Item { int64_t vertex; float x, y, w; };
  Array<Item> items;
  int64_t count = 0, capacity = 0;
  void add(int64_t vertex, float x, float y, float w) {
    if (count == capacity) {
      capacity = capacity ? 2 * capacity : 256;
      items.resize(size_t(capacity));
    }
    items[count++] = {vertex, x, y, w};
  }
};

}  // namespace

void antialias_forward(const AntialiasParams& p) {
  if (p.batch * p.height * p.width == 0) return;
  SilhouetteFlags{p}.find();
  for_chunks(p, [&](int64_t, int64_t begin, int64_t end, const auto& pairs) {
    std::memcpy(p.out + begin * p.channels, p.color + begin * p.channels, size_t((end - begin) * p.channels) * 4);
    pairs([&](const Pair& pair, const Neighbours& n) {
      const int64_t target = n.target(pair);
      if (target >= begin && target < end) mix(p, p.out + target * p.channels, pair.alpha, n);
    });
  });
}

void antialias_backward(const AntialiasBackwardParams& p) {
  if (p.batch * p.height * p.width == 0) return;
  const int64_t chunks = (p.batch * p.height + kRows - 1) / kRows;
  std::unique_ptr<VertexGradients[]> gradients(new VertexGradients[size_t(chunks)]);
  for_chunks(p, [&](int64_t chunk, int64_t begin, int64_t end, const auto& pairs) {
    const auto inside = [&](int64_t i) { return i >= begin && i < end; };
    if (p.grad_color)
      std::memcpy(p.grad_color + begin * p.channels, p.grad_out + begin * p.channels, size_t((end - begin) * p.channels) * 4);
    pairs([&](const Pair& pair, const Neighbours& n) {
      const float* g = p.grad_out + n.target(pair) * p.channels;
      if (p.grad_color)
        for (int c = 0; c < p.channels; ++c) {
          if (inside(n.first)) p.grad_color[n.first * p.channels + c] -= pair.alpha * g[c];
          if (inside(n.second)) p.grad_color[n.second * p.channels + c] += pair.alpha * g[c];
        }
      if (!p.grad_pos || !pair.movable || !inside(n.first)) return;
      const int64_t image = n.first / (p.width * p.height), own = first_vertex(p, image);
      position_gradient(p, image, n, pair, [&](int32_t vertex, float x, float y, float w) {
        gradients[chunk].add(own + vertex, x, y, w);
      });
    });
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < gradients[chunk].count; ++i) {
      const VertexGradients::Item& item = gradients[chunk].items[i];
      float* to = p.grad_pos + item.vertex * 4;
      to[0] += item.x, to[1] += item.y, to[3] += item.w;
    }
  }
}

}  // namespace TEXT3D_ISA
}  // namespace text3d
