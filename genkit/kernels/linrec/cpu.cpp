// h_t = a_t h_{t-1} + b_t over [B, N, D] float32, channels adjacent; complex numbers as pairs of floats. Pure bandwidth: every value is read once and
// written once. A thread owns a run of channels of one batch entry for all steps, as long a run as leaves every thread one: long rows are what the
// prefetchers follow. The state is the row of h that was just written; it is still in the first cache.
#include "vec.h"

typedef uint64_t vu __attribute__((vector_size(4 * W)));

struct Real {
  static vf times(vf a, vf x) { return a * x; }
  static vf conj_times(vf a, vf x) { return a * x; }
};

// Pairs (re, im) side by side; a pair is one 64-bit lane.
struct Complex {
  static vf re_twice(vf z) { vu x = (vu)z; return (vf)((x & 0xffffffffu) | (x << 32)); }
  static vf im_twice(vf z) { vu x = (vu)z; return (vf)((x >> 32) | (x & 0xffffffff00000000u)); }
  static vf swapped(vf z) { vu x = (vu)z; return (vf)((x >> 32) | (x << 32)); }
  static vf negated(vf z, uint64_t where) { return (vf)((vu)z ^ where); }
  static vf times(vf a, vf x) { return re_twice(a) * x + negated(im_twice(a), 0x80000000u) * swapped(x); }
  static vf conj_times(vf a, vf x) { return re_twice(a) * x + negated(im_twice(a), 0x8000000000000000u) * swapped(x); }
};

// Calls body(batch entry, first float, number of floats) for all runs in parallel.
template <class Body>
static void runs(int64_t B, int64_t D, Body body) {
  const int64_t threads = omp_get_max_threads(), most = (D + 4 * W - 1) / (4 * W);
  int64_t per_row = 1;
  while (per_row < most && B * per_row % threads && B * per_row < 4 * threads) ++per_row;
  const int64_t width = (D + per_row * W - 1) / (per_row * W) * W;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < B * per_row; ++i) {
    const int64_t first = i % per_row * width;
    if (first < D) body(i / per_row, first, D - first < width ? D - first : width);
  }
}

// Calls body(first float, load, store) for every vector of a run; the last may be partial.
template <class Body>
static inline void vectors(int64_t width, Body body) {
  int64_t c = 0;
  for (; c + W <= width; c += W)
    body(c, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  const int rest = int(width - c);
  if (rest) body(c, [=](const float* p) { return load_some(p, rest); }, [=](float* p, vf v) { store_some(p, v, rest); });
}

template <class Number>
static void forward(const float* a, const float* b, const float* h0, float* h, int64_t B, int64_t N, int64_t D, int64_t a_batch, int64_t a_step,
                    bool reverse) {
  runs(B, D, [&](int64_t batch, int64_t d, int64_t width) {
    const float* before = h0 + batch * D + d;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t t = reverse ? N - 1 - i : i, row = (batch * N + t) * D + d;
      const float *at = a + batch * a_batch + t * a_step + d, *bt = b + row;
      float* ht = h + row;
      vectors(width, [&](int64_t c, auto get, auto put) { put(ht + c, Number::times(get(at + c), get(before + c)) + get(bt + c)); });
      before = ht;
    }
  });
}

// lambda_t = dh_t + conj(a_{t+1}) lambda_{t+1}, the same recurrence from the other end: db_t = lambda_t, da_t = lambda_t conj(h_{t-1}),
// dh0 = conj(a_1) lambda_1. A decay that is the same for all tokens gets its gradient summed, one row per batch entry.
template <class Number>
static void backward(const float* a, const float* h, const float* h0, const float* dh, float* da, float* db, float* dh0, int64_t B, int64_t N,
                     int64_t D, int64_t a_batch, int64_t a_step, bool reverse) {
  runs(B, D, [&](int64_t batch, int64_t d, int64_t width) {
    const int64_t later = reverse ? -1 : 1, base = batch * N * D + d;
    const float* decays = a + batch * a_batch + d;
    float* sum = da + batch * D + d;
    if (!a_step) std::memset(sum, 0, 4 * width);
    for (int64_t i = N - 1; i >= 0; --i) {
      const int64_t t = reverse ? N - 1 - i : i, row = base + t * D;
      const float *given = dh + row, *next = db + row + later * D, *decay = decays + (t + later) * a_step;
      const float* before = i ? h + row - later * D : h0 + batch * D + d;
      const bool is_last = i == N - 1;
      vectors(width, [&](int64_t c, auto get, auto put) {
        const vf lambda = is_last ? get(given + c) : get(given + c) + Number::conj_times(get(decay + c), get(next + c));
        put(db + row + c, lambda);
        const vf product = Number::conj_times(get(before + c), lambda);
        if (a_step) put(da + row + c, product);
        else put(sum + c, get(sum + c) + product);
      });
    }
    const int64_t t = reverse ? N - 1 : 0;
    const float *decay = decays + t * a_step, *lambda = db + base + t * D;
    float* out = dh0 + batch * D + d;
    vectors(width, [&](int64_t c, auto get, auto put) { put(out + c, Number::conj_times(get(decay + c), get(lambda + c))); });
  });
}

// D counts floats; a_batch and a_step are the floats from one batch entry and one token of a to the next, 0 where a is shared.
extern "C" void linrec_forward(const float* a, const float* b, const float* h0, float* h, int64_t B, int64_t N, int64_t D, int64_t a_batch,
                               int64_t a_step, int64_t is_complex, int64_t reverse) {
  (is_complex ? forward<Complex> : forward<Real>)(a, b, h0, h, B, N, D, a_batch, a_step, reverse);
}

extern "C" void linrec_backward(const float* a, const float* h, const float* h0, const float* dh, float* da, float* db, float* dh0, int64_t B,
                                int64_t N, int64_t D, int64_t a_batch, int64_t a_step, int64_t is_complex, int64_t reverse) {
  (is_complex ? backward<Complex> : backward<Real>)(a, h, h0, dh, da, db, dh0, B, N, D, a_batch, a_step, reverse);
}
