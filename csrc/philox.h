// The random stream of robustdm/ops/stream.py for C++ and CUDA: Philox4x32-10 with
//   key = (seed, step), counter = (index low, index high, stream, layout).
// Words and uniforms are equal to the Python reference bit for bit (compile without contraction of
// a * b + c); normals to a few ulp, the same on every CPU, since log and sincos are our own.
// All of it is branch-free and free of library calls, so that loops around it are vectorised.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ROBUSTDM_INLINE __host__ __device__ __forceinline__
#else
#define ROBUSTDM_INLINE inline
#endif

namespace {

enum Stream : uint32_t {
  STREAM_ELEMENT = 0,
  STREAM_SAMPLE = 1,
  STREAM_BATCH = 2,
  STREAM_FLIP = 5,
  STREAM_CORRUPT_CHOICE = 6,
  STREAM_CORRUPT_NOISE = 7,
  STREAM_DELTA = 12,
};

const uint32_t PHILOX_LAYOUT = 2;  // random.LAYOUT_VERSION
const uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
const uint32_t PHILOX_K0 = 0x9E3779B9u, PHILOX_K1 = 0xBB67AE85u;
const int PHILOX_ROUNDS = 10;

// Four words for one index.
ROBUSTDM_INLINE void philox(uint32_t seed, uint32_t step, uint64_t index, uint32_t stream,
                            uint32_t word[4]) {
  uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = stream, c3 = PHILOX_LAYOUT;
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = (uint64_t)c0 * PHILOX_M0, p1 = (uint64_t)c2 * PHILOX_M1;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ seed;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ step;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    seed += PHILOX_K0;
    step += PHILOX_K1;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// [0, 1) from the top 24 bits.
ROBUSTDM_INLINE float uniform(uint32_t word) { return (float)(int32_t)(word >> 8) * 0x1p-24f; }

// (-1, 1), symmetric and never zero, from the top 23 bits.
ROBUSTDM_INLINE float signed_uniform(uint32_t word) {
  return (float)((int32_t)(word >> 9 << 1) + (1 - (1 << 23))) * 0x1p-23f;
}

ROBUSTDM_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

ROBUSTDM_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Natural logarithm of a positive normal number, within 1 ulp; Cephes logf. Never above 0 for
// u <= 1, and exactly 0 at 1: x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2).
ROBUSTDM_INLINE float log_positive(float x) {
  const uint32_t SQRT_HALF = 0x3f3504f3u, ONE = 0x3f800000u;
  const uint32_t shifted = as_bits(x) + (ONE - SQRT_HALF);
  const float e = (float)((int32_t)(shifted >> 23) - 127);
  const float f = as_float((shifted & 0x007fffffu) + SQRT_HALF) - 1.0f;
  const float z = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z + e * -2.12194440e-4f - 0.5f * z;  // ln 2 = 0.693359375 - 2.12194440e-4
  return f + y + e * 0.693359375f;
}

// Sine and cosine of 0 <= a <= 7: pi/2 in three parts (exact products), then Cephes on
// [-pi/4, pi/4].
ROBUSTDM_INLINE void sincos_positive(float a, float* sine, float* cosine) {
  const int32_t quarter = (int32_t)(a * 0.636619772f + 0.5f);
  const float j = (float)quarter;
  const float r = a - j * 1.5703125f - j * 4.837512969970703125e-4f - j * 7.54978995489188216e-8f;
  const float z = r * r;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * r + r;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const uint32_t swap = (quarter & 1) ? 0xffffffffu : 0u;
  const uint32_t s_bits = as_bits(s), c_bits = as_bits(c), mixed = (s_bits ^ c_bits) & swap;
  const uint32_t sine_sign = (uint32_t)(quarter & 2) << 30;
  const uint32_t cosine_sign = (uint32_t)((quarter + 1) & 2) << 30;
  *sine = as_float((s_bits ^ mixed) ^ sine_sign);
  *cosine = as_float((c_bits ^ mixed) ^ cosine_sign);
}

// Both halves of Box-Muller, |z| < 6.8.
ROBUSTDM_INLINE void normal_pair(uint32_t word0, uint32_t word1, float* first, float* second) {
  float u = (float)word0 * 0x1p-32f;
  u = u < 0x1p-33f ? 0x1p-33f : u;
  const float angle = (float)word1 * 0x1p-32f * 6.283185307179586f;
  const float length = sqrtf(-2.0f * log_positive(u));
  float sine, cosine;
  sincos_positive(angle, &sine, &cosine);
  *first = length * cosine;
  *second = length * sine;
}

}  // namespace
