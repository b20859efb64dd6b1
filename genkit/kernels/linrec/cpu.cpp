// h_t = a_t h_{t-1} + b_t over [B, N, D] float32, channels adjacent. Pure bandwidth: every value is read once and written once.
// A thread owns a strip of channels of one batch entry for all steps; LANES vectors of independent recurrences hide the latency of the addition.
#include "vec.h"

constexpr int LANES = 4;
constexpr int STRIP = LANES * W;

// Calls body(b, first channel, number of channels) for all strips in parallel.
template <class Body>
static void strips(int64_t B, int64_t D, Body body) {
  const int64_t per_row = (D + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < B * per_row; ++i) {
    const int64_t d = i % per_row * STRIP;
    body(i / per_row, d, D - d < STRIP ? D - d : STRIP);
  }
}

extern "C" void linrec_forward(const float* a, const float* b, const float* h0, float* h, int64_t B, int64_t N, int64_t D, int64_t reverse) {
  const int64_t step = reverse ? -D : D;
  strips(B, D, [&](int64_t batch, int64_t d, int64_t width) {
    const int64_t first = (batch * N + (reverse ? N - 1 : 0)) * D + d;
    const float *at = a + first, *bt = b + first;
    float* ht = h + first;
    if (width == STRIP) {
      vf state[LANES];
      for (int l = 0; l < LANES; ++l) state[l] = load(h0 + batch * D + d + l * W);
      for (int64_t t = 0; t < N; ++t, at += step, bt += step, ht += step)
        for (int l = 0; l < LANES; ++l) {
          state[l] = load(at + l * W) * state[l] + load(bt + l * W);
          store(ht + l * W, state[l]);
        }
    } else {
      float state[STRIP];
      for (int64_t c = 0; c < width; ++c) state[c] = h0[batch * D + d + c];
      for (int64_t t = 0; t < N; ++t, at += step, bt += step, ht += step)
        for (int64_t c = 0; c < width; ++c) ht[c] = state[c] = at[c] * state[c] + bt[c];
    }
  });
}

// lambda_t = dh_t + a_{t+1} lambda_{t+1}, the same recurrence from the other end: db_t = lambda_t, da_t = lambda_t h_{t-1}, dh0 = a_1 lambda_1.
extern "C" void linrec_backward(const float* a, const float* h, const float* h0, const float* dh, float* da, float* db, float* dh0, int64_t B,
                                int64_t N, int64_t D, int64_t reverse) {
  const int64_t step = reverse ? -D : D;
  strips(B, D, [&](int64_t batch, int64_t d, int64_t width) {
    const int64_t first = (batch * N + (reverse ? N - 1 : 0)) * D + d;
    float carry[STRIP] = {};  // a_{t+1} lambda_{t+1}
    for (int64_t t = N - 1; t >= 0; --t) {
      const int64_t at = first + t * step;
      const float* before = t ? h + at - step : h0 + batch * D + d;
      if (width == STRIP) {
        for (int l = 0; l < LANES; ++l) {
          const int64_t c = l * W;
          const vf lambda = load(dh + at + c) + load(carry + c);
          store(db + at + c, lambda);
          store(da + at + c, lambda * load(before + c));
          store(carry + c, load(a + at + c) * lambda);
        }
      } else {
        for (int64_t c = 0; c < width; ++c) {
          const float lambda = dh[at + c] + carry[c];
          db[at + c] = lambda;
          da[at + c] = lambda * before[c];
          carry[c] = a[at + c] * lambda;
        }
      }
    }
    for (int64_t c = 0; c < width; ++c) dh0[batch * D + d + c] = carry[c];
  });
}
