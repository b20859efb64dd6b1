// Causal depthwise convolution of x [B, N, D] float32, channels adjacent, K taps. Bandwidth is all that counts: a thread takes SEGMENT steps of one batch
// entry, row after row, and the last K rows, which each sum needs, are still in the first cache.
#include "vec.h"

constexpr int64_t SEGMENT = 128;

// Steps are counted in the direction of the convolution; step t < 0 is a row of `state` [B, K - 1, D], which stands in the order of tokens.
struct Conv {
  const float *x, *taps, *bias, *state;  // taps [K, D]; bias [D] or null
  int64_t B, N, D;
  bool has_silu, reverse;
  int64_t segments() const { return (N + SEGMENT - 1) / SEGMENT; }
  int64_t token(int64_t t) const { return reverse ? N - 1 - t : t; }
  int64_t before(int64_t t, int K) const { return reverse ? -1 - t : K - 1 + t; }  // the row of the state, t < 0
  const float* row(int64_t b, int64_t t, int K) const {
    return t >= 0 ? x + (b * N + token(t)) * D : state + (b * (K - 1) + before(t, K)) * D;
  }
};

// Calls body(b, first step, end) for all segments in parallel.
template <class Body>
static void segments(const Conv& c, Body body) {
  const int64_t per_entry = c.segments();
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < c.B * per_entry; ++i) {
    const int64_t first = i % per_entry * SEGMENT;
    body(i / per_entry, first, c.N - first < SEGMENT ? c.N : first + SEGMENT);
  }
}

// Calls body(d, load, store) for all channels, W at a time and then the rest.
template <class Body>
static inline void channels(int64_t D, Body body) {
  int64_t d = 0;
  for (; d + W <= D; d += W) body(d, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  const int rest = int(D - d);
  if (rest) body(d, [rest](const float* p) { return load_some(p, rest); }, [rest](float* p, vf v) { store_some(p, v, rest); });
}

template <int K>
static void forward(const Conv& c, float* y) {
  segments(c, [&](int64_t b, int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      const float* seen[K];
      for (int k = 0; k < K; ++k) seen[k] = c.row(b, t - (K - 1) + k, K);
      float* out = y + (b * c.N + c.token(t)) * c.D;
      channels(c.D, [&](int64_t d, auto get, auto put) {
        vf v = c.bias ? get(c.bias + d) : vf{};
        for (int k = 0; k < K; ++k) v += get(c.taps + k * c.D + d) * get(seen[k] + d);
        put(out + d, c.has_silu ? silu(v) : v);
      });
    }
  });
}

// Goes through the steps of a segment and the K - 1 behind it, whose gradients reach back into it. `ring` holds the last K rows of the gradient before
// the activation. dtaps [B, segments, K, D] and dbias [B, segments, D] are summed by the caller.
template <int K>
static void backward(const Conv& c, const float* dy, float* dx, float* dtaps, float* dbias, float* dstate) {
  segments(c, [&](int64_t b, int64_t first, int64_t end) {
    const int64_t D = c.D, part = b * c.segments() + first / SEGMENT;
    float *own_taps = dtaps + part * K * D, *own_bias = dbias + part * D;
    std::memset(own_taps, 0, sizeof(float) * K * D);
    std::memset(own_bias, 0, sizeof(float) * D);
    float* ring = new float[K * D]();
    for (int64_t t = first; t < end + K - 1; ++t) {
      const float *seen[K], *given = t < c.N ? dy + (b * c.N + c.token(t)) * D : nullptr;
      float* gradient[K];  // of step t - k
      for (int k = 0; k < K; ++k) {
        seen[k] = given ? c.row(b, t - (K - 1) + k, K) : nullptr;
        gradient[k] = ring + (t - k + K) % K * D;
      }
      const int64_t done = t - (K - 1);  // the step whose input has met all its gradients
      float* out = done >= first ? dx + (b * c.N + c.token(done)) * D : done < 0 ? dstate + (b * (K - 1) + c.before(done, K)) * D : nullptr;
      channels(D, [&](int64_t d, auto get, auto put) {
        vf g{};
        if (given) {
          g = get(given + d);
          if (c.has_silu) {
            vf v = c.bias ? get(c.bias + d) : vf{};
            for (int k = 0; k < K; ++k) v += get(c.taps + k * D + d) * get(seen[k] + d);
            const vf open = sigmoid(v);
            g *= open * (1.0f + v * (1.0f - open));
          }
          if (t < end) {
            for (int k = 0; k < K; ++k) put(own_taps + k * D + d, get(own_taps + k * D + d) + g * get(seen[k] + d));
            put(own_bias + d, get(own_bias + d) + g);
          }
        }
        put(gradient[0] + d, g);
        if (out) {
          vf v = get(c.taps + d) * g;
          for (int k = 1; k < K; ++k) v += get(c.taps + k * D + d) * get(gradient[k] + d);
          put(out + d, v);
        }
      });
    }
    delete[] ring;
  });
}

extern "C" void causal_conv1d_forward(const float* x, const float* taps, const float* bias, const float* state, float* y, int64_t B, int64_t N,
                                      int64_t D, int64_t K, int64_t has_silu, int64_t reverse) {
  const Conv c{x, taps, bias, state, B, N, D, has_silu != 0, reverse != 0};
  using Run = void (*)(const Conv&, float*);
  constexpr Run runs[] = {forward<2>, forward<3>, forward<4>, forward<5>, forward<6>, forward<7>, forward<8>};
  runs[K - 2](c, y);
}

extern "C" void causal_conv1d_backward(const float* x, const float* taps, const float* bias, const float* state, const float* dy, float* dx,
                                       float* dtaps, float* dbias, float* dstate, int64_t B, int64_t N, int64_t D, int64_t K, int64_t has_silu,
                                       int64_t reverse) {
  const Conv c{x, taps, bias, state, B, N, D, has_silu != 0, reverse != 0};
  using Run = void (*)(const Conv&, const float*, float*, float*, float*, float*);
  constexpr Run runs[] = {backward<2>, backward<3>, backward<4>, backward<5>, backward<6>, backward<7>, backward<8>};
  runs[K - 2](c, dy, dx, dtaps, dbias, dstate);
}
