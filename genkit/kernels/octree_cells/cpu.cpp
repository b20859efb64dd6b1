// Keys of all points, sorted by digits of 11 bits with the numbers of the points beside them, and each key once. A digit that all keys share is passed over:
// of the 64 bits those of the depth and of the samples that occur cost a pass.
#include <algorithm>
#include <cstdint>
#include <cstring>

static const int DIGIT = 11, DIGITS = 6;

struct Entry {
  uint64_t key;
  int64_t point;
};

// Bits of a number at every third place.
static inline uint64_t spread(uint64_t x) {
  x = (x | x << 32) & 0x00ff00000000ffffull;
  x = (x | x << 16) & 0x00ff0000ff0000ffull;
  x = (x | x << 8) & 0xf00f00f00f00f00full;
  x = (x | x << 4) & 0x30c30c30c30c30c3ull;
  return (x | x << 2) & 0x9249249249249249ull;
}

// points [P, 3], samples [P] or null -> keys [first *count], number [P]. scratch holds 2 P entries.
extern "C" void octree_cells(const float* points, const int64_t* samples, int64_t* keys, int64_t* number, int64_t* scratch, int64_t* count, int64_t P,
                             int64_t depth) {
  Entry *from = (Entry*)scratch, *to = from + P;
  static_assert(sizeof(Entry) == 16, "two words");
  const float half = depth ? (float)(1ll << depth) / 2 : 0.5f;
  const int64_t last = (1ll << depth) - 1;
  int64_t histogram[DIGITS][1 << DIGIT];
  memset(histogram, 0, sizeof histogram);
  for (int64_t p = 0; p < P; ++p) {
    uint64_t key = samples ? (uint64_t)samples[p] << 48 : 0;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t place = (int64_t)((points[3 * p + axis] + 1) * half);
      key |= spread((uint64_t)std::max<int64_t>(0, std::min(place, last))) << (2 - axis);
    }
    from[p] = {key, p};
    for (int d = 0; d < DIGITS; ++d) ++histogram[d][key >> d * DIGIT & ((1 << DIGIT) - 1)];
  }
  for (int d = 0; d < DIGITS && P; ++d) {
    int64_t* start = histogram[d];
    if (start[from[0].key >> d * DIGIT & ((1 << DIGIT) - 1)] == P) continue;
    int64_t before = 0;
    for (int i = 0; i < 1 << DIGIT; ++i) {
      const int64_t own = start[i];
      start[i] = before;
      before += own;
    }
    for (int64_t p = 0; p < P; ++p) to[start[from[p].key >> d * DIGIT & ((1 << DIGIT) - 1)]++] = from[p];
    std::swap(from, to);
  }
  int64_t cells = 0;
  for (int64_t p = 0; p < P; ++p) {
    if (!p || from[p].key != from[p - 1].key) keys[cells++] = (int64_t)from[p].key;
    number[from[p].point] = cells - 1;
  }
  *count = cells;
}
