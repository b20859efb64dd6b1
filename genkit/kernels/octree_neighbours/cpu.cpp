// Of every node the middle 4x4x4 of the 6x6x6 children around it, and from these the 3x3x3 around each of its own 8. Every number is written once, in order.
#include <cstdint>

extern "C" void octree_neighbours(const int64_t* parents, const int64_t* children, int64_t* out, int64_t P) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < P; ++p) {
    int64_t first[27], middle[4][4][4];
    for (int k = 0; k < 27; ++k) {
      const int64_t node = parents[27 * p + k];
      first[k] = node < 0 ? -1 : children[node];
    }
    for (int x = 0; x < 4; ++x)
      for (int y = 0; y < 4; ++y)
        for (int z = 0; z < 4; ++z) {
          const int64_t own = first[(x + 1) / 2 * 9 + (y + 1) / 2 * 3 + (z + 1) / 2];
          middle[x][y][z] = own < 0 ? -1 : 8 * own + ((x + 1) % 2 * 4 + (y + 1) % 2 * 2 + (z + 1) % 2);
        }
    int64_t* row = out + 216 * p;
    for (int child = 0; child < 8; ++child)
      for (int x = 0; x < 3; ++x)
        for (int y = 0; y < 3; ++y)
          for (int z = 0; z < 3; ++z) *row++ = middle[(child >> 2 & 1) + x][(child >> 1 & 1) + y][(child & 1) + z];
  }
}
