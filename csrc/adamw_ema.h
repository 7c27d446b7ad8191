// AdamW with a moving average of the weights: the formulas, for CPU and CUDA. See
// reference.adamw_ema; the bias corrections are computed without cancellation, 1 - b^k is
// -expm1(k log b), so they are right to float32 even where 1 - b^k is tiny.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define ADAMW_INLINE __host__ __device__ __forceinline__
#else
#define ADAMW_INLINE inline
#endif

namespace {

// The numbers of a run, passed by value.
struct AdamwOptions {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, tiny, weight_decay;
};

inline AdamwOptions adamw_options(double beta1, double beta2, double tiny, double weight_decay) {
  return {(float)beta1,        (float)beta2,        (float)(1 - beta1), (float)(1 - beta2),
          (float)log(beta1), (float)log(beta2), (float)tiny,        (float)weight_decay};
}

// The numbers of a step, each read from memory: on a GPU neither a graph nor a synchronisation
// has them baked in.
struct AdamwScalars {
  const float *lr, *step, *decay, *factor, *skip;
};

struct AdamwStep {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, tiny;
  float factor, shrink, step_size, correction2, weight;
  bool keep;
};

ADAMW_INLINE AdamwStep adamw_step(const AdamwOptions& o, const AdamwScalars& s) {
  const float lr = *s.lr, step = *s.step;
  AdamwStep now;
  now.beta1 = o.beta1, now.one_minus_beta1 = o.one_minus_beta1;
  now.beta2 = o.beta2, now.one_minus_beta2 = o.one_minus_beta2;
  now.tiny = o.tiny;
  now.factor = *s.factor;
  now.shrink = 1.0f - lr * o.weight_decay;
  now.step_size = lr / -expm1f(step * o.log_beta1);
  now.correction2 = -expm1f(step * o.log_beta2);
  now.weight = 1.0f - *s.decay;
  now.keep = *s.skip == 0.0f;
  return now;
}

ADAMW_INLINE void adamw_update(const AdamwStep& now, float grad, float& p, float& m, float& v) {
  const float g = grad * now.factor;
  m = now.beta1 * m + now.one_minus_beta1 * g;
  v = now.beta2 * v + now.one_minus_beta2 * g * g;
  p = p * now.shrink - now.step_size * m / (sqrtf(v / now.correction2) + now.tiny);
}

// As torch.lerp: exact at both ends.
ADAMW_INLINE float adamw_average(const AdamwStep& now, float average, float p) {
  const float difference = p - average;
  return now.weight < 0.5f ? average + now.weight * difference
                           : p - difference * (1.0f - now.weight);
}

}  // namespace
