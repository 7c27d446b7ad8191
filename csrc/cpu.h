// What the CPU sources share: exported names, threads, and conversions of 16-bit floats.
//
// Every source is compiled once per instruction set and exports name_base, name_avx2, name_avx512,
// which give the same bits; native.py calls the widest that the processor has. Everything else has
// internal linkage, so that the linker cannot mix functions of different instruction sets.
#pragma once

#include "philox.h"  // as_float, as_bits

#define ROBUSTDM_ABI 4  // native.ABI

#ifndef ROBUSTDM_VARIANT
#define ROBUSTDM_VARIANT base
#endif
#define ROBUSTDM_JOIN_(name, variant) name##_##variant
#define ROBUSTDM_JOIN(name, variant) ROBUSTDM_JOIN_(name, variant)
#define EXPORT(name) \
  extern "C" __attribute__((visibility("default"))) int ROBUSTDM_JOIN(name, ROBUSTDM_VARIANT)

namespace {

enum Status { OK = 0, OUT_OF_MEMORY = 1 };
enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };

// GOMP_parallel of the OpenMP runtime that torch has loaded: it shares torch's threads. Linking a
// runtime of our own would start a second pool that competes with the first.
typedef void (*Runtime)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// body(first, last) for consecutive ranges that cover [0, count), in any order and on any thread:
// ranges are handed out as threads ask, because other programs may slow one of them down.
template <class Body>
void parallel_for(int64_t count, int threads, Runtime runtime, Body body) {
  struct Shared {
    Body* body;
    int64_t count, step, next;
  } shared = {&body, count, count / (8 * (int64_t)(threads > 1 ? threads : 1)) + 1, 0};
  if (threads <= 1 || !runtime) {
    body((int64_t)0, count);
    return;
  }
  runtime(
      [](void* data) {
        Shared& s = *(Shared*)data;
        for (;;) {
          const int64_t first = __atomic_fetch_add(&s.next, s.step, __ATOMIC_RELAXED);
          if (first >= s.count) return;
          const int64_t last = first + s.step;
          (*s.body)(first, last < s.count ? last : s.count);
        }
      },
      &shared, (unsigned)threads, 0);
}

inline float from_bf16(uint16_t h) { return as_float((uint32_t)h << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  // A mask instead of a choice: compilers turn choices into branches, and then vectorise nothing.
  const uint32_t nan = 0u - (uint32_t)((bits & 0x7fffffffu) > 0x7f800000u);
  return (uint16_t)(rounded | (nan & 0x7fc0u));
}

inline float from_f16(uint16_t h) {
  const uint32_t shifted = (uint32_t)(h & 0x7fff) << 13, exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + 0x38000000u;                      // exponent bias 15 -> 127
  const uint32_t special = shifted + 0x70000000u;                     // infinity and NaN
  const uint32_t tiny = as_bits(as_float(shifted + 0x38800000u) - 0x1p-14f);  // subnormal
  uint32_t bits = exponent == 0x0f800000u ? special : normal;
  bits = exponent == 0 ? tiny : bits;
  return as_float(bits | (uint32_t)(h & 0x8000) << 16);
}

// Round to nearest even; beyond 65504 infinity; NaN stays NaN.
inline uint16_t to_f16(float x) {
  const uint32_t sign = as_bits(x) & 0x80000000u, bits = as_bits(x) ^ sign;
  const uint32_t normal = (bits - 0x38000000u + 0x0fffu + (bits >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the hardware.
  const uint32_t tiny = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
  uint32_t half = bits < 0x38800000u ? tiny : normal;
  half = bits >= 0x477ff000u ? 0x7c00u : half;
  half = bits > 0x7f800000u ? 0x7e00u : half;
  return (uint16_t)(half | sign >> 16);
}

// Element types. Arithmetic is in float; values are rounded once, when they are stored.

template <int DTYPE>
struct Element;
template <>
struct Element<F32> {
  typedef float Type;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};
template <>
struct Element<BF16> {
  typedef uint16_t Type;
  static float get(uint16_t x) { return from_bf16(x); }
  static uint16_t put(float x) { return to_bf16(x); }
};
template <>
struct Element<F16> {
  typedef uint16_t Type;
  static float get(uint16_t x) { return from_f16(x); }
  static uint16_t put(float x) { return to_f16(x); }
};

// function<dtype>(arguments...)
#define FOR_DTYPE(dtype, function, ...)          \
  do {                                           \
    if ((dtype) == F32) function<F32>(__VA_ARGS__);        \
    else if ((dtype) == BF16) function<BF16>(__VA_ARGS__); \
    else function<F16>(__VA_ARGS__);                       \
  } while (0)

}  // namespace
