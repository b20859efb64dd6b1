// Attention in windows of packed nodes: q, dq, k, dk [M, H, K], v, dv, o, do [M, H, V] float32.
//
// A task is one window of one head: its nodes are gathered to adjacent rows, keys and values also transposed, and blocks of queries of one sample walk at once
// over the run of the window that they see something of. Every node is in one window, so tasks share nothing, but for a bias that all windows share.
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

// Queries from.. of one sample, and the columns lo.. that hold whatever they see; none for fillers.
struct Part {
  int64_t from, count, lo, columns;
  const uint8_t* is_mixed;  // per vector of columns: whether somebody does not see all of it
};

// Who is seen: nodes of the same sample, none deeper than the query. Fillers, and places beyond the window's end, belong to sample -1 and see nothing.
struct Seen {
  int32_t *sample, *depth;
  std::vector<Part> parts;
  std::vector<uint8_t> is_mixed;

  void fill(const Sizes& s, const Window& at, const int64_t* samples, const int64_t* depths, int64_t columns) {
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t node = at.first + least(i, at.count() - 1) * s.dilation;
      sample[i] = i < at.count() && samples[node] >= 0 ? samples[node] : -1;
      depth[i] = depths ? depths[node] : 0;
    }
    for (int64_t i = 0; i < at.count(); i += parts.back().count) parts.push_back(part(i, at.count()));
    is_mixed.resize(parts.size() * columns / W);
    uint8_t* next = is_mixed.data();
    for (Part& p : parts) {
      p.is_mixed = next;
      next = mark(p, next);
    }
  }
  // The queries from `from` on that stand next to each other and are of one sample, at most BLOCK.
  Part part(int64_t from, int64_t n) const {
    const int32_t id = sample[from];
    int64_t to = from + 1, first = from, last = from;
    int32_t deepest = depth[from];
    for (; to < n && to < from + BLOCK && sample[to] == id; ++to) deepest = depth[to] > deepest ? depth[to] : deepest;
    if (id < 0) return {from, to - from, 0, 0, nullptr};
    for (int64_t c = 0; c < n; ++c)
      if (sample[c] == id && depth[c] <= deepest) first = least(first, c), last = c > last ? c : last;
    return {from, to - from, first / W * W, Sizes::whole(last + 1) - first / W * W, nullptr};
  }
  uint8_t* mark(const Part& p, uint8_t* next) const {
    int32_t least_deep = depth[p.from];
    for (int64_t i = p.from; i < p.from + p.count; ++i) least_deep = depth[i] < least_deep ? depth[i] : least_deep;
    for (int64_t v = p.lo; v < p.lo + p.columns; v += W, ++next) {
      *next = 0;
      for (int64_t c = v; c < v + W; ++c) *next |= sample[c] != sample[p.from] || depth[c] > least_deep;
    }
    return next;
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

  // Nodes among the columns of a part; the rest of its last vector are places beyond the window's end.
  int64_t nodes(const Part& p) const { return least(p.columns, at.count() - p.lo); }

  // Scores [count, columns] of a part, with the bias [window, window] of the window or null.
  void score(const Part& p, const float* bias) {
    product<OVERWRITE>(q + p.from * K, K, 1, kt + p.lo, columns, scores, p.columns, p.count, p.columns, s.K);
    if (bias)
      for (int64_t r = 0; r < p.count; ++r) {
        const float* row = bias + (at.from + p.from + r) * s.window + at.from + p.lo;
        for (int64_t c = 0; c < nodes(p); ++c) scores[r * p.columns + c] += LOG2E * row[c];
      }
    for (int64_t c = 0; c < p.columns; c += W)
      if (p.is_mixed[c / W])
        for (int64_t r = 0; r < p.count; ++r) {
          float* here = scores + r * p.columns + c;
          store(here, seen.hide(load(here), p.from + r, p.lo + c));
        }
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
        for (const Part& p : task.seen.parts) {
          float *sums_of = lse + head * M + at.first + p.from * dilation, *answers = out + p.from * task.V;
          if (p.columns == 0) {
            std::memset(answers, 0, 4 * p.count * task.V);
            for (int64_t r = 0; r < p.count; ++r) sums_of[r * dilation] = 0;
            continue;
          }
          task.score(p, here);
          float by[BLOCK];
          for (int64_t r = 0; r < p.count; ++r) {
            float* row = task.scores + r * p.columns;
            vf tops = load(row), sums{};
            for (int64_t c = W; c < p.columns; c += W) tops = max(tops, load(row + c));
            const float top = largest<W>(tops);
            for (int64_t c = 0; c < p.columns; c += W) {
              const vf weights = power(load(row + c) - top);
              store(row + c, weights);
              sums += weights;
            }
            const float weight = total<W>(sums);
            by[r] = 1.0f / weight;
            sums_of[r * dilation] = top + std::log2(weight);
          }
          product<OVERWRITE>(task.scores, p.columns, 1, values + p.lo * task.V, task.V, answers, task.V, p.count, task.V, task.nodes(p));
          for (int64_t r = 0; r < p.count; ++r)
            for (int64_t c = 0; c < task.V; c += W) store(answers + r * task.V + c, load(answers + r * task.V + c) * by[r]);
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
          for (const Part& p : task.seen.parts) {
            float* q_rows = q_sum + p.from * task.K;
            if (p.columns == 0) {
              std::memset(q_rows, 0, 4 * p.count * task.K);
              continue;
            }
            const int64_t nodes = task.nodes(p);
            const float* d_rows = dout + p.from * task.V;
            task.score(p, bias ? bias + map : nullptr);
            product<OVERWRITE>(d_rows, task.V, 1, vt + p.lo, columns, dp, p.columns, p.count, p.columns, V);
            for (int64_t r = 0; r < p.count; ++r) {
              const int64_t node = at.first + (p.from + r) * dilation;
              const float norm = lse[head * M + node], mean = delta[head * M + node];
              for (int64_t c = r * p.columns; c < (r + 1) * p.columns; c += W) {
                const vf weights = power(load(task.scores + c) - norm);
                store(task.scores + c, weights);
                store(dp + c, weights * (load(dp + c) - mean));
              }
              if (dbias) {
                float* row = dbias + map + (at.from + p.from + r) * window + at.from + p.lo;
                for (int64_t c = 0; c < nodes; ++c) row[c] += dp[r * p.columns + c];
              }
            }
            product<ADD>(task.scores, 1, p.columns, d_rows, task.V, v_sum + p.lo * task.V, task.V, nodes, task.V, p.count);
            product<ADD>(dp, 1, p.columns, task.q + p.from * task.K, task.K, k_sum + p.lo * task.K, task.K, nodes, task.K, p.count);
            product<OVERWRITE>(dp, p.columns, 1, keys + p.lo * task.K, task.K, q_rows, task.K, p.count, task.K, nodes);
          }
          for (int64_t i = 0; i < n * task.K; ++i) q_sum[i] *= scale, k_sum[i] *= 1 / LOG2E;  // the gathered q holds scale and log2 e already
          scatter(q_sum, s, at, head, K, dq);
          scatter(k_sum, s, at, head, K, dk);
          scatter(v_sum, s, at, head, V, dv);
        }
      }
  }
}
