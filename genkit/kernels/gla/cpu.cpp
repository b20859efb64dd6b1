// Gated linear attention over [B, N, H, K] and [B, N, H, V] float32; see linear_attention.h.
#include "linear_attention.h"

using namespace linear_attention;

struct ChannelGate {
  Rows<const float> g;
  void operator()(int64_t t, float* to, int64_t first, int64_t count) const {
    const float* from = g[t] + first;
    int64_t c = 0;
    for (; c + W <= count; c += W) store(to + c, exp(load(from + c)));
    if (c < count) store(to + c, exp(load_some(from + c, count - c)));
  }
};

struct Inputs {
  const float *q, *k, *v, *g;
  int64_t N, H, K, V;
  float scale;
  bool reverse;
  Head<ChannelGate> head(int64_t i) const {
    const int64_t b = i / H, h = i % H;
    return {N,
            K,
            V,
            scale,
            rows(q, b, h, N, H, K, reverse),
            rows(k, b, h, N, H, K, reverse),
            rows(v, b, h, N, H, V, reverse),
            {rows(g, b, h, N, H, K, reverse)}};
  }
};

extern "C" void gla_forward(const float* q, const float* k, const float* v, const float* g, const float* h0, float* o, float* last, int64_t B, int64_t N,
                            int64_t H, int64_t K, int64_t V, float scale, int64_t reverse) {
  const Inputs in{q, k, v, g, N, H, K, V, scale, reverse != 0};
  each_part(B * H, V, parts(B * H, V), [&](int64_t i, int64_t, int64_t first, int64_t count) {
    forward(in.head(i), h0 ? h0 + i * K * V : nullptr, rows(o, i / H, i % H, N, H, V, in.reverse), last + i * K * V, first, count);
  });
}

extern "C" void gla_backward(const float* q, const float* k, const float* v, const float* g, const float* h0, const float* dout, const float* dlast, float* dq,
                             float* dk, float* dv, float* dg, float* dh0, int64_t B, int64_t N, int64_t H, int64_t K, int64_t V, float scale,
                             int64_t reverse) {
  const Inputs in{q, k, v, g, N, H, K, V, scale, reverse != 0};
  auto of = [&](auto* base, int64_t i, int64_t width) { return rows(base, i / H, i % H, N, H, width, in.reverse); };
  each_part(B * H, V, parts(B * H, V), [&](int64_t i, int64_t, int64_t first, int64_t count) {
    backward_values(in.head(i), of(dout, i, V), dlast ? dlast + i * K * V : nullptr, of(dv, i, V), dh0 + i * K * V, first, count);
  });
  each_part(B * H, K, parts(B * H, K), [&](int64_t i, int64_t, int64_t first, int64_t count) {
    const Rows<float> to = of(dg, i, K);
    backward_keys(
        in.head(i), h0 ? h0 + i * K * V : nullptr, of(dout, i, V), dlast ? dlast + i * K * V : nullptr, of(dq, i, K), of(dk, i, K),
        [&](int64_t t, const float* row, int64_t c, int64_t n) { std::memcpy(to[t] + c, row, 4 * n); }, first, count);
  });
}
