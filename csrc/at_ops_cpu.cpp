// The elementwise ops of adversarial training on the CPU: see robustdm/ops/reference.py for what each
// computes, and native.py for the calls. Every op regenerates the step's noise instead of reading
// it, block by block: a block's random numbers stay in the first-level cache.
//
// A tensor is (batch, channels, spatial). Random numbers are counted in channels-last order,
// position * channels + channel. Where memory has that order too, native.py passes channels = 1 and
// spatial = all elements of a sample, so "planar" below is channels > 1: contiguous memory, offset
// channel * spatial + position. Arithmetic is in float32, in the order of memory.

#include "cpu.h"
#include "philox_lanes.h"

#include <stdlib.h>

namespace {

// ---- Shapes and blocks.

const int BLOCK = 384;  // elements
static_assert(BLOCK / 4 % (CHAINS * LANES) == 0, "the last vectors would write past a block");

struct Shape {
  int64_t batch, channels, spatial;
  int64_t numel, calls;      // of a sample: elements; Philox calls, each for four elements
  int64_t positions, pieces;  // positions in a block; blocks of a sample
  int64_t group, blocks;     // samples in a block, if they are small; blocks of the batch

  Shape(int64_t b, int64_t c, int64_t s, int64_t unit = 1)
      : batch(b), channels(c), spatial(s), numel(c * s), calls((c * s + 3) / 4) {
    // A block starts at a multiple of four elements. unit: keep so many together.
    positions = BLOCK / (4 * c * unit) * 4 * unit;
    pieces = 1, group = 1;
    if (4 * calls <= BLOCK / 2) {
      group = BLOCK / (4 * calls);
      blocks = (b + group - 1) / group;
    } else {
      pieces = (s + positions - 1) / positions;
      blocks = b * pieces;
    }
  }
};

struct Block {
  int64_t sample, start;  // first sample; first position in it
  int samples, length, n;  // samples; positions in each; elements in all

  Block(const Shape& shape, int64_t i) {
    if (shape.pieces > 1) {
      sample = i / shape.pieces, samples = 1;
      start = i % shape.pieces * shape.positions;
      const int64_t left = shape.spatial - start;
      length = (int)(left < shape.positions ? left : shape.positions);
    } else {
      sample = i * shape.group, start = 0;
      const int64_t left = shape.batch - sample;
      samples = (int)(left < shape.group ? left : shape.group);
      length = (int)shape.spatial;
    }
    n = samples * length * (int)shape.channels;
  }
};

// run(sample, offset in memory, position in the block's array, length) for every contiguous stretch
// of a block.
template <class Run>
inline void for_runs(const Shape& shape, const Block& block, Run run) {
  const bool whole = block.length == shape.spatial;  // samples: their channels follow each other
  const int runs = whole ? 1 : (int)shape.channels, n = block.n / (block.samples * runs);
  for (int b = 0; b < block.samples; ++b)
    for (int c = 0; c < runs; ++c)
      run(block.sample + b, (block.sample + b) * shape.numel + c * shape.spatial + block.start,
          (b * runs + c) * n, n);
}

// What storing values in a dtype and loading them again makes of them.
template <int D>
void round_each(float* values, int n) {
  for (int i = 0; i < n; ++i) values[i] = Element<D>::get(Element<D>::put(values[i]));
}

// n elements as floats: where they are, or converted into the buffer.
const float* load(const void* data, int dtype, int64_t offset, int n, float* buffer) {
  const uint16_t* halves = (const uint16_t*)data + offset;
  if (dtype == F32) return (const float*)data + offset;
  if (dtype == BF16)
    for (int i = 0; i < n; ++i) buffer[i] = from_bf16(halves[i]);
  else
    for (int i = 0; i < n; ++i) buffer[i] = from_f16(halves[i]);
  return buffer;
}

// ---- The noise of a training step.

template <int C>
inline void transpose(const float* in, float* out, int length, int channels) {
  const int count = C ? C : channels;
  for (int i = 0; i < length; ++i)
    for (int c = 0; c < count; ++c) out[c * length + i] = in[i * count + c];
}

// From channels-last order, four numbers per call, to the order of memory without gaps.
const float* arrange(const float* in, const Shape& shape, const Block& block, float* out) {
  const int channels = (int)shape.channels, each = block.length * channels;
  if (channels == 1 && (block.samples == 1 || each % 4 == 0)) return in;
  for (int b = 0; b < block.samples; ++b) {
    const float* from = in + b * 4 * shape.calls;
    float* to = out + b * each;
    switch (channels) {
      case 1: transpose<1>(from, to, block.length, 1); break;
      case 2: transpose<2>(from, to, block.length, 2); break;
      case 3: transpose<3>(from, to, block.length, 3); break;
      case 4: transpose<4>(from, to, block.length, 4); break;
      default: transpose<0>(from, to, block.length, channels);
    }
  }
  return out;
}

struct StepNoise {
  Philox normals, uniforms;
  int64_t first;

  explicit StepNoise(const int64_t* key)
      : normals((uint64_t)key[0], (uint64_t)key[1], STREAM_ELEMENT),
        uniforms((uint64_t)key[0], (uint64_t)key[1], STREAM_DELTA),
        first(key[2]) {}
};

struct Scratch {
  alignas(64) float eps[BLOCK], unit[BLOCK];
  alignas(64) float moved_eps[BLOCK], moved_unit[BLOCK];
  alignas(64) uint32_t even[BLOCK / 2], odd[BLOCK / 2];  // words 0 and 2, words 1 and 3 of calls
  alignas(64) uint32_t word[BLOCK];                      // all four words of calls
};

// The lower halves of two vectors, alternating.
inline Lanes weave(Lanes a, Lanes b) { return (a & 0xffffffffu) | b << 32; }

// store(place of its first call, words) for every vector of `calls` calls from `start` on.
template <class Store>
inline void for_calls(const Philox& philox, int64_t start, int calls, Store store) {
  Lanes index[CHAINS];
  for (int j = 0; j < CHAINS; ++j)
    for (int i = 0; i < LANES; ++i) index[j][i] = (uint64_t)(start + j * LANES + i);
  for (int k = 0; k < calls; k += CHAINS * LANES) {
    Lanes word[4][CHAINS];
    philox(index, word);
    for (int j = 0; j < CHAINS; ++j) {
      index[j] += (uint64_t)(CHAINS * LANES);
      store(k + j * LANES, word[0][j], word[1][j], word[2][j], word[3][j]);
    }
  }
}

// Pairs of 64-bit lanes, alternating: a0 b0 a1 b1 ...
inline void store_alternating(Lanes a, Lanes b, uint32_t* out) {
#if defined(__AVX512F__)
  const Lanes low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  const Lanes high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
  const Lanes low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Lanes high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  const Lanes low = __builtin_shufflevector(a, b, 0, 2), high = __builtin_shufflevector(a, b, 1, 3);
#endif
  memcpy(out, &low, sizeof low);
  memcpy(out + 2 * LANES, &high, sizeof high);
}

// eps and the uniform in (-1, 1) of a block's elements, as asked for, in the order of memory.
template <bool NORMALS, bool UNIFORMS>
void step_noise(const StepNoise& noise, const Shape& shape, const Block& block, Scratch& s,
                const float** eps, const float** unit) {
  const int64_t start = (noise.first + block.sample) * shape.calls
                        + block.start * shape.channels / 4;
  const int calls = block.samples > 1 ? block.samples * (int)shape.calls : (block.n + 3) / 4;
  if (NORMALS) {
    for_calls(noise.normals, start, calls, [&](int at, Lanes w0, Lanes w1, Lanes w2, Lanes w3) {
      const Lanes even = weave(w0, w2), odd = weave(w1, w3);
      memcpy(s.even + 2 * at, &even, sizeof even);
      memcpy(s.odd + 2 * at, &odd, sizeof odd);
    });
    for (int k = 0; k < 2 * calls; ++k)
      normal_pair(s.even[k], s.odd[k], &s.eps[2 * k], &s.eps[2 * k + 1]);
    *eps = arrange(s.eps, shape, block, s.moved_eps);
  }
  if (UNIFORMS) {
    for_calls(noise.uniforms, start, calls, [&](int at, Lanes w0, Lanes w1, Lanes w2, Lanes w3) {
      store_alternating(weave(w0, w1), weave(w2, w3), s.word + 4 * at);
    });
    for (int i = 0; i < 4 * calls; ++i) s.unit[i] = signed_uniform(s.word[i]);
    *unit = arrange(s.unit, shape, block, s.moved_unit);
  }
}

// The arithmetic of every op is a function of its own: only of arguments can one promise that they
// do not overlap.
template <int D, class T = typename Element<D>::Type>
void diffuse_run(int n, const float* __restrict x, const float* __restrict eps,
                 const float* __restrict unit, float signal, float noise, float radius,
                 T* __restrict xt, T* __restrict x_ran) {
  for (int k = 0; k < n; ++k) {
    const T stored = Element<D>::put(signal * x[k] + noise * eps[k]);
    const float delta = Element<D>::get(Element<D>::put(radius * unit[k]));
    xt[k] = stored;
    x_ran[k] = Element<D>::put(Element<D>::get(stored) + noise * delta);
  }
}

// x_t and x_ran from x0, in dtype D; clean(sample, offset, n) reads x0.
template <int D, class Clean>
void diffuse(const StepNoise& step, const Shape& shape, int64_t first, int64_t last,
             const float* signal, const float* noise, const float* radius, void* xt, void* x_ran,
             Clean clean) {
  typedef typename Element<D>::Type T;
  Scratch scratch;
  for (int64_t i = first; i < last; ++i) {
    const Block block(shape, i);
    const float *all_eps, *all_unit;
    step_noise<true, true>(step, shape, block, scratch, &all_eps, &all_unit);
    for_runs(shape, block, [&](int64_t sample, int64_t offset, int at, int n) {
      diffuse_run<D>(n, clean(sample, offset, n), all_eps + at, all_unit + at, signal[sample],
                     noise[sample], radius[sample], (T*)xt + offset, (T*)x_ran + offset);
    });
  }
}

// ---- The projection.

// gradient may be null: outwards, along the start.
template <int D, class T = typename Element<D>::Type>
void project_run(int n, const T* __restrict xt, const float* __restrict gradient,
                 const float* __restrict unit, float noise, float radius, T* __restrict x_adv,
                 T* __restrict delta) {
  const float step = radius * 0.5773502691896258f;
  for (int k = 0; k < n; ++k) {
    const float start = Element<D>::get(Element<D>::put(radius * unit[k]));
    const float g = gradient ? gradient[k] : start;
    float sign = g > 0 ? 1.0f : 0.0f;
    sign = g < 0 ? -1.0f : sign;
    sign = g != g ? g : sign;
    float moved = start + step * sign;
    moved = moved < -radius ? -radius : moved;  // NaN passes both comparisons
    moved = moved > radius ? radius : moved;
    const T stored = Element<D>::put(moved);
    delta[k] = stored;
    x_adv[k] = Element<D>::put(Element<D>::get(xt[k]) + noise * Element<D>::get(stored));
  }
}

template <int D>
void project(const StepNoise& step, const Shape& shape, int64_t first, int64_t last,
             const void* xt, const void* gradient, int gradient_dtype, const float* noise,
             const float* radius, void* x_adv, void* delta) {
  typedef typename Element<D>::Type T;
  Scratch scratch;
  float buffer[BLOCK];
  for (int64_t i = first; i < last; ++i) {
    const Block block(shape, i);
    const float* all_unit;
    step_noise<false, true>(step, shape, block, scratch, nullptr, &all_unit);
    for_runs(shape, block, [&](int64_t sample, int64_t offset, int at, int n) {
      const float* g = gradient ? load(gradient, gradient_dtype, offset, n, buffer) : nullptr;
      project_run<D>(n, (const T*)xt + offset, g, all_unit + at, noise[sample], radius[sample],
                     (T*)x_adv + offset, (T*)delta + offset);
    });
  }
}

// ---- The loss.

// Sum in a fixed order, the same for every instruction set: 32 running sums, eight sums of four of
// them, and so on; what is left over one by one.
double sum(const float* x, int n) {
  typedef float Floats __attribute__((vector_size(sizeof(Lanes))));
  const int WIDTH = sizeof(Floats) / 4, PARTS = 32 / WIDTH;
  double total = 0;
  int i = 0;
  if (n >= 32) {
    Floats part[PARTS] = {};
    for (; i + 32 <= n; i += 32) {
      for (int j = 0; j < PARTS; ++j) {
        Floats next;
        memcpy(&next, x + i + j * WIDTH, sizeof next);
        part[j] += next;
      }
    }
    float r[32];
    memcpy(r, part, sizeof r);
    double eight[8];
    for (int j = 0; j < 8; ++j)
      eight[j] = ((double)r[j] + r[j + 8]) + ((double)r[j + 16] + r[j + 24]);
    total = ((eight[0] + eight[1]) + (eight[2] + eight[3])) +
            ((eight[4] + eight[5]) + (eight[6] + eight[7]));
  }
  for (; i < n; ++i) total += x[i];
  return total;
}

struct Loss {
  const void *pred, *adv, *delta;  // (B, C, S); adv, delta: or null
  int dtype, delta_dtype;          // of the predictions; of delta, also where it is regenerated
  void *grad, *grad_adv;
  const float *radius, *lambda_t;
  bool invariance, detach_clean;
  float scale;   // 2 / (B C S)
  double* sums;  // (B, pieces, 2): first stage of the sums of error^2 and residual^2
};

template <int G, class T = typename Element<G>::Type>
void fit_run(int n, const float* __restrict o, const float* __restrict eps, float scale,
             float* __restrict error2, T* __restrict grad) {
  for (int k = 0; k < n; ++k) {
    const float error = o[k] - eps[k];
    error2[k] = error * error;
    grad[k] = Element<G>::put(scale * error);
  }
}

template <int G, bool DETACHED, class T = typename Element<G>::Type>
void loss_run(int n, const float* __restrict o, const float* __restrict a,
              const float* __restrict d, const float* __restrict eps, float lambda, float scale,
              float* __restrict error2, float* __restrict residual2, T* __restrict grad,
              T* __restrict grad_adv) {
  for (int k = 0; k < n; ++k) {
    const float error = o[k] - eps[k], residual = a[k] - o[k] - d[k];
    const float pull = lambda * residual;
    error2[k] = error * error;
    residual2[k] = residual * residual;
    grad[k] = Element<G>::put(scale * (DETACHED ? error : error - pull));
    grad_adv[k] = Element<G>::put(scale * pull);
  }
}

// G: dtype of the gradients.
template <int G>
void loss_and_gradients(const StepNoise& step, const Shape& shape, int64_t first, int64_t last,
                        const Loss& l) {
  typedef typename Element<G>::Type T;
  const bool regenerate = l.adv && !l.delta && !l.invariance;
  Scratch scratch;
  float o_buffer[BLOCK], a_buffer[BLOCK], d_buffer[BLOCK], error2[BLOCK], residual2[BLOCK] = {};
  const float zeros[BLOCK] = {};
  for (int64_t i = first; i < last; ++i) {
    const Block block(shape, i);
    const float *all_eps, *all_unit = nullptr;
    if (regenerate)
      step_noise<true, true>(step, shape, block, scratch, &all_eps, &all_unit);
    else
      step_noise<true, false>(step, shape, block, scratch, &all_eps, nullptr);
    for_runs(shape, block, [&](int64_t sample, int64_t offset, int at, int n) {
      const float* o = load(l.pred, l.dtype, offset, n, o_buffer);
      T* grad = (T*)l.grad + offset;
      if (!l.adv) {
        fit_run<G>(n, o, all_eps + at, l.scale, error2 + at, grad);
        return;
      }
      const float *a = load(l.adv, l.dtype, offset, n, a_buffer), *d = zeros;
      if (regenerate) {
        for (int k = 0; k < n; ++k) d_buffer[k] = l.radius[sample] * all_unit[at + k];
        FOR_DTYPE(l.delta_dtype, round_each, d_buffer, n);
        d = d_buffer;
      } else if (!l.invariance) {
        d = load(l.delta, l.delta_dtype, offset, n, d_buffer);
      }
      (l.detach_clean ? loss_run<G, true> : loss_run<G, false>)(
          n, o, a, d, all_eps + at, l.lambda_t[sample], l.scale, error2 + at, residual2 + at, grad,
          (T*)l.grad_adv + offset);
    });
    const int each = block.n / block.samples;
    for (int b = 0; b < block.samples; ++b) {
      double* to = l.sums + 2 * (shape.group > 1 ? block.sample + b : i);
      to[0] = sum(error2 + b * each, each);
      to[1] = sum(residual2 + b * each, each);
    }
  }
}

}  // namespace

EXPORT(noise_perturb)
(const void* x0, int x0_dtype, void* xt, void* x_ran, int dtype, int64_t batch, int64_t channels,
 int64_t spatial, const float* signal, const float* noise, const float* radius, const int64_t* key,
 int threads, Runtime runtime) {
  const Shape shape(batch, channels, spatial);
  const StepNoise step(key);
  parallel_for(shape.blocks, threads, runtime, [&](int64_t first, int64_t last) {
    float buffer[BLOCK];
    auto clean = [&](int64_t, int64_t offset, int n) {
      return load(x0, x0_dtype, offset, n, buffer);
    };
    FOR_DTYPE(dtype, diffuse, step, shape, first, last, signal, noise, radius, xt, x_ran, clean);
  });
  return OK;
}

EXPORT(fgsm_project)
(const void* xt, int dtype, const void* gradient, int gradient_dtype, void* x_adv, void* delta,
 int64_t batch, int64_t channels, int64_t spatial, const float* noise, const float* radius,
 const int64_t* key, int threads, Runtime runtime) {
  const Shape shape(batch, channels, spatial);
  const StepNoise step(key);
  parallel_for(shape.blocks, threads, runtime, [&](int64_t first, int64_t last) {
    FOR_DTYPE(dtype, project, step, shape, first, last, xt, gradient, gradient_dtype, noise,
              radius, x_adv, delta);
  });
  return OK;
}

// fit and reg: (B,); total: one value. adv may be null (plain DDPM), delta too (the random start).
EXPORT(equivariance_loss)
(const void* pred, const void* adv, int dtype, const void* delta, int delta_dtype, void* grad,
 void* grad_adv, int grad_dtype, float* total, float* fit, float* reg, int64_t batch,
 int64_t channels, int64_t spatial, const float* radius, const float* lambda_t,
 const int64_t* key, int invariance, int detach_clean, int threads, Runtime runtime) {
  const Shape shape(batch, channels, spatial);
  const StepNoise step(key);
  double* sums = (double*)malloc(sizeof(double) * 2 * (size_t)(batch * shape.pieces));
  if (!sums) return OUT_OF_MEMORY;
  const Loss l = {pred, adv, delta, dtype, delta_dtype, grad, grad_adv, radius, lambda_t,
                  invariance != 0, detach_clean != 0,
                  (float)(2.0 / ((double)batch * (double)shape.numel)), sums};
  parallel_for(shape.blocks, threads, runtime, [&](int64_t first, int64_t last) {
    FOR_DTYPE(grad_dtype, loss_and_gradients, step, shape, first, last, l);
  });
  double all = 0;
  for (int64_t b = 0; b < batch; ++b) {
    double error2 = 0, residual2 = 0;
    for (int64_t i = b * shape.pieces; i < (b + 1) * shape.pieces; ++i) {
      error2 += sums[2 * i];
      residual2 += sums[2 * i + 1];
    }
    const double f = error2 / (double)shape.numel;
    const double r = adv ? (double)lambda_t[b] * (residual2 / (double)shape.numel) : 0.0;
    fit[b] = (float)f;
    reg[b] = (float)r;
    all += f + r;
  }
  *total = (float)(all / (double)batch);
  free(sums);
  return OK;
}

EXPORT(abi)() { return ROBUSTDM_ABI; }

// What this processor can run: 0 base, 1 avx2, 2 avx512.
EXPORT(level)() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return 1;
#endif
  return 0;
}
