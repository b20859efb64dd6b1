// One head of gated linear attention, float32: S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, and its gradients.
//
// Forward and backward are the same sweep over time with other roles. A sweep keeps a state S [R, C] and for every token does
//     S = a * S + y z^T,   out = S^T x           x, y [R], z, out [C]
// where the decay a belongs to the rows (a [R]) or to the columns (a [C]):
//     o    forward in time,   x = q,  y = k,  z = v    decay on rows
//     dq   forward in time,   x = do, y = v,  z = k    decay on columns (S transposed)
//     dv   backward in time,  x = k,  y = q,  z = do   decay on rows
//     dk   backward in time,  x = v,  y = do, z = q    decay on columns
// Backward in time the state reaches token t through the gate of token t + 1. No exponential is taken but exp(g) itself and nothing is divided:
// products of decays only shrink, so strong gates are as exact as weak ones.
//
// The state lies in the first cache. To be bound by arithmetic instead of by loading and storing it, T tokens go together:
//     out_i = sum_{j<=i} (x_i a_i .. a_{j+1} y_j) z_j + (x_i a_i .. a_1) S,   S = (a_T .. a_1) S + sum_j (a_T .. a_{j+1} y_j) z_j
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>
#include "vec.h"

namespace linear_attention {

constexpr int T = 4;                      // tokens that go together
constexpr int NV = W == 16 ? 4 : 2;       // vectors of a strip: T * NV accumulators fit the registers
constexpr int STRIP = NV * W;             // columns
constexpr int64_t CHECKPOINT = 64;        // tokens between the states that anchor the gradient of the gates

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Zeroed floats on a cache line: a vector that straddles two costs twice.
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<float*>(std::aligned_alloc(64, padded(4 * count + 64, 64)))) {
    std::memset(data_.get(), 0, padded(4 * count + 64, 64));
  }
  operator float*() const { return data_.get(); }

 private:
  struct Free { void operator()(float* p) const { std::free(p); } };
  std::unique_ptr<float, Free> data_;
};

// The rows of one head in the order of time: [N, H, width] has H * width floats from one token to the next, backwards when reversed.
template <class Float>
struct Rows {
  Float* first;
  int64_t step;
  Float* operator[](int64_t t) const { return first + t * step; }
};

template <class Float>
static Rows<Float> rows(Float* base, int64_t batch, int64_t head, int64_t N, int64_t H, int64_t width, bool reverse) {
  Float* first = base + (batch * N * H + head) * width;
  return {reverse ? first + (N - 1) * H * width : first, reverse ? -H * width : H * width};
}

static inline void copy_scaled(float* to, const float* from, int64_t n, float factor) {
  int64_t c = 0;
  for (; c + W <= n; c += W) store(to + c, load(from + c) * factor);
  if (c < n) store(to + c, load_some(from + c, n - c) * factor);
}
static inline void copy_out(float* to, const float* from, int64_t n) { std::memcpy(to, from, 4 * n); }

template <bool ON_ROWS>
class Sweep {
 public:
  // R and C as above; rows of x, y are padded to vectors, rows of z, out and the state to strips.
  Sweep(int64_t R, int64_t C)
      : R(R), C(C), R_(padded(R, W)), C_(padded(C, STRIP)), A_(ON_ROWS ? R_ : C_), x_(T * R_), y_(T * R_), z_(T * C_), a_(T * A_), out_(T * C_),
        xs_(T * R_), ys_(T * R_), zs_(T * C_), decay_(A_), state_(R * C_) {}

  float* x(int i) { return x_ + i * R_; }
  float* y(int i) { return y_ + i * R_; }
  float* z(int i) { return z_ + i * C_; }
  float* a(int i) { return a_ + i * A_; }
  float* out(int i) { return out_ + i * C_; }

  // The state in memory: strips of columns one after another, R rows of STRIP floats each.
  float* state() { return state_; }
  int64_t state_size() const { return R * C_; }

  // From and to a matrix whose element (r, c) lies at r * row + c * column; null = zero.
  void set(const float* h, int64_t row, int64_t column) {
    std::memset(state_, 0, 4 * R * C_);
    if (h) each([&](float* s, int64_t r, int64_t c, int64_t n) {
      if (column == 1) std::memcpy(s, h + r * row + c, 4 * n);
      else for (int64_t i = 0; i < n; ++i) s[i] = h[r * row + (c + i) * column];
    });
  }
  void get(float* h, int64_t row, int64_t column) {
    each([&](float* s, int64_t r, int64_t c, int64_t n) {
      if (column == 1) std::memcpy(h + r * row + c, s, 4 * n);
      else for (int64_t i = 0; i < n; ++i) h[r * row + (c + i) * column] = s[i];
    });
  }

  // `count` tokens, rows 0 .. count-1 of x, y, z, a in the order of the sweep -> the same rows of out, and the state behind them.
  template <int COUNT>
  void advance() {
    if constexpr (ON_ROWS) rows_advance<COUNT>();
    else columns_advance<COUNT>();
  }

 private:
  const int64_t R, C, R_, C_, A_;
  Scratch x_, y_, z_, a_, out_, xs_, ys_, zs_, decay_, state_;

  template <class Body>
  void each(Body body) {
    for (int64_t c = 0; c < C; c += STRIP)
      for (int64_t r = 0; r < R; ++r) body(state_ + c * R + r * STRIP, r, c, C - c < STRIP ? C - c : STRIP);
  }

  template <int COUNT>
  void rows_advance() {
    vf dots[COUNT][COUNT] = {};
    for (int64_t r = 0; r < R_; r += W) {
      vf a[COUNT], y[COUNT];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        a[i] = load(a_ + i * A_ + r);
        y[i] = load(y_ + i * R_ + r);
        vf w = load(x_ + i * R_ + r);
#pragma GCC unroll 8
        for (int j = i; j >= 0; --j) {
          dots[i][j] += w * y[j];
          w *= a[j];
        }
        store(xs_ + i * R_ + r, w);
      }
      vf w = splat(1.0f);
#pragma GCC unroll 8
      for (int j = COUNT - 1; j >= 0; --j) {
        store(ys_ + j * R_ + r, y[j] * w);
        w *= a[j];
      }
      store(decay_ + r, w);
    }
    float dot[COUNT][COUNT];
    sums<COUNT>(dot, dots);
    for (int64_t c = 0; c < C_; c += STRIP) {
      float* S = state_ + c * R;
      vf z[COUNT][NV], out[COUNT][NV] = {};
#pragma GCC unroll 8
      for (int j = 0; j < COUNT; ++j)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) z[j][n] = load(z_ + j * C_ + c + n * W);
      contract<COUNT>(out, xs_, S);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j <= i; ++j)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) out[i][n] += dot[i][j] * z[j][n];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) store(out_ + i * C_ + c + n * W, out[i][n]);
      }
      for (int64_t r = 0; r < R; ++r) {
        const vf decay = splat(decay_[r]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
          vf s = decay * load(S + r * STRIP + n * W);
#pragma GCC unroll 8
          for (int j = 0; j < COUNT; ++j) s += ys_[j * R_ + r] * z[j][n];
          store(S + r * STRIP + n * W, s);
        }
      }
    }
  }

  template <int COUNT>
  void columns_advance() {
    vf dots[COUNT][COUNT] = {};
    for (int64_t r = 0; r < R_; r += W) {
      vf y[COUNT];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        y[i] = load(y_ + i * R_ + r);
        const vf x = load(x_ + i * R_ + r);
#pragma GCC unroll 8
        for (int j = 0; j <= i; ++j) dots[i][j] += x * y[j];
      }
    }
    float dot[COUNT][COUNT];
    sums<COUNT>(dot, dots);
    for (int64_t c = 0; c < C_; c += STRIP) {
      float* S = state_ + c * R;
      vf out[COUNT][NV] = {};
      contract<COUNT>(out, x_, S);
      vf z[COUNT][NV], decay[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        vf a[COUNT];
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j) {
          a[j] = load(a_ + j * A_ + c + n * W);
          z[j][n] = load(z_ + j * C_ + c + n * W);
        }
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j <= i; ++j) out[i][n] = a[j] * out[i][n] + dot[i][j] * z[j][n];
          store(out_ + i * C_ + c + n * W, out[i][n]);
        }
        vf w = splat(1.0f);
#pragma GCC unroll 8
        for (int j = COUNT - 1; j >= 0; --j) {
          z[j][n] *= w;
          w *= a[j];
        }
        decay[n] = w;
      }
      for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
          vf s = decay[n] * load(S + r * STRIP + n * W);
#pragma GCC unroll 8
          for (int j = 0; j < COUNT; ++j) s += y_[j * R_ + r] * z[j][n];
          store(S + r * STRIP + n * W, s);
        }
      }
    }
  }

  template <int COUNT>
  static void sums(float (&to)[COUNT][COUNT], const vf (&of)[COUNT][COUNT]) {
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
      for (int j = 0; j <= i; ++j) to[i][j] = sum(of[i][j]);
  }

  // out_i += x_i S, one strip.
  template <int COUNT>
  void contract(vf (&out)[COUNT][NV], const float* x, const float* S) {
    for (int64_t r = 0; r < R; ++r) {
      vf s[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) s[n] = load(S + r * STRIP + n * W);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        const vf b = splat(x[i * R_ + r]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) out[i][n] += b * s[n];
      }
    }
  }
};

// Calls load(i, t) for the tokens that go together, then advance, then done(i, t); T at a time from the start of the sequence, the rest singly.
template <class S, class Load, class Done>
static void forward_in_time(S& sweep, int64_t N, Load load, Done done) {
  int64_t t = 0;
  for (; t + T <= N; t += T) {
    for (int i = 0; i < T; ++i) load(i, t + i);
    sweep.template advance<T>();
    for (int i = 0; i < T; ++i) done(i, t + i);
  }
  for (; t < N; ++t) {
    load(0, t);
    sweep.template advance<1>();
    done(0, t);
  }
}
template <class S, class Load, class Done>
static void backward_in_time(S& sweep, int64_t N, Load load, Done done) {
  int64_t t = N - 1;
  for (; (t + 1) % T; --t) {
    load(0, t);
    sweep.template advance<1>();
    done(0, t);
  }
  for (; t >= 0; t -= T) {
    for (int i = 0; i < T; ++i) load(i, t - i);
    sweep.template advance<T>();
    for (int i = 0; i < T; ++i) done(i, t - i);
  }
}

// One head: rows in the order of time, and `gate(t, to, first, count)`, which writes exp(g_t) of some key channels.
template <class Gate>
struct Head {
  int64_t N, K, V;
  float scale;
  Rows<const float> q, k, v;
  Gate gate;
};

// o and the last state, columns [first, first + count) of V. h0 may be null.
template <class Gate>
static void forward(const Head<Gate>& head, const float* h0, Rows<float> o, float* last, int64_t first, int64_t count) {
  const int64_t K = head.K, V = head.V;
  Sweep<true> sweep(K, count);
  sweep.set(h0 ? h0 + first : nullptr, V, 1);
  forward_in_time(
      sweep, head.N,
      [&](int i, int64_t t) {
        copy_scaled(sweep.x(i), head.q[t], K, head.scale);
        copy_scaled(sweep.y(i), head.k[t], K, 1.0f);
        copy_scaled(sweep.z(i), head.v[t] + first, count, 1.0f);
        head.gate(t, sweep.a(i), 0, K);
      },
      [&](int i, int64_t t) { copy_out(o[t] + first, sweep.out(i), count); });
  sweep.get(last + first, V, 1);
}

// dv and the gradient of the initial state, columns [first, first + count) of V.
template <class Gate>
static void backward_values(const Head<Gate>& head, Rows<const float> dout, const float* dlast, Rows<float> dv, float* dh0, int64_t first, int64_t count) {
  const int64_t N = head.N, K = head.K, V = head.V;
  Sweep<true> sweep(K, count);
  sweep.set(dlast ? dlast + first : nullptr, V, 1);
  backward_in_time(
      sweep, N,
      [&](int i, int64_t t) {
        copy_scaled(sweep.x(i), head.k[t], K, 1.0f);
        copy_scaled(sweep.y(i), head.q[t], K, head.scale);
        copy_scaled(sweep.z(i), dout[t] + first, count, 1.0f);
        if (t + 1 < N) head.gate(t + 1, sweep.a(i), 0, K);
        else for (int64_t c = 0; c < K; ++c) sweep.a(i)[c] = 1.0f;  // the gradient of the last state arrives as it is
      },
      [&](int i, int64_t t) { copy_out(dv[t] + first, sweep.out(i), count); });
  sweep.get(dh0 + first, V, 1);
  head.gate(0, sweep.a(0), 0, K);
  for (int64_t r = 0; r < K; ++r)
    for (int64_t c = first; c < first + count; ++c) dh0[r * V + c] *= sweep.a(0)[r];
}

// dq, dk and the gradient of the log decays, channels [first, first + count) of K; `dgate(t, row)` receives the latter.
//
// dg_t = <a_t S_{t-1}, D_t> per channel, D the state of the sweep backward in time. Both states never meet; but from one token to the next the product changes
// by q_t dq_t - k_t dk_t, and every CHECKPOINT tokens it is taken anew from a state kept by the first sweep, so that rounding does not add up.
template <class Gate, class DGate>
static void backward_keys(const Head<Gate>& head, const float* h0, Rows<const float> dout, const float* dlast, Rows<float> dq, Rows<float> dk, DGate dgate,
                          int64_t first, int64_t count) {
  const int64_t N = head.N, V = head.V;
  Sweep<false> sweep(V, count);
  const int64_t size = sweep.state_size(), wide = padded(count, STRIP);
  Scratch kept((N + CHECKPOINT - 1) / CHECKPOINT * size), total(wide), here(wide);
  sweep.set(h0 ? h0 + first * V : nullptr, 1, V);
  forward_in_time(
      sweep, N,
      [&](int i, int64_t t) {
        if (t % CHECKPOINT == 0) std::memcpy(kept + t / CHECKPOINT * size, sweep.state(), 4 * size);
        copy_scaled(sweep.x(i), dout[t], V, head.scale);
        copy_scaled(sweep.y(i), head.v[t], V, 1.0f);
        copy_scaled(sweep.z(i), head.k[t] + first, count, 1.0f);
        head.gate(t, sweep.a(i), first, count);
      },
      [&](int i, int64_t t) { copy_out(dq[t] + first, sweep.out(i), count); });
  // total[c] = sum_v S[v, c] D[v, c] of two states in the sweep's order
  auto product = [&](const float* S) {
    std::memset(total, 0, 4 * wide);
    for (int64_t c = 0; c < wide; c += STRIP)
      for (int64_t r = 0; r < V; ++r)
        for (int64_t i = 0; i < STRIP; ++i) total[c + i] += S[c * V + r * STRIP + i] * sweep.state()[c * V + r * STRIP + i];
  };
  {
    Scratch final_state(size);
    std::memcpy(final_state, sweep.state(), 4 * size);
    sweep.set(dlast ? dlast + first * V : nullptr, 1, V);
    product(final_state);
  }
  backward_in_time(
      sweep, N,
      [&](int i, int64_t t) {
        copy_scaled(sweep.x(i), head.v[t], V, 1.0f);
        copy_scaled(sweep.y(i), dout[t], V, head.scale);
        copy_scaled(sweep.z(i), head.q[t] + first, count, 1.0f);
        if (t + 1 < N) head.gate(t + 1, sweep.a(i), first, count);
        else for (int64_t c = 0; c < count; ++c) sweep.a(i)[c] = 1.0f;
      },
      [&](int i, int64_t t) {
        copy_out(dk[t] + first, sweep.out(i), count);
        if (t % CHECKPOINT == 0) {
          product(kept + t / CHECKPOINT * size);
          head.gate(t, here, first, count);
          for (int64_t c = 0; c < count; ++c) total[c] *= here[c];
        } else {
          const float *q = head.q[t] + first, *k = head.k[t] + first, *dqt = dq[t] + first, *dkt = sweep.out(i);
          for (int64_t c = 0; c < count; ++c) total[c] += q[c] * dqt[c] - k[c] * dkt[c];
        }
        dgate(t, static_cast<const float*>(total), first, count);
      });
}

// In how many parts of columns a head is cut so that every thread has work: strips are independent, what they share is computed in each part.
static inline int64_t parts(int64_t heads, int64_t columns) {
  const int64_t strips = padded(columns, STRIP) / STRIP, threads = omp_get_max_threads();
  const int64_t wanted = heads >= threads ? 1 : (threads + heads - 1) / heads;
  return wanted < strips ? wanted : strips;
}

// Calls body(head, part, first column, number of columns) for all parts of all heads in parallel.
template <class Body>
static void each_part(int64_t heads, int64_t columns, int64_t parts, Body body) {
  const int64_t width = padded((columns + parts - 1) / parts, STRIP);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < heads * parts; ++i) {
    const int64_t first = i % parts * width, left = columns - first;
    if (left > 0) body(i / parts, i % parts, first, left < width ? left : width);
  }
}

}  // namespace linear_attention
