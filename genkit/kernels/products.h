// Products of small matrices and what else attention on the CPU is made of.
#pragma once
#include "vec.h"
#include <vector>

constexpr float NONE = -__builtin_inff();  // the score of what is not seen

// Tile of a product in registers: MR x NR vectors of sums, NR of B's and one broadcast of A's.
constexpr int MR = W == 16 ? 8 : 6;
constexpr int NR = 2;

// What becomes of the old values of C.
enum Old { OVERWRITE, ADD, SCALE_ADD };

// C[M, n W] over depth; A's element (m, d) is at a[m * row + d * step], rows of B and C are ldb and ldc apart; SCALE_ADD multiplies row m of C by by[m] first.
template <int M, int n, Old old>
static inline void tile(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, const float* by) {
  vf sums[M][n];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (old == OVERWRITE) sums[m][i] = vf{};
      if (old == ADD) sums[m][i] = load(c + m * ldc + i * W);
      if (old == SCALE_ADD) sums[m][i] = load(c + m * ldc + i * W) * by[m];
    }
  for (int64_t d = 0; d < depth; ++d, a += step, b += ldb) {
    vf right[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) right[i] = load(b + i * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf left = splat(a[m * row]);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) sums[m][i] += left * right[i];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store(c + m * ldc + i * W, sums[m][i]);
}

// The last rows of a product, fewer than MR.
template <int M, int n, Old old, class... Rest>
static inline void last_rows(int64_t rows, Rest... rest) {
  if (rows == M) return tile<M, n, old>(rest...);
  if constexpr (M > 1) last_rows<M - 1, n, old>(rows, rest...);
}

template <int n, Old old>
static void columns_of_product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth, const float* by) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) tile<MR, n, old>(a + m * row, row, step, b, ldb, c + m * ldc, ldc, depth, by + m);
  if (m < rows) last_rows<MR - 1, n, old>(rows - m, a + m * row, row, step, b, ldb, c + m * ldc, ldc, depth, by + m);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns is a multiple of W.
template <Old old>
static void product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns, int64_t depth, const float* by = nullptr) {
  int64_t x = 0;
  for (; x + NR * W <= columns; x += NR * W) columns_of_product<NR, old>(a, row, step, b + x, ldb, c + x, ldc, rows, depth, by);
  for (; x < columns; x += W) columns_of_product<1, old>(a, row, step, b + x, ldb, c + x, ldc, rows, depth, by);
}

// 2^x for x up to 127, as exp2 of vec.h without what only larger x need: an exponent below -126 gives 0, NaN stays NaN.
static inline vf power(vf x) {
  const vf magic = splat(12582912.0f + 127.0f);
  const vi t = (vi)(x + magic);
  const vf f = x - __builtin_convertvector(t - (vi)magic, vf);
  vf p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return x < splat(-126.0f) ? vf{} : p * (vf)(t << 23);
}

// Largest and sum of the first n lanes, by halves.
template <int n>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * n)));
};
template <int n>
static inline float largest(typename Lanes<n>::type v) {
  if constexpr (n == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typename Lanes<n / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return largest<n / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}
template <int n>
static inline float total(typename Lanes<n>::type v) {
  if constexpr (n == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<n / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return total<n / 2>(half[0] + half[1]);
  }
}

// Memory of one thread, aligned to a vector of any width.
class Scratch {
  std::vector<float> all;
  float* next;

 public:
  explicit Scratch(int64_t floats) : all(floats + 1024), next(all.data()) {}
  float* take(int64_t floats) {
    next = (float*)(((uintptr_t)next + 63) / 64 * 64);
    float* mine = next;
    next += floats;
    return mine;
  }
  void reset() { next = all.data(); }
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
