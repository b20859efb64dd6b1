// Attention in windows of packed nodes: q, dq, k, dk [M, H, K], v, dv, o, do [M, H, V] float32.
//
// A task is one window of one head: its nodes are gathered to adjacent rows, keys and values also transposed, and blocks of queries walk over the whole window
// at once. Every node is in one window, so tasks share nothing, but for a bias that all windows share.
#include "products.h"
#include <cmath>

constexpr int64_t BLOCK = 64;  // queries at a time

struct Sizes {
  int64_t M, H, K, V, window, dilation, shift;
  int64_t windows() const { return (M + shift + window * dilation - 1) / (window * dilation) * dilation; }
  // Rows are filled with zeros to whole vectors, and the window's columns as well.
  static int64_t whole(int64_t n) { return (n + W - 1) / W * W; }
};

// The nodes of one window: places from..to of it are nodes first, first + dilation, ...
struct Window {
  int64_t from, to, first;
  Window(const Sizes& s, int64_t w) {
    const int64_t start = w / s.dilation * s.window * s.dilation + w % s.dilation - s.shift;  // node at place 0
    from = start < 0 ? (-start + s.dilation - 1) / s.dilation : 0;
    to = start >= s.M ? from : least(s.window, (s.M - 1 - start) / s.dilation + 1);
    if (to < from) to = from;
    first = start + from * s.dilation;
  }
  int64_t count() const { return to - from; }
};

// Rows of one head at the window's nodes, times `by`, zeros to the full width.
static void gather(const float* x, const Sizes& s, const Window& at, int64_t head, int64_t width, float by, float* out) {
  const int64_t full = Sizes::whole(width);
  for (int64_t i = 0; i < at.count(); ++i) {
    const float* row = x + ((at.first + i * s.dilation) * s.H + head) * width;
    for (int64_t c = 0; c < width; ++c) out[i * full + c] = by * row[c];
    for (int64_t c = width; c < full; ++c) out[i * full + c] = 0;
  }
}

static void scatter(const float* rows, const Sizes& s, const Window& at, int64_t head, int64_t width, float* x) {
  for (int64_t i = 0; i < at.count(); ++i)
    std::memcpy(x + ((at.first + i * s.dilation) * s.H + head) * width, rows + i * Sizes::whole(width), 4 * width);
}

// [count, width] -> [width, columns], zeros from `count` on.
static void transpose(const float* x, int64_t count, int64_t width, float* out, int64_t columns) {
  for (int64_t from = 0; from < columns; from += W)
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = from; i < from + W; ++i) out[c * columns + i] = i < count ? x[i * width + c] : 0.0f;
}

// Who is seen: nodes of the same sample, none deeper than the query. Places beyond the window's end belong to no sample.
struct Seen {
  int32_t *sample, *depth;
  bool is_all;

  void fill(const Sizes& s, const Window& at, const int64_t* samples, const int64_t* depths, int64_t columns) {
    is_all = columns == at.count() && !depths;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t node = at.first + least(i, at.count() - 1) * s.dilation;
      sample[i] = i < at.count() ? samples[node] : -1;
      depth[i] = depths ? depths[node] : 0;
      is_all &= sample[i] == sample[0];
    }
  }
  vf hide(vf scores, int64_t query, int64_t key) const {
    vi samples, depths;
    std::memcpy(&samples, sample + key, sizeof samples);
    std::memcpy(&depths, depth + key, sizeof depths);
    return (samples == sample[query]) & (depths <= depth[query]) ? scores : splat(NONE);
  }
};

// Of one task: what is computed from q, k and bias alone, in units of log 2.
struct Task {
  const Sizes& s;
  const Window at;
  const int64_t columns, K, V;
  float *q, *kt, *scores;
  Seen seen;

  static int64_t floats(const Sizes& s) {
    const int64_t n = Sizes::whole(s.window), K = Sizes::whole(s.K), V = Sizes::whole(s.V);
    return n * (5 * K + 5 * V + 4) + 2 * BLOCK * n;
  }

  Task(const Sizes& s, int64_t w, Scratch& scratch) : s(s), at(s, w), columns(Sizes::whole(at.count())), K(Sizes::whole(s.K)), V(Sizes::whole(s.V)) {
    q = scratch.take(at.count() * K), kt = scratch.take(columns * K), scores = scratch.take(BLOCK * columns);
    seen.sample = (int32_t*)scratch.take(columns), seen.depth = (int32_t*)scratch.take(columns);
  }

  // Scores of queries i.. [rows, columns], with the bias [window, window] of the window or null.
  void score(int64_t i, int64_t rows, const float* bias) {
    product<OVERWRITE>(q + i * K, K, 1, kt, columns, scores, columns, rows, columns, K);
    if (bias)
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = bias + (at.from + i + r) * s.window + at.from;
        for (int64_t c = 0; c < at.count(); ++c) scores[r * columns + c] += LOG2E * row[c];
      }
    if (!seen.is_all)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += W) store(scores + r * columns + c, seen.hide(load(scores + r * columns + c), i + r, c));
  }
};

// bias [windows or 1, H, window, window] or null, depth [M] or null; lse [H, M] in units of log 2.
extern "C" void octree_forward(const float* q, const float* k, const float* v, const int64_t* samples, const float* bias, const int64_t* depth, float* o,
                               float* lse, int64_t M, int64_t H, int64_t K, int64_t V, int64_t window, int64_t dilation, int64_t shift,
                               int64_t bias_is_shared, float scale) {
  const Sizes s{M, H, K, V, window, dilation, shift};
#pragma omp parallel
  {
    Scratch scratch(Task::floats(s) + 64 * 16);
#pragma omp for schedule(dynamic)
    for (int64_t w = 0; w < s.windows(); ++w) {
      scratch.reset();
      Task task(s, w, scratch);
      const Window& at = task.at;
      const int64_t n = at.count(), columns = task.columns;
      if (n == 0) continue;
      float *rows = scratch.take(n * task.K), *values = scratch.take(n * task.V), *out = scratch.take(n * task.V);
      task.seen.fill(s, at, samples, depth, columns);
      for (int64_t head = 0; head < H; ++head) {
        gather(q, s, at, head, K, scale * LOG2E, task.q);
        gather(k, s, at, head, K, 1, rows);
        transpose(rows, n, task.K, task.kt, columns);
        gather(v, s, at, head, V, 1, values);
        const float* here = bias ? bias + ((bias_is_shared ? 0 : w) * H + head) * window * window : nullptr;
        for (int64_t i = 0; i < n; i += BLOCK) {
          const int64_t count = least(BLOCK, n - i);
          task.score(i, count, here);
          for (int64_t r = 0; r < count; ++r) {
            float* row = task.scores + r * columns;
            vf tops = load(row), sums{};
            for (int64_t c = W; c < columns; c += W) tops = max(tops, load(row + c));
            const float top = largest<W>(tops);
            for (int64_t c = 0; c < columns; c += W) {
              const vf p = power(load(row + c) - top);
              store(row + c, p);
              sums += p;
            }
            const float weight = total<W>(sums), by = 1.0f / weight;
            for (int64_t c = 0; c < columns; c += W) store(row + c, load(row + c) * by);
            lse[head * M + at.first + (i + r) * dilation] = top + std::log2(weight);
          }
          product<OVERWRITE>(task.scores, columns, 1, values, task.V, out + i * task.V, task.V, count, task.V, n);
        }
        scatter(out, s, at, head, V, o);
      }
    }
  }
}

// delta [H, M] = do . o. dbias as bias, zeros where no node is, or null.
extern "C" void octree_backward(const float* q, const float* k, const float* v, const int64_t* samples, const float* bias, const int64_t* depth,
                                const float* lse, const float* d_o, const float* delta, float* dq, float* dk, float* dv, float* dbias, int64_t M, int64_t H,
                                int64_t K, int64_t V, int64_t window, int64_t dilation, int64_t shift, int64_t bias_is_shared, float scale) {
  const Sizes s{M, H, K, V, window, dilation, shift};
  // A shared bias collects from all windows: then a thread owns heads, otherwise windows.
  const bool by_heads = dbias && bias_is_shared;
  const int64_t tasks = by_heads ? H : s.windows();
#pragma omp parallel
  {
    Scratch scratch(Task::floats(s) + 64 * 16);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t w = by_heads ? 0 : t; w < (by_heads ? s.windows() : t + 1); ++w) {
        scratch.reset();
        Task task(s, w, scratch);
        const Window& at = task.at;
        const int64_t n = at.count(), columns = task.columns;
        if (n == 0) continue;
        float *keys = scratch.take(n * task.K), *values = scratch.take(n * task.V), *vt = scratch.take(columns * task.V), *dp = scratch.take(BLOCK * columns);
        float *dout = scratch.take(n * task.V), *q_sum = scratch.take(n * task.K), *k_sum = scratch.take(n * task.K), *v_sum = scratch.take(n * task.V);
        task.seen.fill(s, at, samples, depth, columns);
        for (int64_t head = by_heads ? t : 0; head < (by_heads ? t + 1 : H); ++head) {
          gather(q, s, at, head, K, scale * LOG2E, task.q);
          gather(k, s, at, head, K, 1, keys);
          transpose(keys, n, task.K, task.kt, columns);
          gather(v, s, at, head, V, 1, values);
          transpose(values, n, task.V, vt, columns);
          gather(d_o, s, at, head, V, 1, dout);
          std::memset(k_sum, 0, 4 * n * task.K);
          std::memset(v_sum, 0, 4 * n * task.V);
          const int64_t map = ((bias_is_shared ? 0 : w) * H + head) * window * window;
          for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t count = least(BLOCK, n - i);
            task.score(i, count, bias ? bias + map : nullptr);
            product<OVERWRITE>(dout + i * task.V, task.V, 1, vt, columns, dp, columns, count, columns, task.V);
            for (int64_t r = 0; r < count; ++r) {
              const int64_t node = at.first + (i + r) * dilation;
              const float norm = lse[head * M + node], mean = delta[head * M + node];
              for (int64_t c = r * columns; c < (r + 1) * columns; c += W) {
                const vf p = power(load(task.scores + c) - norm);
                store(task.scores + c, p);
                store(dp + c, p * (load(dp + c) - mean));
              }
              if (dbias) {
                float* row = dbias + map + (at.from + i + r) * window + at.from;
                for (int64_t c = 0; c < n; ++c) row[c] += dp[r * columns + c];
              }
            }
            product<ADD>(task.scores, 1, columns, dout + i * task.V, task.V, v_sum, task.V, n, task.V, count);
            product<ADD>(dp, 1, columns, task.q + i * task.K, task.K, k_sum, task.K, n, task.K, count);
            product<OVERWRITE>(dp, columns, 1, keys, task.K, q_sum + i * task.K, task.K, count, task.K, n);
          }
          for (int64_t i = 0; i < n * task.K; ++i) q_sum[i] *= scale, k_sum[i] *= 1 / LOG2E;  // the gathered q holds scale and log2 e already
          scatter(q_sum, s, at, head, K, dq);
          scatter(k_sum, s, at, head, K, dk);
          scatter(v_sum, s, at, head, V, dv);
        }
      }
  }
}
