// Each ray goes down the tree alone, into every box above or around its point.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Whether an edge, its lower end first, passes to the right of the point. A function of its own, so that both triangles at an edge get the same bits
// whatever the compiler makes of what is around.
__attribute__((noinline)) bool is_right(const double* low, const double* high, double x, double y) {
  const double share = (y - low[1]) / (high[1] - low[1]);
  return low[0] + share * (high[0] - low[0]) > x;
}

// 1, 0 or -1: the ray leaves or enters through the triangle t, or passes it.
int crossing(const double* p, const double* t) {
  int around = 0;
  for (int i = 0; i < 3; ++i) {
    const double *a = t + 3 * i, *b = t + 3 * ((i + 1) % 3);
    const bool rises = b[1] > a[1];
    const double *low = rises ? a : b, *high = rises ? b : a;
    if (low[1] <= p[1] && p[1] < high[1] && is_right(low, high, p[0], p[1])) around += rises ? 1 : -1;
  }
  if (!around) return 0;
  const double one[3] = {t[3] - t[0], t[4] - t[1], t[5] - t[2]}, two[3] = {t[6] - t[0], t[7] - t[1], t[8] - t[2]};
  const double x = p[0] - t[0], y = p[1] - t[1], area = one[0] * two[1] - one[1] * two[0];
  double height = t[2] + (x * two[1] - y * two[0]) / area * one[2] + (one[0] * y - one[1] * x) / area * two[2];
  if (std::isnan(height)) height = 0;
  const double least = std::min(t[2], std::min(t[5], t[8])), greatest = std::max(t[2], std::max(t[5], t[8]));
  return std::min(std::max(height, least), greatest) > p[2] ? around : 0;
}

}  // namespace

extern "C" void ray_crossings(const double* points, const float* boxes, const double* triangles, int64_t* count, int64_t N, int64_t depth, int64_t F,
                              float slack) {
  const int64_t leaves = (int64_t{1} << depth) - 1;
#pragma omp parallel for schedule(dynamic, 256)
  for (int64_t n = 0; n < N; ++n) {
    const double* p = points + 3 * n;
    const float x = static_cast<float>(p[0]), y = static_cast<float>(p[1]), z = static_cast<float>(p[2]);
    int64_t stack[64];  // one per level
    int waiting = 0;
    int64_t around = 0;
    stack[waiting++] = 0;
    while (waiting) {
      const int64_t node = stack[--waiting];
      const float* box = boxes + 6 * node;
      const bool is_under = x <= box[3] + slack && y <= box[4] + slack && z <= box[5] + slack && x >= box[0] - slack && y >= box[1] - slack;
      if (!is_under) continue;
      if (node < leaves) {
        stack[waiting++] = 2 * node + 2;
        stack[waiting++] = 2 * node + 1;
      } else if (node - leaves < F) {
        around += crossing(p, triangles + 9 * (node - leaves));
      }
    }
    count[n] = around;
  }
}
