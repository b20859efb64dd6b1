// Keys are sorted, so children of one parent stand together: one walk along them finds the parents, another fills in the eight places below each.
#include <cstdint>

static const int64_t PLACE = (1ll << 48) - 1;

static inline int64_t up(int64_t key) { return (key & PLACE) >> 3 | (key & ~PLACE); }

extern "C" void octree_above(const int64_t* keys, int64_t* above, int64_t* count, int64_t N) {
  int64_t found = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t parent = up(keys[n]);
    if (!found || above[found - 1] != parent) above[found++] = parent;
  }
  *count = found;
}

extern "C" void octree_below(const int64_t* keys, const int64_t* above, int64_t* below, int64_t* children, int64_t N, int64_t A) {
  int64_t n = 0;
  for (int64_t a = 0; a < A; ++a) {
    const int64_t first = (above[a] & PLACE) << 3 | (above[a] & ~PLACE);
    for (int64_t c = 0; c < 8; ++c) {
      const bool is_there = n < N && keys[n] == first + c;
      below[8 * a + c] = first + c;
      children[8 * a + c] = is_there ? n : -1;
      n += is_there;
    }
  }
}
