// State-space duality: linear attention with one decay per head. q, k [B, N, G, K], v [B, N, H, V], g [B, N, H], float32; see linear_attention.h.
#include "linear_attention.h"

using namespace linear_attention;

struct HeadGate {
  Rows<const float> g;
  void operator()(int64_t t, float* to, int64_t, int64_t count) const {
    const vf decay = exp(splat(g[t][0]));
    int64_t c = 0;
    for (; c + W <= count; c += W) store(to + c, decay);
    if (c < count) store_some(to + c, decay, count - c);
  }
};

struct Inputs {
  const float *q, *k, *v, *g;
  int64_t N, H, G, K, V;
  float scale;
  bool reverse;
  Head<HeadGate> head(int64_t i) const {
    const int64_t b = i / H, h = i % H, group = h / (H / G);
    return {N,
            K,
            V,
            scale,
            rows(q, b, group, N, G, K, reverse),
            rows(k, b, group, N, G, K, reverse),
            rows(v, b, h, N, H, V, reverse),
            {rows(g, b, h, N, H, 1, reverse)}};
  }
};

extern "C" void ssd_forward(const float* q, const float* k, const float* v, const float* g, const float* h0, float* o, float* last, int64_t B, int64_t N,
                            int64_t H, int64_t G, int64_t K, int64_t V, float scale, int64_t reverse) {
  const Inputs in{q, k, v, g, N, H, G, K, V, scale, reverse != 0};
  each_part(B * H, V, parts(B * H, V), [&](int64_t i, int64_t, int64_t first, int64_t count) {
    forward(in.head(i), h0 ? h0 + i * K * V : nullptr, rows(o, i / H, i % H, N, H, V, in.reverse), last + i * K * V, first, count);
  });
}

// dq and dk are [B, N, H, K], to be summed over the heads of a group.
extern "C" void ssd_backward(const float* q, const float* k, const float* v, const float* g, const float* h0, const float* dout, const float* dlast, float* dq,
                             float* dk, float* dv, float* dg, float* dh0, int64_t B, int64_t N, int64_t H, int64_t G, int64_t K, int64_t V, float scale,
                             int64_t reverse) {
  const Inputs in{q, k, v, g, N, H, G, K, V, scale, reverse != 0};
  auto of = [&](auto* base, int64_t i, int64_t width) { return rows(base, i / H, i % H, N, H, width, in.reverse); };
  each_part(B * H, V, parts(B * H, V), [&](int64_t i, int64_t, int64_t first, int64_t count) {
    backward_values(in.head(i), of(dout, i, V), dlast ? dlast + i * K * V : nullptr, of(dv, i, V), dh0 + i * K * V, first, count);
  });
  const int64_t cut = parts(B * H, K), size = B * N * H;
  Scratch sums(cut * size);  // of the channels of each part
  each_part(B * H, K, cut, [&](int64_t i, int64_t part, int64_t first, int64_t count) {
    const Rows<float> to = of(sums + part * size, i, 1);
    backward_keys(
        in.head(i), h0 ? h0 + i * K * V : nullptr, of(dout, i, V), dlast ? dlast + i * K * V : nullptr, of(dq, i, K), of(dk, i, K),
        [&](int64_t t, const float* row, int64_t, int64_t n) {
          float total = 0;
          for (int64_t c = 0; c < n; ++c) total += row[c];
          *to[t] = total;
        },
        first, count);
  });
  std::memcpy(dg, sums, 4 * size);
  for (int64_t part = 1; part < cut; ++part)
    for (int64_t i = 0; i < size; ++i) dg[i] += sums[part * size + i];
}
