// Each point goes down the tree alone, into the nearer box first, and never into one farther than the nearest triangle so far.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

struct Vector {
  float x, y, z;
};

inline Vector minus(const Vector& a, const Vector& b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
inline float dot(const Vector& a, const Vector& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
inline Vector cross(const Vector& a, const Vector& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

inline float to_side(const Vector& to, const Vector& along) {
  const float share = std::min(1.0f, std::max(0.0f, dot(to, along) / std::max(dot(along, along), 1e-30f)));
  const Vector rest{to.x - share * along.x, to.y - share * along.y, to.z - share * along.z};
  return dot(rest, rest);
}

inline float to_triangle(const Vector& p, const float* t) {
  const Vector A{t[0], t[1], t[2]}, B{t[3], t[4], t[5]}, C{t[6], t[7], t[8]};
  const Vector a = minus(p, A), b = minus(p, B), c = minus(p, C);
  const Vector ab = minus(B, A), bc = minus(C, B), ca = minus(A, C);
  const Vector normal = cross(ca, ab);
  const float size = dot(normal, normal);
  if (size > 0 && dot(cross(ab, a), normal) >= 0 && dot(cross(bc, b), normal) >= 0 && dot(cross(ca, c), normal) >= 0) {
    const float height = dot(a, normal);
    return height * height / size;
  }
  return std::min(to_side(a, ab), std::min(to_side(b, bc), to_side(c, ca)));
}

inline float to_box(const Vector& p, const float* box) {
  if (!(box[0] <= box[3])) return INF;  // holds nothing
  const float x = std::max(0.0f, std::max(box[0] - p.x, p.x - box[3]));
  const float y = std::max(0.0f, std::max(box[1] - p.y, p.y - box[4]));
  const float z = std::max(0.0f, std::max(box[2] - p.z, p.z - box[5]));
  return x * x + y * y + z * z;
}

struct Waiting {
  int64_t node;
  float nearest;
};

}  // namespace

extern "C" void closest_triangle(const float* points, const float* boxes, const float* triangles, float* distance, int64_t* number, int64_t N,
                                 int64_t depth, float within) {
  const int64_t leaves = (int64_t{1} << depth) - 1;  // the number of the first one
#pragma omp parallel for schedule(dynamic, 256)
  for (int64_t n = 0; n < N; ++n) {
    const Vector p{points[3 * n], points[3 * n + 1], points[3 * n + 2]};
    Waiting stack[64];  // one per level
    int waiting = 0;
    float best = within * within, found = INF;
    int64_t who = 0;
    stack[waiting++] = {0, to_box(p, boxes)};
    while (waiting) {
      const Waiting next = stack[--waiting];
      if (!(next.nearest <= best)) continue;
      if (next.node >= leaves) {
        const float squared = to_triangle(p, triangles + 9 * (next.node - leaves));
        if (squared <= best && squared < found) best = found = squared, who = next.node - leaves;
        continue;
      }
      const int64_t child = 2 * next.node + 1;
      const float left = to_box(p, boxes + 6 * child), right = to_box(p, boxes + 6 * child + 6);
      // The nearer one comes off first.
      if (left <= right) {
        if (right < INF) stack[waiting++] = {child + 1, right};
        if (left < INF) stack[waiting++] = {child, left};
      } else {
        if (left < INF) stack[waiting++] = {child, left};
        if (right < INF) stack[waiting++] = {child + 1, right};
      }
    }
    distance[n] = std::sqrt(found);
    number[n] = who;
  }
}
