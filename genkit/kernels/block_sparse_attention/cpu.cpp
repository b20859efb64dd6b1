// Attention over lists of blocks: q, dq [B, H, N, K], k, dk [B, H, L, K], v, dv [B, H, L, V], o, do [B, H, N, V] float32, K and V multiples of 16.
//
// Everything is a product of small matrices in registers, C (+)= A B with B's rows read as vectors and A's elements broadcast. Which side is transposed is chosen
// so that nothing but the one block a thread keeps has to be: forward and dq keep a block of queries (as columns) and walk over keys, their scores are
// [keys, queries], and maxima and sums over keys run vertically, without reductions inside a vector; dk and dv keep a block of keys and walk over queries.
#include "products.h"
#include <cmath>

// rows x width at x, `width` apart -> out [width, size] times `by`, columns from `rows` on are 0.
static void transpose(const float* x, int64_t rows, int64_t width, float by, float* out, int64_t size) {
  for (int64_t from = 0; from < width; from += 16)
    for (int64_t r = 0; r < size; ++r)
      for (int64_t c = from; c < from + 16; ++c) out[c * size + r] = r < rows ? by * x[r * width + c] : 0.0f;
}

struct Lists {
  const int32_t *starts, *partial_from, *ids, *mask_ids;
};

struct Sizes {
  int64_t B, H, N, L, K, V, size, sample_maps, head_maps;
  int64_t rows() const { return (N + size - 1) / size; }
  int64_t columns() const { return (L + size - 1) / size; }
  // Which map a head of a sample uses.
  int64_t map(int64_t head) const { return (sample_maps > 1 ? head / H : 0) * head_maps + (head_maps > 1 ? head % H : 0); }
};

// Scores of a partial block, [rows, size]: what the mask [size, size] does not show becomes -inf.
static void hide(float* scores, const uint8_t* mask, int64_t rows, int64_t size) {
  typedef uint8_t bytes __attribute__((vector_size(W)));
  for (int64_t i = 0; i < rows * size; i += W) {
    bytes shown;
    std::memcpy(&shown, mask + i, W);
    store(scores + i, __builtin_convertvector(shown, vi) != 0 ? load(scores + i) : splat(NONE));
  }
}

// Scores [keys, queries]: keys that are padding become -inf. false = all of them are.
static bool hide_padding(float* scores, const uint8_t* valid, int64_t keys, int64_t size) {
  int64_t count = 0;
  for (int64_t j = 0; j < keys; ++j) count += valid[j];
  if (count < keys)
    for (int64_t j = 0; j < keys; ++j)
      if (!valid[j])
        for (int64_t i = 0; i < size; ++i) scores[j * size + i] = NONE;
  return count;
}

// Scores in units of log 2, [keys, queries] -> 2^(score - greatest so far), with the running maxima and sums of all queries; `decay` is by how much the earlier sums shrink.
static void soften(float* scores, int64_t keys, int64_t size, float* maxima, float* sums, float* decay) {
  for (int64_t i = 0; i < size; i += W) {
    vf top = load(maxima + i), other = splat(NONE);
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      top = max(top, load(scores + j * size + i));
      other = max(other, load(scores + (j + 1) * size + i));
    }
    if (j < keys) top = max(top, load(scores + j * size + i));
    top = max(top, other);
    const vf base = top == splat(NONE) ? vf{} : top;  // nothing seen so far: all powers become 0
    const vf shrink = power(load(maxima + i) - base);
    vf total = load(sums + i) * shrink;
    for (j = 0; j < keys; ++j) {
      const vf p = power(load(scores + j * size + i) - base);
      store(scores + j * size + i, p);
      total += p;
    }
    store(maxima + i, top);
    store(sums + i, total);
    store(decay + i, shrink);
  }
}

extern "C" void attend_forward(const float* q, const float* k, const float* v, const int32_t* starts, const int32_t* partial_from, const int32_t* ids,
                               const int32_t* mask_ids, const uint8_t* masks_t, const uint8_t* valid, float* o, float* lse, int64_t B, int64_t H, int64_t N,
                               int64_t L, int64_t K, int64_t V, int64_t size, int64_t sample_maps, int64_t head_maps, float scale) {
  const Sizes s{B, H, N, L, K, V, size, sample_maps, head_maps};
  const int64_t rows = s.rows();
#pragma omp parallel
  {
    Scratch scratch(size * (K + size + V + 3));
    float *qt = scratch.take(K * size), *scores = scratch.take(size * size), *out = scratch.take(size * V);
    float *maxima = scratch.take(size), *sums = scratch.take(size), *decay = scratch.take(size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * H * rows; ++task) {
      const int64_t head = task / rows, first = task % rows * size, queries = least(size, N - first);
      const int64_t list = s.map(head) * rows + task % rows;
      transpose(q + (head * N + first) * K, queries, K, scale * LOG2E, qt, size);
      for (int64_t i = 0; i < size; ++i) maxima[i] = NONE, sums[i] = 0;
      for (int64_t i = 0; i < size * V; ++i) out[i] = 0;
      for (int64_t e = starts[list]; e < starts[list + 1]; ++e) {
        const int64_t at = ids[e] * size, keys = least(size, L - at);
        product<OVERWRITE>(k + (head * L + at) * K, K, 1, qt, size, scores, size, keys, size, K);
        if (e >= partial_from[list]) hide(scores, masks_t + mask_ids[e] * size * size, keys, size);
        if (valid && !hide_padding(scores, valid + head / H * L + at, keys, size)) continue;
        soften(scores, keys, size, maxima, sums, decay);
        product<SCALE_ADD>(scores, 1, size, v + (head * L + at) * V, V, out, V, queries, V, keys, decay);
      }
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = head * N + first + i;
        const float by = sums[i] == 0 ? 0.0f : 1.0f / sums[i];
        for (int64_t c = 0; c < V; c += W) store(o + row * V + c, load(out + i * V + c) * by);
        lse[row] = (maxima[i] + std::log2(sums[i])) / LOG2E;
      }
    }
  }
}

// From scores and dp = do . v, both [rows, size]: scores become p = 2^(score - lse), dp becomes ds = by p (dp - delta). lse and delta belong to the columns.
static void soften_columns(float* scores, float* dp, int64_t rows, int64_t size, const float* lse, const float* delta, float by) {
  for (int64_t i = 0; i < size; i += W) {
    const vf norm = load(lse + i), mean = load(delta + i);
    for (int64_t at = i; at < rows * size; at += size) {
      const vf p = power(load(scores + at) - norm);
      store(scores + at, p);
      store(dp + at, p * (load(dp + at) - mean) * by);
    }
  }
}

// The same where lse and delta belong to the rows.
static void soften_rows(float* scores, float* dp, int64_t rows, int64_t size, const float* lse, const float* delta, float by) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf norm = splat(lse[r]), mean = splat(delta[r]);
    for (int64_t at = r * size; at < (r + 1) * size; at += W) {
      const vf p = power(load(scores + at) - norm);
      store(scores + at, p);
      store(dp + at, p * (load(dp + at) - mean) * by);
    }
  }
}

// dq by blocks of queries. lse in units of log 2, +inf where a query sees nothing: all its p are then 0. delta = do . o - dlse.
extern "C" void attend_backward_q(const float* q, const float* k, const float* v, const float* lse, const float* d_o, const float* delta,
                                  const int32_t* starts, const int32_t* partial_from, const int32_t* ids, const int32_t* mask_ids, const uint8_t* masks_t,
                                  const uint8_t* valid, float* dq, int64_t B, int64_t H, int64_t N, int64_t L, int64_t K, int64_t V, int64_t size,
                                  int64_t sample_maps, int64_t head_maps, float scale) {
  const Sizes s{B, H, N, L, K, V, size, sample_maps, head_maps};
  const int64_t rows = s.rows();
#pragma omp parallel
  {
    Scratch scratch(size * (2 * K + V + 2 * size + 2));
    float *qt = scratch.take(K * size), *dot = scratch.take(V * size), *scores = scratch.take(size * size), *dp = scratch.take(size * size);
    float *sum = scratch.take(size * K), *norm = scratch.take(size), *mean = scratch.take(size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * H * rows; ++task) {
      const int64_t head = task / rows, first = task % rows * size, queries = least(size, N - first);
      const int64_t list = s.map(head) * rows + task % rows, row = head * N + first;
      transpose(q + row * K, queries, K, scale * LOG2E, qt, size);
      transpose(d_o + row * V, queries, V, 1, dot, size);
      for (int64_t i = 0; i < size; ++i) norm[i] = i < queries ? lse[row + i] : 0, mean[i] = i < queries ? delta[row + i] : 0;
      for (int64_t i = 0; i < size * K; ++i) sum[i] = 0;
      for (int64_t e = starts[list]; e < starts[list + 1]; ++e) {
        const int64_t at = ids[e] * size, keys = least(size, L - at);
        product<OVERWRITE>(k + (head * L + at) * K, K, 1, qt, size, scores, size, keys, size, K);
        if (e >= partial_from[list]) hide(scores, masks_t + mask_ids[e] * size * size, keys, size);
        if (valid && !hide_padding(scores, valid + head / H * L + at, keys, size)) continue;
        product<OVERWRITE>(v + (head * L + at) * V, V, 1, dot, size, dp, size, keys, size, V);
        soften_columns(scores, dp, keys, size, norm, mean, scale);
        product<ADD>(dp, 1, size, k + (head * L + at) * K, K, sum, K, queries, K, keys);
      }
      std::memcpy(dq + row * K, sum, 4 * queries * K);
    }
  }
}

// dk and dv of one block of keys; with dq [N, K] of the head also its share of that.
struct KeyBlock {
  const Sizes& s;
  Lists lists;
  const uint8_t *masks, *valid;
  const float *q, *k, *v, *lse, *d_o, *delta;
  float *dk, *dv, scale;
  float *kt, *vt, *scores, *dp, *dk_sum, *dv_sum;

  static int64_t floats(const Sizes& s) { return s.size * (2 * s.K + 2 * s.V + 2 * s.size); }

  void take(Scratch& scratch) {
    kt = scratch.take(s.K * s.size), vt = scratch.take(s.V * s.size), scores = scratch.take(s.size * s.size), dp = scratch.take(s.size * s.size);
    dk_sum = scratch.take(s.size * s.K), dv_sum = scratch.take(s.size * s.V);
  }

  void run(int64_t head, int64_t column, float* dq) {
    const int64_t size = s.size, K = s.K, V = s.V, first = column * size, keys = least(size, s.L - first), row = head * s.L + first;
    const int64_t list = s.map(head) * s.columns() + column;
    const uint8_t* here = valid ? valid + head / s.H * s.L + first : nullptr;
    bool is_padded = false;
    for (int64_t j = 0; here && j < keys; ++j) is_padded |= !here[j];
    transpose(k + row * K, keys, K, scale * LOG2E, kt, size);
    transpose(v + row * V, keys, V, 1, vt, size);
    for (int64_t i = 0; i < size * K; ++i) dk_sum[i] = 0;
    for (int64_t i = 0; i < size * V; ++i) dv_sum[i] = 0;
    for (int64_t e = lists.starts[list]; e < lists.starts[list + 1]; ++e) {
      const int64_t at = lists.ids[e] * size, queries = least(size, s.N - at), from = head * s.N + at;
      product<OVERWRITE>(q + from * K, K, 1, kt, size, scores, size, queries, size, K);
      if (e >= lists.partial_from[list]) hide(scores, masks + lists.mask_ids[e] * size * size, queries, size);
      if (is_padded)
        for (int64_t i = 0; i < queries; ++i)
          for (int64_t j = 0; j < keys; ++j)
            if (!here[j]) scores[i * size + j] = NONE;
      product<OVERWRITE>(d_o + from * V, V, 1, vt, size, dp, size, queries, size, V);
      soften_rows(scores, dp, queries, size, lse + from, delta + from, scale);
      product<ADD>(scores, 1, size, d_o + from * V, V, dv_sum, V, keys, V, queries);
      product<ADD>(dp, 1, size, q + from * K, K, dk_sum, K, keys, K, queries);
      if (dq) product<ADD>(dp, size, 1, k + row * K, K, dq + at * K, K, queries, K, keys);
    }
    std::memcpy(dk + row * K, dk_sum, 4 * keys * K);
    std::memcpy(dv + row * V, dv_sum, 4 * keys * V);
  }
};

// dk and dv by blocks of keys. With dq, one thread does a whole head and adds up dq on the way: five products per block instead of seven, for as many threads as heads.
extern "C" void attend_backward_k(const float* q, const float* k, const float* v, const float* lse, const float* d_o, const float* delta,
                                  const int32_t* starts, const int32_t* partial_from, const int32_t* ids, const int32_t* mask_ids, const uint8_t* masks,
                                  const uint8_t* valid, float* dk, float* dv, float* dq, int64_t B, int64_t H, int64_t N, int64_t L, int64_t K, int64_t V,
                                  int64_t size, int64_t sample_maps, int64_t head_maps, float scale) {
  const Sizes s{B, H, N, L, K, V, size, sample_maps, head_maps};
  const int64_t columns = s.columns();
#pragma omp parallel
  {
    Scratch scratch(KeyBlock::floats(s));
    KeyBlock block{s, {starts, partial_from, ids, mask_ids}, masks, valid, q, k, v, lse, d_o, delta, dk, dv, scale};
    block.take(scratch);
    if (dq) {
#pragma omp for schedule(dynamic)
      for (int64_t head = 0; head < B * H; ++head) {
        std::memset(dq + head * N * K, 0, 4 * N * K);
        for (int64_t column = 0; column < columns; ++column) block.run(head, column, dq + head * N * K);
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < B * H * columns; ++task) block.run(task / columns, task % columns, nullptr);
    }
  }
}
