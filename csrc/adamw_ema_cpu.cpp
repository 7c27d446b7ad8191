// AdamW, moving average and bf16 copy in one pass over all parameters: 38 bytes per parameter.
// Work is handed out in chunks across all tensors, so that many small ones cost no more than one.

#include "adamw_ema.h"
#include "cpu.h"

#include <stdlib.h>

namespace {

const int64_t CHUNK = 1 << 14;  // elements: seven arrays of them fit the second-level cache

template <bool AVERAGE, bool COPY>
void update(const AdamwStep& now, int64_t n, float* __restrict p, const float* __restrict g,
            float* __restrict m, float* __restrict v, float* __restrict average,
            uint16_t* __restrict copy) {
  for (int64_t i = 0; i < n; ++i) {
    float next = p[i];
    adamw_update(now, g[i], next, m[i], v[i]);
    p[i] = next;
    if (AVERAGE) average[i] = adamw_average(now, average[i], next);
    if (COPY) copy[i] = to_bf16(next);
  }
}

// A skipped step: the weights stay, their average goes on.
void hold(const AdamwStep& now, int64_t n, const float* p, float* average, uint16_t* copy) {
  for (int64_t i = 0; average && i < n; ++i) average[i] = adamw_average(now, average[i], p[i]);
  for (int64_t i = 0; copy && i < n; ++i) copy[i] = to_bf16(p[i]);
}

}  // namespace

// averages and copies may be null. All tensors are dense; those of one number agree in layout.
EXPORT(adamw_ema)
(int64_t tensors, const int64_t* sizes, float* const* params, const float* const* grads,
 float* const* exp_avgs, float* const* exp_avg_sqs, float* const* averages,
 uint16_t* const* copies, const float* lr, const float* step, const float* decay,
 const float* factor, const float* skip, double beta1, double beta2, double tiny,
 double weight_decay, int threads, Runtime runtime) {
  const AdamwStep now = adamw_step(adamw_options(beta1, beta2, tiny, weight_decay),
                                   {lr, step, decay, factor, skip});
  // first[t]: number of chunks before tensor t.
  int64_t* first = (int64_t*)malloc(sizeof(int64_t) * (size_t)(tensors + 1));
  if (!first) return OUT_OF_MEMORY;
  first[0] = 0;
  for (int64_t t = 0; t < tensors; ++t) first[t + 1] = first[t] + (sizes[t] + CHUNK - 1) / CHUNK;
  parallel_for(first[tensors], threads, runtime, [&](int64_t begin, int64_t end) {
    int64_t t = 0;  // the last tensor with first[t] <= begin
    for (int64_t high = tensors; high - t > 1;) {
      const int64_t middle = (t + high) / 2;
      (first[middle] <= begin ? t : high) = middle;
    }
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first[t + 1] <= chunk) ++t;
      const int64_t i = (chunk - first[t]) * CHUNK, left = sizes[t] - i;
      const int64_t n = left < CHUNK ? left : CHUNK;
      float* average = averages ? averages[t] + i : nullptr;
      uint16_t* copy = copies ? copies[t] + i : nullptr;
      auto run = update<false, false>;
      if (average) run = copy ? update<true, true> : update<true, false>;
      else if (copy) run = update<false, true>;
      if (now.keep)
        run(now, n, params[t] + i, grads[t] + i, exp_avgs[t] + i, exp_avg_sqs[t] + i, average,
            copy);
      else
        hold(now, n, params[t] + i, average, copy);
    }
  });
  free(first);
  return OK;
}
