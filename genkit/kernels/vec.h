// Vectors of floats as wide as the instruction set has them, and the few functions every CPU kernel needs.
//
// Written with the compiler's vector extension instead of intrinsics: one source becomes SSE, AVX2, AVX-512 or NEON by the flags it is compiled with.
#pragma once
#include <cstdint>
#include <cstring>
#include <omp.h>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

static inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }

// The first n < W floats; the rest are zero, and are neither read nor written.
static inline vf load_some(const float* p, int n) { vf v{}; std::memcpy(&v, p, 4 * n); return v; }
static inline void store_some(float* p, vf v, int n) { std::memcpy(p, &v, 4 * n); }

static inline float sum(vf v) { float s = 0; for (int i = 0; i < W; ++i) s += v[i]; return s; }
static inline vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline vf max(vf a, vf b) { return select(a > b, a, b); }
static inline vf min(vf a, vf b) { return select(a < b, a, b); }

// 2^x to 1.5 ulp: x = n + f with |f| <= 1/2, 2^f by a polynomial of degree 6 (minimax on that interval), 2^n by the exponent's bits. Below -126 the
// result is 0 (no denormals), above 128 it is infinity; NaN stays NaN.
static inline vf exp2(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
  vf clamped = select(x > 127.99999f, splat(127.99999f), select(x < -126.0f, splat(-126.0f), x));
  vi n = (vi)(clamped + magic) - (vi)magic;
  vf f = clamped - __builtin_convertvector(n, vf);
  vf p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  vf scaled = (vf)((vi)p + (n << 23));
  scaled = select(x < -126.0f, vf{}, scaled);
  scaled = select(x >= 128.0f, splat(__builtin_inff()), scaled);
  return select(x == x, scaled, x);
}

constexpr float LOG2E = 1.44269504088896340736f;
static inline vf exp(vf x) { return exp2(x * LOG2E); }
static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
static inline vf silu(vf x) { return x * sigmoid(x); }
