// The selective scan over [B, N, D] float32, channels adjacent: a vector holds W channels of one group, and each has its own R states.
//
// A thread takes a span of up to SPAN channels of one batch entry through all steps, STEPS at a time. Within these it goes through the states NB at a
// time, so that they and their decay rates stay in registers while the time runs; sums over states gather in a small buffer [STEPS][W]. The state of a
// step is never written, only the one before every STEPS steps, from which the backward pass computes the others again.
#include "vec.h"

constexpr int STEPS = 32;
constexpr int SPAN = 64;
constexpr int BLOCKS = SPAN / W;
#if defined(__AVX512F__)
constexpr int NB = 8, NB_BACK = 2;  // of 32 registers
#else
constexpr int NB = 4, NB_BACK = 2;  // of 16
#endif
constexpr float LN2 = 0.69314718055994530942f;

// Arguments of both directions; B, C [batch, N, groups, R], h0 [batch, D, R], bias and skip [D] or null.
struct Scan {
  const float *u, *delta, *A, *B, *C, *skip, *z, *bias, *h0;
  int64_t batch, N, D, groups, R;
  bool softplus, reverse;
  int64_t width() const { return D / groups; }                                    // channels of a group
  int64_t spans() const { return (width() + SPAN - 1) / SPAN; }                   // of a group
  int64_t chunks() const { return (N + STEPS - 1) / STEPS; }
  int64_t row(int64_t t) const { return reverse ? N - 1 - t : t; }                // the token of a step
  int64_t sign() const { return reverse ? -1 : 1; }
};

// What a thread works on: W or fewer channels from the d-th on.
struct Lanes {
  int64_t d;
  int count;
  vf get(const float* p) const { return count == W ? load(p + d) : load_some(p + d, count); }
  void put(float* p, vf v) const { if (count == W) store(p + d, v); else store_some(p + d, v, count); }
};

struct Buffer {
  vf* at;
  explicit Buffer(int64_t n) : at(new vf[n]()) {}
  ~Buffer() { delete[] at; }
  Buffer(const Buffer&) = delete;
};

// Calls body(batch, group, span in the group, blocks of lanes, their number) for all spans in parallel.
template <class Body>
static void spans(const Scan& s, Body body) {
  const int64_t per_group = s.spans();
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < s.batch * s.groups * per_group; ++i) {
    const int64_t span = i % per_group, group = i / per_group % s.groups, end = (group + 1) * s.width();
    Lanes lanes[BLOCKS];
    int blocks = 0;
    for (int64_t d = group * s.width() + span * SPAN; blocks < BLOCKS && d < end; d += W)
      lanes[blocks++] = {d, end - d < W ? int(end - d) : W};
    body(i / per_group / s.groups, group, span, lanes, blocks);
  }
}

// The value as it is computed, not as algebra would have it.
static inline vf settled(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// 2^x to 2 ulp, the hot spot: x = n + f with |f| <= 1/2, 2^f by a polynomial of degree 5 (least largest relative error, 9e-8, exact at 0). Adding
// 1.5 * 2^23 + 127 rounds to a whole number and leaves n + 127, the exponent of 2^n, in the low bits. Right for |x| < 126; with ANY for all x: below
// -127 it gives 0, above 128 infinity, and NaN for NaN.
template <bool ANY>
static inline vf power(vf x) {
  if (ANY) {
    x = x < -127.0f ? splat(-127.0f) : x;
    x = x > 128.0f ? splat(128.0f) : x;
  }
  const vf magic = splat(12582912.0f + 127.0f);
  const vf n = settled(x + magic);
  const vf f = x - settled(n - magic);
  vf p = splat(1.32647273e-3f);
  p = p * f + 9.67151279e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return p * (vf)((vi)n << 23);
}

// log(1 + 2^(x log2 e)) = max(x, 0) + log1p(y), y = exp(-|x|) in (0, 1]; log1p(y) = 2 artanh(y / (2 + y)) by a polynomial (relative error 4e-9).
static inline vf softplus(vf x) {
  const vf y = power<true>((x > 0.0f ? -x : x) * LOG2E);
  const vf s = y / (2.0f + y), q = s * s;
  vf p = splat(0.281782583f);
  p = p * q + 0.279606223f;
  p = p * q + 0.400249086f;
  p = p * q + 0.666663147f;
  p = p * q + 2.0f;
  return (x > 0.0f ? x : vf{}) + p * s;
}

static inline vf logistic(vf x) { return 1.0f / (1.0f + power<true>(-x * LOG2E)); }

// Whether |d A| < 126 for all; not where there is a NaN.
static inline bool is_small(vf most_d, vf most_a) {
  const vi ok = most_d * most_a < 126.0f;
  int all = -1;
  for (int i = 0; i < W; ++i) all &= ok[i];
  return all != 0;
}
static inline vf abs_max(vf most, vf x) {
  const vf a = x < 0.0f ? -x : x;
  return most > a ? most : a;  // a NaN of x comes through
}

// [width][R] of channels to [R][W], and its largest absolute value.
static vf gather(const float* p, const Lanes& l, int64_t R, float scale, vf* out) {
  vf most{};
  for (int64_t n = 0; n < R; ++n) {
    vf v{};
    for (int i = 0; i < l.count; ++i) v[i] = p[(l.d + i) * R + n] * scale;
    out[n] = v;
    most = abs_max(most, v);
  }
  return most;
}
static void scatter(float* p, const Lanes& l, int64_t R, float scale, const vf* in) {
  for (int64_t n = 0; n < R; ++n)
    for (int i = 0; i < l.count; ++i) p[(l.d + i) * R + n] = in[n][i] * scale;
}

// One chunk of the steps of one block of lanes for M of its states.
template <int M, bool ANY>
static void advance(int len, const vf* d, const vf* x, vf* y, const vf* a_, vf* h_, const float* B, const float* C, int64_t step) {
  vf a[M], h[M];
  for (int i = 0; i < M; ++i) a[i] = a_[i], h[i] = h_[i];
  for (int t = 0; t < len; ++t, B += step, C += step) {
    const vf dt = d[t], xt = x[t];
    vf yt = y[t];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      h[i] = power<ANY>(dt * a[i]) * h[i] + xt * B[i];
      yt += h[i] * C[i];
    }
    y[t] = yt;
  }
  for (int i = 0; i < M; ++i) h_[i] = h[i];
}

template <bool ANY>
static void advance_all(int64_t R, int len, const vf* d, const vf* x, vf* y, const vf* a, vf* h, const float* B, const float* C, int64_t step) {
  int64_t n = 0;
  for (; n + NB <= R; n += NB) advance<NB, ANY>(len, d, x, y, a + n, h + n, B + n, C + n, step);
  for (; n < R; ++n) advance<1, ANY>(len, d, x, y, a + n, h + n, B + n, C + n, step);
}

// Rows of a span are short and far apart: the processor does not foresee them, so the next chunk's are asked for while this one is computed.
static inline void expect(const float* p) { __builtin_prefetch(p, 0, 2); }
static inline void expect_write(const float* p) { __builtin_prefetch(p, 1, 2); }

// The step sizes and inputs of a chunk: d [len][W] after bias and softplus, x = d u. Returns the largest |d|.
// `ahead`: from a row to that of the next chunk, in floats.
static vf prepare(const Scan& s, int64_t batch, const Lanes& l, int64_t first, int len, int64_t ahead, vf* d, vf* x) {
  const vf bias = s.bias ? l.get(s.bias) : vf{};
  vf most{};
  for (int t = 0; t < len; ++t) {
    const int64_t at = (batch * s.N + s.row(first + t)) * s.D;
    expect(s.delta + at + l.d + ahead);
    expect(s.u + at + l.d + ahead);
    vf v = l.get(s.delta + at) + bias;
    if (s.softplus) v = softplus(v);
    d[t] = v;
    x[t] = v * l.get(s.u + at);
    most = abs_max(most, v);
  }
  return most;
}

// kept [batch, chunks, R, D]: the state before every chunk; null = not wanted.
extern "C" void selective_scan_forward(const float* u, const float* delta, const float* A, const float* B, const float* C, const float* skip,
                                       const float* z, const float* bias, const float* h0, float* out, float* last, float* kept, int64_t batch_,
                                       int64_t N, int64_t D, int64_t groups, int64_t R, int64_t softplus_, int64_t reverse) {
  const Scan s{u, delta, A, B, C, skip, z, bias, h0, batch_, N, D, groups, R, softplus_ != 0, reverse != 0};
  spans(s, [&](int64_t batch, int64_t group, int64_t, const Lanes* lanes, int blocks) {
    const Buffer a(blocks * R), h(blocks * R);
    vf most_a[BLOCKS], d[STEPS], x[STEPS], y[STEPS];
    for (int k = 0; k < blocks; ++k) {
      most_a[k] = gather(s.A, lanes[k], R, LOG2E, a.at + k * R);
      gather(s.h0 + batch * D * R, lanes[k], R, 1.0f, h.at + k * R);
    }
    const int64_t ahead = s.sign() * STEPS * D;
    for (int64_t first = 0; first < N; first += STEPS) {
      const int len = N - first < STEPS ? int(N - first) : STEPS;
      const int64_t map = ((batch * N + s.row(first)) * groups + group) * R, step = s.sign() * groups * R;
      for (int k = 0; k < blocks; ++k) {
        const Lanes& l = lanes[k];
        vf *ak = a.at + k * R, *hk = h.at + k * R;
        if (kept)
          for (int64_t n = 0; n < R; ++n) {
            float* to = kept + ((batch * s.chunks() + first / STEPS) * R + n) * D;
            l.put(to, hk[n]);
            expect_write(to + l.d + R * D);
          }
        const vf most_d = prepare(s, batch, l, first, len, ahead, d, x);
        for (int t = 0; t < len; ++t) y[t] = vf{};
        if (is_small(most_d, most_a[k]))
          advance_all<false>(R, len, d, x, y, ak, hk, B + map, C + map, step);
        else
          advance_all<true>(R, len, d, x, y, ak, hk, B + map, C + map, step);
        const vf D_skip = skip ? l.get(skip) : vf{};
        for (int t = 0; t < len; ++t) {
          const int64_t at = (batch * N + s.row(first + t)) * D;
          vf v = y[t];
          if (skip) v += D_skip * l.get(u + at);
          if (z) {
            const vf gate = l.get(z + at);
            v *= gate * logistic(gate);
            expect(z + at + l.d + ahead);
          }
          l.put(out + at, v);
          expect_write(out + at + l.d + ahead);
        }
      }
    }
    for (int k = 0; k < blocks; ++k) scatter(last + batch * D * R, lanes[k], R, 1.0f, h.at + k * R);
  });
}

// Buffers of one block of lanes in the backward pass; each [STEPS] vectors.
struct Chunk {
  vf d[STEPS], x[STEPS], dy[STEPS];  // step size; step size times input; gradient of C . h
  vf y[STEPS];                       // C . h, only where a gate needs it
  vf gB[STEPS], gA[STEPS];           // sums over states of the state's gradient times B, and times decayed state times A log2 e
};

// One chunk backwards, for M states from the n-th on: `carry` is the gradient of the state behind the chunk and becomes that of the state before it.
// Adds to dA, and per step and state the lanes' shares of dB and dC to shareB, shareC [STEPS][M].
template <int M, bool ANY, bool GATED>
static void retreat(int len, Chunk& c, const vf* a_, const vf* h_, vf* carry_, vf* dA_, const float* B, const float* C, int64_t step, vf* shareB,
                    vf* shareC) {
  vf e[STEPS * M], h[(STEPS + 1) * M];
  vf a[M], carry[M], dA[M];
  for (int i = 0; i < M; ++i) a[i] = a_[i], h[i] = h_[i];
  const float *b = B, *q = C;
  {
    vf state[M];
    for (int i = 0; i < M; ++i) state[i] = h_[i];
    for (int t = 0; t < len; ++t, b += step, q += step) {
      const vf dt = c.d[t], xt = c.x[t];
      vf yt = GATED ? c.y[t] : vf{};
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const vf decay = power<ANY>(dt * a[i]);
        state[i] = decay * state[i] + xt * b[i];
        e[t * M + i] = decay;
        h[(t + 1) * M + i] = state[i];
        if (GATED) yt += state[i] * q[i];
      }
      if (GATED) c.y[t] = yt;
    }
  }
  for (int i = 0; i < M; ++i) carry[i] = carry_[i], dA[i] = dA_[i];
  for (int t = len - 1; t >= 0; --t) {
    b -= step, q -= step;
    const vf dt = c.d[t], xt = c.x[t], dy = c.dy[t];
    vf gB = c.gB[t], gA = c.gA[t];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const vf g = carry[i] + dy * q[i];
      shareC[t * M + i] += dy * h[(t + 1) * M + i];
      shareB[t * M + i] += xt * g;
      gB += g * b[i];
      carry[i] = g * e[t * M + i];
      const vf w = carry[i] * h[t * M + i];
      gA += w * a[i];
      dA[i] += w * dt;
    }
    c.gB[t] = gB;
    c.gA[t] = gA;
  }
  for (int i = 0; i < M; ++i) carry_[i] = carry[i], dA_[i] = dA[i];
}

// Sums of M vectors over their lanes, W / M partial sums of each side by side; M = W gives one number per lane.
template <int M>
static inline vf fold(const vf* v) {
  if constexpr (M == 1) {
    return v[0];
  } else {
    const vf low = fold<M / 2>(v), high = fold<M / 2>(v + M / 2);
    vi even, odd;
    for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(low, high, even) + __builtin_shuffle(low, high, odd);
  }
}

// What one span needs besides its chunks.
struct Span {
  const Lanes* lanes;
  int blocks;
  const vf* a;        // [blocks][R]
  const vf* kept;     // [blocks][R], the state before the chunk
  vf *carry, *dA;     // [blocks][R]
  const bool* small;  // [blocks]
};

// One chunk backwards for M states of all blocks of a span; dB, dC point at the row of the first step.
template <int M, bool GATED>
static void retreat_span(const Span& p, int64_t R, int64_t n, int len, Chunk* chunks, const float* B, const float* C, int64_t step, float* dB,
                         float* dC) {
  alignas(64) vf shareB[STEPS * M] = {}, shareC[STEPS * M] = {};
  for (int k = 0; k < p.blocks; ++k) {
    const int64_t at = k * R + n;
    const auto run = p.small[k] ? retreat<M, false, GATED> : retreat<M, true, GATED>;
    run(len, chunks[k], p.a + at, p.kept + at, p.carry + at, p.dA + at, B + n, C + n, step, shareB, shareC);
  }
  static_assert(STEPS * M % W == 0);
  alignas(64) float sumB[STEPS * M], sumC[STEPS * M];
  for (int i = 0; i < len * M; i += W) {
    store(sumB + i, fold<W>(shareB + i));
    store(sumC + i, fold<W>(shareC + i));
  }
  for (int t = 0; t < len; ++t) {
    std::memcpy(dB + t * step + n, sumB + t * M, sizeof(float) * M);
    std::memcpy(dC + t * step + n, sumC + t * M, sizeof(float) * M);
  }
}

template <bool GATED>
static void retreat_all(const Span& p, int64_t R, int len, Chunk* chunks, const float* B, const float* C, int64_t step, float* dB, float* dC) {
  int64_t n = 0;
  for (; n + NB_BACK <= R; n += NB_BACK) retreat_span<NB_BACK, GATED>(p, R, n, len, chunks, B, C, step, dB, dC);
  for (; n < R; ++n) retreat_span<1, GATED>(p, R, n, len, chunks, B, C, step, dB, dC);
}

// Sums over the batch, and over spans for dB and dC [batch, spans, N, groups, R], are left to the caller: their order does not depend on threads.
// dA [batch, D, R]; dskip, dbias [batch, D]; dlast null = 0; dskip, dz, dbias null where the input is.
extern "C" void selective_scan_backward(const float* u, const float* delta, const float* A, const float* B, const float* C, const float* skip,
                                        const float* z, const float* bias, const float* h0, const float* kept, const float* dout,
                                        const float* dlast, float* du, float* ddelta, float* dA, float* dB, float* dC, float* dskip, float* dz,
                                        float* dbias, float* dh0, int64_t batch_, int64_t N, int64_t D, int64_t groups, int64_t R,
                                        int64_t softplus_, int64_t reverse) {
  const Scan s{u, delta, A, B, C, skip, z, bias, h0, batch_, N, D, groups, R, softplus_ != 0, reverse != 0};
  spans(s, [&](int64_t batch, int64_t group, int64_t span, const Lanes* lanes, int blocks) {
    const Buffer a(blocks * R), h(blocks * R), carry(blocks * R), sumA(blocks * R);
    Chunk chunks[BLOCKS];
    vf most_a[BLOCKS], sum_skip[BLOCKS] = {}, sum_bias[BLOCKS] = {};
    bool small[BLOCKS];
    for (int k = 0; k < blocks; ++k) {
      most_a[k] = gather(A, lanes[k], R, LOG2E, a.at + k * R);
      if (dlast) gather(dlast + batch * D * R, lanes[k], R, 1.0f, carry.at + k * R);
    }
    const Span p{lanes, blocks, a.at, h.at, carry.at, sumA.at, small};
    const int64_t step = s.sign() * groups * R, ahead = -s.sign() * STEPS * D;
    for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t first = chunk * STEPS;
      const int len = N - first < STEPS ? int(N - first) : STEPS;
      for (int k = 0; k < blocks; ++k) {
        const Lanes& l = lanes[k];
        Chunk& c = chunks[k];
        for (int64_t n = 0; n < R; ++n) {
          const float* from = kept + ((batch * s.chunks() + chunk) * R + n) * D;
          h.at[k * R + n] = l.get(from);
          expect(from + l.d - R * D);
        }
        small[k] = is_small(prepare(s, batch, l, first, len, ahead, c.d, c.x), most_a[k]);
        for (int t = 0; t < len; ++t) {
          const int64_t at = (batch * N + s.row(first + t)) * D;
          c.dy[t] = l.get(dout + at);
          expect(dout + at + l.d + ahead);
          if (z) {
            const vf gate = l.get(z + at);
            c.dy[t] *= gate * logistic(gate);
            expect(z + at + l.d + ahead);
          }
          c.y[t] = c.gB[t] = c.gA[t] = vf{};
        }
      }
      const int64_t map = ((batch * N + s.row(first)) * groups + group) * R;
      const int64_t share = (((batch * s.spans() + span) * N + s.row(first)) * groups + group) * R;
      if (z)
        retreat_all<true>(p, R, len, chunks, B + map, C + map, step, dB + share, dC + share);
      else
        retreat_all<false>(p, R, len, chunks, B + map, C + map, step, dB + share, dC + share);
      for (int k = 0; k < blocks; ++k) {
        const Lanes& l = lanes[k];
        const Chunk& c = chunks[k];
        const vf D_skip = skip ? l.get(skip) : vf{}, shift = bias ? l.get(bias) : vf{};
        for (int t = 0; t < len; ++t) {
          const int64_t at = (batch * N + s.row(first + t)) * D;
          const vf ut = l.get(u + at);
          vf v = ut * c.gB[t] + c.gA[t] * LN2;
          if (s.softplus) v *= logistic(l.get(delta + at) + shift);
          l.put(ddelta + at, v);
          expect_write(ddelta + at + l.d + ahead);
          expect_write(du + at + l.d + ahead);
          sum_bias[k] += v;
          l.put(du + at, c.d[t] * c.gB[t] + D_skip * c.dy[t]);
          sum_skip[k] += c.dy[t] * ut;
          if (z) {
            const vf gate = l.get(z + at), open = logistic(gate);
            expect_write(dz + at + l.d + ahead);
            l.put(dz + at, l.get(dout + at) * (c.y[t] + D_skip * ut) * open * (1.0f + gate * (1.0f - open)));
          }
        }
      }
    }
    for (int k = 0; k < blocks; ++k) {
      scatter(dA + batch * D * R, lanes[k], R, 1.0f, sumA.at + k * R);
      scatter(dh0 + batch * D * R, lanes[k], R, 1.0f, carry.at + k * R);
      if (dskip) lanes[k].put(dskip + batch * D, sum_skip[k]);
      if (dbias) lanes[k].put(dbias + batch * D, sum_bias[k]);
    }
  });
}
