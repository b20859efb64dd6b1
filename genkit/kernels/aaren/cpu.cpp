// Prefix softmax as a recurrence: o_t = keep_t o_{t-1} + share_t v_t per head, where keep_t = exp(L_{t-1} - L_t) and share_t = exp(s_t - L_t) come from the
// running largest score and sum. A thread owns a run of heads of one batch entry for all tokens; o of the token before is still in the first cache.
#include "vec.h"
#include <cmath>
#include <vector>

// Calls body(batch entry, first head, number of heads) for all runs in parallel.
template <class Body>
static void runs(int64_t B, int64_t H, Body body) {
  const int64_t threads = omp_get_max_threads();
  int64_t per_row = 1;
  while (per_row < H && B * per_row % threads && B * per_row < 4 * threads) ++per_row;
  const int64_t width = (H + per_row - 1) / per_row;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < B * per_row; ++i) {
    const int64_t first = i % per_row * width;
    if (first < H) body(i / per_row, first, H - first < width ? H - first : width);
  }
}

// Calls body(first float, load, store) for every vector of n floats; the last may be partial.
template <class Body>
static inline void vectors(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + W <= n; c += W) body(c, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  const int rest = int(n - c);
  if (rest) body(c, [=](const float* p) { return load_some(p, rest); }, [=](float* p, vf v) { store_some(p, v, rest); });
}

// scores, keep, share [B, N, H]; v, o [B, N, H, V]; log0, log_last [B, H]; mean0 [B, H, V].
extern "C" void aaren_forward(const float* scores, const float* v, const float* log0, const float* mean0, float* o, float* keep, float* share,
                              float* log_last, int64_t B, int64_t N, int64_t H, int64_t V, int64_t reverse) {
  const vf never = splat(-__builtin_inff());
  runs(B, H, [&](int64_t batch, int64_t first, int64_t heads) {
    std::vector<float> largest(heads), sum(heads);
    for (int64_t h = 0; h < heads; ++h) {
      const float L = log0[batch * H + first + h];
      largest[h] = L;
      sum[h] = L == -__builtin_inff() ? 0.0f : 1.0f;
    }
    const float* before = mean0 + (batch * H + first) * V;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t row = (batch * N + (reverse ? N - 1 - i : i)) * H + first;
      vectors(heads, [&](int64_t c, auto get, auto put) {
        const vf s = get(scores + row + c), m = get(&largest[c]);
        const vf top = select(s > m, s, select(s == s, m, s));  // a score that is NaN stays
        const vf base = select(top == never, vf{}, top);        // no token yet: exp(-inf - 0) = 0
        const vf old = get(&sum[c]) * exp(m - base), now = exp(s - base), total = old + now;
        const vf divisor = select(total == 0.0f, splat(1.0f), total);
        put(keep + row + c, old / divisor);
        put(share + row + c, now / divisor);
        put(&largest[c], top);
        put(&sum[c], total);
      });
      float* out = o + row * V;
      for (int64_t h = 0; h < heads; ++h) {
        const vf k = splat(keep[row + h]), p = splat(share[row + h]);
        vectors(V, [&](int64_t c, auto get, auto put) { put(out + h * V + c, k * get(before + h * V + c) + p * get(v + (row + h) * V + c)); });
      }
      before = out;
    }
    for (int64_t h = 0; h < heads; ++h)
      log_last[batch * H + first + h] = sum[h] == 0.0f ? -__builtin_inff() : largest[h] + std::log(sum[h]);
  });
}

// lambda_t = do_t + keep_{t+1} lambda_{t+1} and rho_t = do_t.o_t + keep_{t+1} rho_{t+1}, from the last token, where rho starts with -dlog_last:
// dv_t = share_t lambda_t, ds_t = share_t (lambda_t.v_t - rho_t), and the state before the first token gets keep_1 lambda_1 and keep_1 (lambda_1.mean0 - rho_1).
extern "C" void aaren_backward(const float* v, const float* mean0, const float* o, const float* keep, const float* share, const float* d_o,
                               const float* dlog_last, float* ds, float* dv, float* dlog0, float* dmean0, int64_t B, int64_t N, int64_t H, int64_t V,
                               int64_t reverse) {
  runs(B, H, [&](int64_t batch, int64_t first, int64_t heads) {
    std::vector<float> lambda(heads * V, 0.0f), rho(heads);  // times keep of the token after
    for (int64_t h = 0; h < heads; ++h) rho[h] = -dlog_last[batch * H + first + h];
    for (int64_t i = N - 1; i >= 0; --i) {
      const int64_t row = (batch * N + (reverse ? N - 1 - i : i)) * H + first;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (row + h) * V;
        const vf p = splat(share[row + h]), k = splat(keep[row + h]);
        vf with_o{}, with_v{};
        vectors(V, [&](int64_t c, auto get, auto put) {
          const vf given = get(d_o + at + c), l = given + get(&lambda[h * V + c]);
          with_o += given * get(o + at + c);
          with_v += l * get(v + at + c);
          put(dv + at + c, p * l);
          put(&lambda[h * V + c], k * l);
        });
        const float r = rho[h] + sum(with_o);
        ds[row + h] = share[row + h] * (sum(with_v) - r);
        rho[h] = keep[row + h] * r;
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (batch * H + first + h) * V;
      vf with_mean{};
      vectors(V, [&](int64_t c, auto get, auto put) {
        const vf l = get(&lambda[h * V + c]);
        with_mean += l * get(mean0 + at + c);
        put(dmean0 + at + c, l);
      });
      dlog0[batch * H + first + h] = sum(with_mean) - rho[h];
    }
  });
}
