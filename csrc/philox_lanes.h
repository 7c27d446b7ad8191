// Philox on vectors. A 64-bit lane carries one 32-bit word in its lower half; the upper half is
// ignored, which is just what the widening multiply of x86 does.
#pragma once

#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply(Lanes a, Lanes b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
const int LANES = sizeof(Lanes) / 8;
typedef uint32_t Words __attribute__((vector_size(sizeof(Lanes) / 2)));

inline Lanes broadcast(uint64_t value) { return value - Lanes{}; }

struct Philox {
  Lanes k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS], stream;  // the key of every round

  Philox(uint64_t seed, uint64_t step, Stream which) : stream(broadcast(which)) {
    for (int i = 0; i < PHILOX_ROUNDS; ++i) {
      k0[i] = broadcast((uint32_t)seed + (uint32_t)i * PHILOX_K0);
      k1[i] = broadcast((uint32_t)step + (uint32_t)i * PHILOX_K1);
    }
  }

  // The words of N vectors of indices, side by side: each waits for its own multiplications.
  template <int N>
  inline void operator()(const Lanes (&index)[N], Lanes (&word)[4][N]) const {
    const Lanes m0 = broadcast(PHILOX_M0), m1 = broadcast(PHILOX_M1);
    Lanes c0[N], c1[N], c2[N], c3[N];
    for (int j = 0; j < N; ++j) {
      c0[j] = index[j], c1[j] = index[j] >> 32, c2[j] = stream, c3[j] = broadcast(PHILOX_LAYOUT);
    }
#pragma GCC unroll 10
    for (int i = 0; i < PHILOX_ROUNDS; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const Lanes p0 = multiply(c0[j], m0), p1 = multiply(c2[j], m1);
        c0[j] = (p1 >> 32) ^ c1[j] ^ k0[i];
        c2[j] = (p0 >> 32) ^ c3[j] ^ k1[i];
        c1[j] = p1;
        c3[j] = p0;
      }
    }
    for (int j = 0; j < N; ++j) {
      word[0][j] = c0[j], word[1][j] = c1[j], word[2][j] = c2[j], word[3][j] = c3[j];
    }
  }
};

const int CHAINS = 3;  // vectors side by side; measured: 1.15 to 1.3 times the speed of one

inline void store_words(Lanes lanes, uint32_t* out) {
  const Words words = __builtin_convertvector(lanes, Words);  // the lower halves
  memcpy(out, &words, sizeof words);
}

}  // namespace
