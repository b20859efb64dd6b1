// One new token of each sample through one block of a Llama-like transformer, in one pass over its weights; see reference.py.
//
// With few samples the time is that of reading the weights: every row is read once, for all samples, and nothing but the sums leaves the registers.
#include "../vec.h"
#include <algorithm>
#include <cmath>
#include <vector>

// Rows of the weights and samples that are multiplied at a time.
constexpr int ROWS = W == 16 ? 4 : 2;
constexpr int COLS = 4;
constexpr int AHEAD = 1024;  // floats that are asked for before they are needed

static inline float dot(const float* a, const float* b, int64_t n) {
  vf sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * W <= n; d += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(a + d + i * W + AHEAD);
      sums[i] += load(a + d + i * W) * load(b + d + i * W);
    }
  }
  for (; d + W <= n; d += W) sums[0] += load(a + d) * load(b + d);
  if (d < n) sums[1] += load_some(a + d, int(n - d)) * load_some(b + d, int(n - d));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out[r][c] = row r of w times row c of x, over n.
template <int R, int C>
static inline void dots(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t n, float (&out)[R][C]) {
  vf sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = vf{};
  int64_t d = 0;
  for (; d + W <= n; d += W) {
    vf right[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) right[c] = load(x + c * ldx + d);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf left = load(w + r * ldw + d);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[r][c] += left * right[c];
    }
  }
  if (d < n) {
    const int rest = int(n - d);
    for (int r = 0; r < R; ++r) {
      const vf left = load_some(w + r * ldw + d, rest);
      for (int c = 0; c < C; ++c) sums[r][c] += left * load_some(x + c * ldx + d, rest);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum(sums[r][c]);
}

// use(row, sample, value) for R rows from `first` and all samples.
template <int R, class Use>
static inline void rows_by_samples(const float* w, int64_t first, const float* x, int64_t n, int64_t batch, const Use& use) {
  int64_t b = 0;
  for (; b + COLS <= batch; b += COLS) {
    float out[R][COLS];
    dots<R, COLS>(w + first * n, n, x + b * n, n, n, out);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < COLS; ++c) use(first + r, b + c, out[r][c]);
  }
  for (; b < batch; ++b) {
    float out[R][1];
    dots<R, 1>(w + first * n, n, x + b * n, n, n, out);
    for (int r = 0; r < R; ++r) use(first + r, b, out[r][0]);
  }
}

// The rows first .. last - 1 of w [., n] times x [batch, n].
template <class Use>
static inline void product(const float* w, int64_t first, int64_t last, const float* x, int64_t n, int64_t batch, const Use& use) {
  int64_t m = first;
  if (batch == 1)  // one stream through memory, which is all that counts here
    for (; m < last; ++m) use(m, 0, dot(w + m * n, x, n));
  for (; m + ROWS <= last; m += ROWS) rows_by_samples<ROWS>(w, m, x, n, batch, use);
  for (; m < last; ++m) rows_by_samples<1>(w, m, x, n, batch, use);
}

static void rms_norm(const float* x, const float* weight, float* y, int64_t n, float eps) {
  vf squares{};
  int64_t d = 0;
  for (; d + W <= n; d += W) squares += load(x + d) * load(x + d);
  if (d < n) {
    const vf rest = load_some(x + d, int(n - d));
    squares += rest * rest;
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

// The first and second half of a head turned against each other.
static void turn(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cosine[j] - b * sine[j];
    x[j + half] = b * cosine[j] + a * sine[j];
  }
}

// One query over `length` keys and values [length, width]. scores [length + W] is room.
static void attend(const float* q, const float* keys, const float* values, float* out, float* scores, int64_t length, int64_t width, float scale) {
  float largest = -__builtin_inff();
  int64_t t = 0;
  for (; t + 4 <= length; t += 4) {
    float out4[4][1];
    dots<4, 1>(keys + t * width, width, q, width, width, out4);
    for (int i = 0; i < 4; ++i) {
      scores[t + i] = out4[i][0] * scale;
      largest = std::max(largest, scores[t + i]);
    }
  }
  for (; t < length; ++t) {
    scores[t] = dot(keys + t * width, q, width) * scale;
    largest = std::max(largest, scores[t]);
  }
  for (int64_t i = length; i < length + W; ++i) scores[i] = -__builtin_inff();
  vf total{};
  for (t = 0; t < length; t += W) {
    const vf p = exp(load(scores + t) - largest);
    store(scores + t, p);
    total += p;
  }
  const float share = 1.0f / sum(total);
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W) {
    vf sums[4] = {};
    for (t = 0; t < length; ++t) {
      const vf p = splat(scores[t]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] += p * load(values + t * width + d + i * W);
    }
    for (int i = 0; i < 4; ++i) store(out + d + i * W, sums[i] * share);
  }
  for (; d < width; d += W) {
    const int n = int(std::min<int64_t>(W, width - d));
    vf s{};
    for (t = 0; t < length; ++t) s += splat(scores[t]) * load_some(values + t * width + d, n);
    store_some(out + d, s * share, n);
  }
}

// Room in floats: B (D + (H + 2 G) K + H K + F), and for each thread `room` + W.
extern "C" void decode_block(const float* x, float* out, const float* norm1, const float* wqkv, const float* wo, const float* norm2, const float* wup,
                             const float* wdown, const float* cosine, const float* sine, float* keys, float* values,
                             const int64_t* first_seen, int64_t B, int64_t D, int64_t H, int64_t G, int64_t K, int64_t F, int64_t length, int64_t room, float eps) {
  const int64_t heads = H + 2 * G;
  std::vector<float> memory(B * (D + heads * K + H * K + F));
  float *normed = memory.data(), *qkv = normed + B * D, *mixed = qkv + B * heads * K, *hidden = mixed + B * H * K;
  const float scale = 1.0f / std::sqrt(float(K));
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    // Shares of n rows, in whole tiles.
    const auto from = [&](int64_t n, int64_t part) { return std::min(n, (n + threads * 8 - 1) / (threads * 8) * 8 * part); };
    const auto first = [&](int64_t n) { return from(n, thread); };
    const auto last = [&](int64_t n) { return from(n, thread + 1); };
    std::vector<float> scores(room + W);
#pragma omp for
    for (int64_t b = 0; b < B; ++b) rms_norm(x + b * D, norm1, normed + b * D, D, eps);
    product(wqkv, first(heads * K), last(heads * K), normed, D, B, [&](int64_t m, int64_t b, float y) { qkv[b * heads * K + m] = y; });
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < B * G; ++i) {
      const int64_t b = i / G, g = i % G, before = first_seen ? first_seen[b] : 0, seen = (b * G + g) * room + before;
      float* k = qkv + (b * heads + H + g) * K;
      float* own = keys + ((b * G + g) * room + length) * K;
      turn(k, cosine, sine, K / 2);
      std::copy(k, k + K, own);
      std::copy(k + G * K, k + (G + 1) * K, values + ((b * G + g) * room + length) * K);
      for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h) {
        float* q = qkv + (b * heads + h) * K;
        turn(q, cosine, sine, K / 2);
        attend(q, keys + seen * K, values + seen * K, mixed + (b * H + h) * K, scores.data(), length + 1 - before, K, scale);
      }
    }
    product(wo, first(D), last(D), mixed, H * K, B, [&](int64_t m, int64_t b, float y) { out[b * D + m] = x[b * D + m] + y; });
#pragma omp barrier
#pragma omp for
    for (int64_t b = 0; b < B; ++b) rms_norm(out + b * D, norm2, normed + b * D, D, eps);
    // A gate and the value it belongs to are rows F apart: the thread that has the one has the other.
    product(wup + F * D, first(F), last(F), normed, D, B, [&](int64_t m, int64_t b, float y) { hidden[b * F + m] = y; });
    product(wup, first(F), last(F), normed, D, B, [&](int64_t m, int64_t b, float y) { hidden[b * F + m] *= y / (1.0f + std::exp(-y)); });
#pragma omp barrier
    product(wdown, first(D), last(D), hidden, F, B, [&](int64_t m, int64_t b, float y) { out[b * D + m] += y; });
  }
}
