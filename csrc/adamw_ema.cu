// AdamW, moving average and bf16 copy in one pass over all parameters, on a GPU.
//
// Pointers travel in the kernel's arguments and every number of the step is read from device
// memory: nothing is copied, allocated or waited for, so a launch can be captured in a CUDA graph.

#include "adamw_ema.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default"))) int
#define ROBUSTDM_ABI 4  // native.ABI

namespace {

const int THREADS = 256, VECTORS = 8;             // of 4 elements, in flight per thread and chunk
const int64_t CHUNK = THREADS * 4 * VECTORS;
const int TENSORS = 60;                           // arguments of a launch must stay below 4 KB

struct Tensors {
  int64_t size[TENSORS];
  float *p[TENSORS], *m[TENSORS], *v[TENSORS], *average[TENSORS];
  const float* g[TENSORS];
  __nv_bfloat16* copy[TENSORS];
  int first[TENSORS + 1];  // number of chunks before each tensor
  int count;
};
static_assert(sizeof(Tensors) + sizeof(AdamwOptions) + sizeof(AdamwScalars) < 4096, "too large");

template <bool AVERAGE, bool COPY>
__device__ void update(const AdamwStep& now, float g, float& p, float& m, float& v,
                       float& average) {
  if (now.keep) adamw_update(now, g, p, m, v);
  if (AVERAGE) average = adamw_average(now, average, p);
}

// One block per chunk. average and copy are null for every tensor or for none.
template <bool AVERAGE, bool COPY>
__global__ void __launch_bounds__(THREADS)
adamw_ema_kernel(const __grid_constant__ Tensors all, AdamwOptions options, AdamwScalars scalars) {
  const int chunk = blockIdx.x;
  int t = 0;  // the last tensor with first[t] <= chunk; none is empty
  for (int high = all.count; high - t > 1;) {
    const int middle = (t + high) / 2;
    if (all.first[middle] <= chunk) t = middle;
    else high = middle;
  }
  const AdamwStep now = adamw_step(options, scalars);
  const int64_t start = (chunk - all.first[t]) * CHUNK;
  const int64_t left = all.size[t] - start;
  const int n = (int)(left < CHUNK ? left : CHUNK);
  float *p = all.p[t] + start, *m = all.m[t] + start, *v = all.v[t] + start;
  const float* g = all.g[t] + start;
  float* average = AVERAGE ? all.average[t] + start : nullptr;
  __nv_bfloat16* copy = COPY ? all.copy[t] + start : nullptr;

  const uintptr_t addresses = (uintptr_t)p | (uintptr_t)m | (uintptr_t)v | (uintptr_t)g
                              | (uintptr_t)average | (uintptr_t)copy << 1;  // 16 bytes; 8
  const int vectors = addresses % 16 == 0 ? n / 4 : 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    float4 P = ((float4*)p)[i], M = ((float4*)m)[i], V = ((float4*)v)[i], A = {};
    const float4 G = ((const float4*)g)[i];
    if (AVERAGE) A = ((float4*)average)[i];
    update<AVERAGE, COPY>(now, G.x, P.x, M.x, V.x, A.x);
    update<AVERAGE, COPY>(now, G.y, P.y, M.y, V.y, A.y);
    update<AVERAGE, COPY>(now, G.z, P.z, M.z, V.z, A.z);
    update<AVERAGE, COPY>(now, G.w, P.w, M.w, V.w, A.w);
    if (now.keep) ((float4*)p)[i] = P, ((float4*)m)[i] = M, ((float4*)v)[i] = V;
    if (AVERAGE) ((float4*)average)[i] = A;
    if (COPY) {
      const __nv_bfloat162 low = __floats2bfloat162_rn(P.x, P.y);
      const __nv_bfloat162 high = __floats2bfloat162_rn(P.z, P.w);
      uint2 both;
      memcpy(&both.x, &low, 4);
      memcpy(&both.y, &high, 4);
      ((uint2*)copy)[i] = both;
    }
  }
  // What is left over, or all of a tensor that is not aligned.
  for (int i = 4 * vectors + threadIdx.x; i < n; i += THREADS) {
    float P = p[i], M = m[i], V = v[i], A = AVERAGE ? average[i] : 0.0f;
    update<AVERAGE, COPY>(now, g[i], P, M, V, A);
    if (now.keep) p[i] = P, m[i] = M, v[i] = V;
    if (AVERAGE) average[i] = A;
    if (COPY) copy[i] = __float2bfloat16_rn(P);
  }
}

}  // namespace

// Arguments as adamw_ema_cpu.cpp, with the device and a cudaStream_t; returns the cudaError.
EXPORT adamw_ema_cuda(int64_t tensors, const int64_t* sizes, float* const* params,
                      const float* const* grads, float* const* exp_avgs,
                      float* const* exp_avg_sqs, float* const* averages, void* const* copies,
                      const float* lr, const float* step, const float* decay,
                      const float* factor, const float* skip, double beta1, double beta2,
                      double tiny, double weight_decay, int device, void* stream) {
  const AdamwOptions options = adamw_options(beta1, beta2, tiny, weight_decay);
  const AdamwScalars scalars = {lr, step, decay, factor, skip};
  auto kernel = adamw_ema_kernel<false, false>;
  if (averages) kernel = copies ? adamw_ema_kernel<true, true> : adamw_ema_kernel<true, false>;
  else if (copies) kernel = adamw_ema_kernel<false, true>;

  int before;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  for (int64_t next = 0; error == cudaSuccess && next < tensors;) {
    Tensors all = {};
    int64_t chunks = 0;
    for (; next < tensors && all.count < TENSORS; ++next) {
      if (sizes[next] == 0) continue;
      const int64_t more = (sizes[next] + CHUNK - 1) / CHUNK;
      if (chunks + more > INT32_MAX) {
        if (all.count) break;
        return cudaErrorInvalidValue;  // a tensor of 2^44 elements
      }
      const int t = all.count++;
      all.size[t] = sizes[next];
      all.p[t] = params[next], all.g[t] = grads[next];
      all.m[t] = exp_avgs[next], all.v[t] = exp_avg_sqs[next];
      if (averages) all.average[t] = averages[next];
      if (copies) all.copy[t] = (__nv_bfloat16*)copies[next];
      all.first[t] = (int)chunks;
      chunks += more;
    }
    all.first[all.count] = (int)chunks;
    if (!chunks) break;
    kernel<<<(unsigned)chunks, THREADS, 0, (cudaStream_t)stream>>>(all, options, scalars);
    error = cudaGetLastError();
  }
  if (before != device) cudaSetDevice(before);
  return (int)error;
}

EXPORT abi_cuda() { return ROBUSTDM_ABI; }

// Whether the driver can run this library: a cudaError.
EXPORT probe_cuda() {
  int count;
  return (int)cudaGetDeviceCount(&count);
}

EXPORT error_text_cuda(int error, char* text, int size) {
  const char* from = cudaGetErrorString((cudaError_t)error);
  int i = 0;
  for (; i + 1 < size && from[i]; ++i) text[i] = from[i];
  text[i] = 0;
  return 0;
}
