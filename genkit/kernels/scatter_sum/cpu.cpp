// Rows are read once in order and added where they belong; what is added to fits the caches. One thread, so that the order of a sum is that of the rows.
#include <cstdint>

template <int C>
static void add(const float* x, const int64_t* rows, float* out, int64_t P) {
  for (int64_t p = 0; p < P; ++p)
    for (int c = 0; c < C; ++c) out[rows[p] * C + c] += x[p * C + c];
}

extern "C" void scatter_sum(const float* x, const int64_t* rows, float* out, int64_t P, int64_t C) {
  if (C == 1) return add<1>(x, rows, out, P);
  if (C == 3) return add<3>(x, rows, out, P);
  if (C == 4) return add<4>(x, rows, out, P);
  for (int64_t p = 0; p < P; ++p) {
    float* row = out + rows[p] * C;
    for (int64_t c = 0; c < C; ++c) row[c] += x[p * C + c];
  }
}
