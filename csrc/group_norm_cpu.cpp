// Group normalisation with what stands around it, on the CPU: see robustdm/ops/reference.py for what is
// computed and native.py for the calls.
//
// A tensor is (batch, spatial, channels), contiguous. A unit of work is a slab of whole groups of one
// sample, small enough to stay in the second-level cache while it is read again: for the mean, for
// the variance about that mean, for the result. Where a slab is all of the channels, several
// positions stand side by side in one stretch, so that loops over few channels are long enough for
// vectors. Units, and the order of all sums, follow from the shape alone: results do not depend on
// the number of threads.

#include "cpu.h"
#include "philox_lanes.h"

#include <stdlib.h>

namespace {

const int64_t SLAB_ELEMENTS = 1 << 16;  // 256 KiB of float32
const int64_t SLAB_CHANNELS = 32;       // no fewer: their cache lines would be read in parts
const int64_t LANES_WANTED = 128;       // elements of a stretch
const int FOLD = 64;                    // stretches that are summed in float32

struct Plan {
  int64_t batch, spatial, channels, groups, size;  // size: channels of a group
  int64_t slab, slabs;                             // channels of a unit; units of a sample
  int64_t rows;                                    // positions of a stretch

  Plan(int64_t b, int64_t s, int64_t c, int64_t g)
      : batch(b), spatial(s), channels(c), groups(g), size(c / g), slab(c), rows(1) {
    const int64_t fitting = SLAB_ELEMENTS / s;
    const int64_t wanted = fitting > SLAB_CHANNELS ? fitting : SLAB_CHANNELS;
    if (wanted < c) slab = (wanted + size - 1) / size * size;
    if (slab >= c) {
      slab = c;
      rows = c < LANES_WANTED ? (LANES_WANTED + c - 1) / c : 1;
      if (rows > s) rows = s;
    }
    slabs = (c + slab - 1) / slab;
  }
};

struct Unit {
  const Plan& plan;
  int64_t sample, first;  // first channel
  int channels, lanes;    // lanes: elements of a whole stretch

  Unit(const Plan& p, int64_t i) : plan(p), sample(i / p.slabs), first(i % p.slabs * p.slab) {
    const int64_t left = p.channels - first;
    channels = (int)(left < p.slab ? left : p.slab);
    lanes = (int)(channels * p.rows);
  }

  // run(offset in memory, first position, elements) for every stretch.
  template <class Run>
  inline void stretches(Run run) const {
    for (int64_t s = 0; s < plan.spatial; s += plan.rows) {
      const int64_t left = plan.spatial - s, rows = left < plan.rows ? left : plan.rows;
      run((sample * plan.spatial + s) * plan.channels + first, s, (int)(rows * channels));
    }
  }

  // The values of the channels, or of their groups, to all lanes.
  inline void repeat(float* values) const {
    for (int j = channels; j < lanes; j += channels)
      memcpy(values + j, values, channels * sizeof(float));
  }
  inline void spread(float* values, const float* of_group) const {
    const int size = (int)plan.size;
    for (int c = 0; c < channels; c += size, ++of_group)
      for (int i = 0; i < size; ++i) values[c + i] = *of_group;
    repeat(values);
  }
};

// Sums over the positions for every channel: in float32 for a while, then in float64.
struct Sums {
  const Unit& unit;
  float* lanes;
  double* channels;
  int stretches = 0;

  Sums(const Unit& u, float* l, double* c) : unit(u), lanes(l), channels(c) {
    for (int j = 0; j < u.lanes; ++j) lanes[j] = 0.0f;
    for (int j = 0; j < u.channels; ++j) channels[j] = 0.0;
  }
  void fold() {
    for (int first = 0; first < unit.lanes; first += unit.channels)
      for (int c = 0; c < unit.channels; ++c) channels[c] += lanes[first + c];
    for (int j = 0; j < unit.lanes; ++j) lanes[j] = 0.0f;
    stretches = 0;
  }
  void next() {
    if (++stretches == FOLD) fold();
  }
};

struct Affine {
  const float *weight, *bias, *scale, *shift;  // (C), (C), (B, C), (B, C), or null

  // u = xhat * gain + offset, for every lane.
  void operator()(const Unit& unit, float* gain, float* offset) const {
    const int64_t c0 = unit.first, row = unit.sample * unit.plan.channels + c0;
    for (int c = 0; c < unit.channels; ++c) gain[c] = weight ? weight[c0 + c] : 1.0f;
    for (int c = 0; c < unit.channels; ++c) offset[c] = bias ? bias[c0 + c] : 0.0f;
    if (scale)
      for (int c = 0; c < unit.channels; ++c) {
        const float factor = 1.0f + scale[row + c];
        gain[c] *= factor, offset[c] = offset[c] * factor + shift[row + c];
      }
    unit.repeat(gain), unit.repeat(offset);
  }
};

// 2^x within 2 ulp between the limits of normal numbers; the polynomial is fitted on
// [-1/2, 1/2] for the least relative error, 7.5e-8.
inline float power_of_two(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 127.0f ? 127.0f : x;
  const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float shifted = x + ROUND, f = x - (shifted - ROUND);
  float y = 1.3276472454890609e-3f;
  y = y * f + 9.675541892647743e-3f;
  y = y * f + 5.550713092088699e-2f;
  y = y * f + 2.4022120237350464e-1f;
  y = y * f + 6.931469440460205e-1f;
  y = y * f + 1.0000001192092896f;
  return as_float(as_bits(y) + (as_bits(shifted) << 23));
}

inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_two(x * -1.44269504f)); }

// Dropout: all bits set for each element of a stretch that survives.
struct Masks {
  Philox philox;
  int64_t first_index;
  uint32_t least;   // an element survives if its 16 bits are at least that
  float survives;   // the factor of those that do

  Masks(const int64_t* key, int layer, double rate)
      : philox(key[0], key[1], (Stream)(11 + 256 * layer)), first_index(key[2]),
        least((uint32_t)rint(65536 * rate)), survives((float)(1 / (1 - rate))) {}

  void operator()(const Unit& unit, int64_t position, int count, uint32_t* keep) const {
    const Plan& p = unit.plan;
    const int64_t of_row = (p.channels + 7) / 8, begin = unit.first / 8;
    const int64_t end = (unit.first + unit.channels + 7) / 8;
    for (int row = 0; row * unit.channels < count; ++row, keep += unit.channels) {
      const int64_t sites = (first_index + unit.sample) * p.spatial + position + row;
      for (int64_t call = begin; call < end; call += CHAINS * LANES) {
        Lanes index[CHAINS], word[4][CHAINS];
        for (int i = 0; i < CHAINS; ++i)
          for (int l = 0; l < LANES; ++l) index[i][l] = sites * of_row + call + i * LANES + l;
        philox(index, word);
        uint32_t words[4][CHAINS * LANES];
        for (int w = 0; w < 4; ++w)
          for (int i = 0; i < CHAINS; ++i) store_words(word[w][i], words[w] + i * LANES);
        for (int i = 0; i < CHAINS * LANES && call + i < end; ++i)
          for (int h = 0; h < 8; ++h) {
            const int64_t c = (call + i) * 8 + h - unit.first;
            const uint32_t bits = words[h / 2][i] >> (16 * (h & 1)) & 0xffffu;
            if (c >= 0 && c < unit.channels) keep[c] = bits >= least ? 0xffffffffu : 0u;
          }
      }
    }
  }

  float apply(float x, uint32_t keep) const { return as_float(as_bits(x * survives) & keep); }
};

// x + add, rounded to the dtype, where a result will be written later.
template <int D>
void stage(const Unit& unit, const void* x, const float* add, void* out, float* lanes) {
  typedef typename Element<D>::Type T;
  const int64_t row = unit.sample * unit.plan.channels + unit.first;
  for (int c = 0; c < unit.channels; ++c) lanes[c] = add[row + c];
  unit.repeat(lanes);
  unit.stretches([&](int64_t offset, int64_t, int n) {
    const T* from = (const T*)x + offset;
    T* to = (T*)out + offset;
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) to[j] = Element<D>::put(Element<D>::get(from[j]) + lanes[j]);
  });
}

struct Forward {
  const void* x;
  void* y;
  float *mean, *rstd;  // (B, groups)
  Affine affine;
  const float* add;
  bool silu;
  const Masks* masks;
  float tiny;
};

// y from the normalised values; the four combinations are loops of their own.
template <int D, bool SILU, bool DROPS>
void normalise(const Unit& unit, const Forward& f, const void* source, const float* centre,
               const float* factor, const float* offsets, uint32_t* keep) {
  typedef typename Element<D>::Type T;
  unit.stretches([&](int64_t offset, int64_t position, int n) {
    const T* in = (const T*)source + offset;
    T* out = (T*)f.y + offset;
    if (DROPS) (*f.masks)(unit, position, n, keep);
#pragma GCC ivdep  // in and out are the same, or apart
    for (int j = 0; j < n; ++j) {
      float u = (Element<D>::get(in[j]) - centre[j]) * factor[j] + offsets[j];
      if (SILU) u = u * sigmoid(u);
      if (DROPS) u = f.masks->apply(u, keep[j]);
      out[j] = Element<D>::put(u);
    }
  });
}

template <int D>
void forward_unit(const Unit& unit, const Forward& f, float* scratch, double* sums) {
  typedef typename Element<D>::Type T;
  const Plan& p = unit.plan;
  float *centre = scratch, *factor = centre + unit.lanes, *offsets = factor + unit.lanes;
  float* spare = offsets + unit.lanes;
  const void* source = f.x;
  if (f.add) {
    stage<D>(unit, f.x, f.add, f.y, spare);
    source = f.y;
  }
  const double count = (double)(p.size * p.spatial);
  float* mean = f.mean + unit.sample * p.groups;
  float* rstd = f.rstd + unit.sample * p.groups;
  const int64_t groups = unit.channels / p.size, group0 = unit.first / p.size;

  Sums total(unit, spare, sums);
  unit.stretches([&](int64_t offset, int64_t, int n) {
    const T* in = (const T*)source + offset;
    for (int j = 0; j < n; ++j) spare[j] += Element<D>::get(in[j]);
    total.next();
  });
  total.fold();
  for (int64_t g = 0; g < groups; ++g) {
    double sum = 0;
    for (int64_t c = 0; c < p.size; ++c) sum += sums[g * p.size + c];
    mean[group0 + g] = (float)(sum / count);
  }
  unit.spread(centre, mean + group0);

  Sums squares(unit, spare, sums);
  unit.stretches([&](int64_t offset, int64_t, int n) {
    const T* in = (const T*)source + offset;
    for (int j = 0; j < n; ++j) {
      const float d = Element<D>::get(in[j]) - centre[j];
      spare[j] += d * d;
    }
    squares.next();
  });
  squares.fold();
  for (int64_t g = 0; g < groups; ++g) {
    double sum = 0;
    for (int64_t c = 0; c < p.size; ++c) sum += sums[g * p.size + c];
    rstd[group0 + g] = (float)(1 / sqrt(sum / count + f.tiny));
  }
  f.affine(unit, factor, offsets);
  unit.spread(spare, rstd + group0);
  for (int j = 0; j < unit.lanes; ++j) factor[j] *= spare[j];
  uint32_t* keep = (uint32_t*)spare;
  if (f.silu && f.masks) normalise<D, true, true>(unit, f, source, centre, factor, offsets, keep);
  else if (f.silu) normalise<D, true, false>(unit, f, source, centre, factor, offsets, keep);
  else if (f.masks) normalise<D, false, true>(unit, f, source, centre, factor, offsets, keep);
  else normalise<D, false, false>(unit, f, source, centre, factor, offsets, keep);
}

struct Backward {
  const void *dy, *x;
  void* dx;
  float* sums;  // (B, C, 3), or null
  const float *mean, *rstd;
  Affine affine;
  const float* add;
  const Masks* masks;
};

template <int D, bool SILU, bool DROPS>
void backward_unit(const Unit& unit, const Backward& b, float* scratch, double* sums) {
  typedef typename Element<D>::Type T;
  const Plan& p = unit.plan;
  const int w = unit.lanes;
  float *centre = scratch, *rstd = centre + w, *gain = rstd + w, *offsets = gain + w;
  float *sum1 = offsets + w, *sum2 = sum1 + w, *mean1 = sum2 + w, *mean2 = mean1 + w;
  uint32_t* keep = (uint32_t*)(mean2 + w);
  float* kept = mean2 + 2 * w;  // dL/du of the whole unit
  double *total1 = sums, *total2 = sums + unit.channels;
  const int64_t row = unit.sample * p.groups + unit.first / p.size;
  const void* source = b.x;
  if (b.add) {
    stage<D>(unit, b.x, b.add, b.dx, centre);
    source = b.dx;
  }
  unit.spread(centre, b.mean + row);
  unit.spread(rstd, b.rstd + row);
  b.affine(unit, gain, offsets);

  Sums first(unit, sum1, total1), second(unit, sum2, total2);
  float* du = kept;
  unit.stretches([&](int64_t offset, int64_t position, int n) {
    const T *in = (const T*)source + offset, *dy = (const T*)b.dy + offset;
    if (DROPS) (*b.masks)(unit, position, n, keep);
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) {
      const float xhat = (Element<D>::get(in[j]) - centre[j]) * rstd[j];
      float d = Element<D>::get(dy[j]);
      if (DROPS) d = b.masks->apply(d, keep[j]);
      if (SILU) {
        const float u = xhat * gain[j] + offsets[j], s = sigmoid(u);
        d = d * s * (1.0f + u * (1.0f - s));
      }
      du[j] = d;
      sum1[j] += d;
      sum2[j] += d * xhat;
    }
    du += n;
    first.next(), second.next();
  });
  first.fold(), second.fold();

  const double count = (double)(p.size * p.spatial);
  for (int g = 0; g < unit.channels; g += (int)p.size) {
    double m1 = 0, m2 = 0;
    for (int c = g; c < g + p.size; ++c) m1 += gain[c] * total1[c], m2 += gain[c] * total2[c];
    for (int c = g; c < g + p.size; ++c) {
      mean1[c] = (float)(m1 / count), mean2[c] = (float)(m2 / count);
    }
  }
  unit.repeat(mean1), unit.repeat(mean2);
  float* out = b.sums ? b.sums + (unit.sample * p.channels + unit.first) * 3 : nullptr;
  if (out)
    for (int c = 0; c < unit.channels; ++c) {
      out[3 * c] = (float)total1[c], out[3 * c + 1] = (float)total2[c];
    }

  Sums third(unit, sum1, total1);
  du = kept;
  unit.stretches([&](int64_t offset, int64_t, int n) {
    const T* in = (const T*)source + offset;
    T* dx = (T*)b.dx + offset;
#pragma GCC ivdep  // in and dx are the same, or apart
    for (int j = 0; j < n; ++j) {
      const float xhat = (Element<D>::get(in[j]) - centre[j]) * rstd[j];
      sum2[j] = rstd[j] * (gain[j] * du[j] - mean1[j] - xhat * mean2[j]);
    }
    if (out)
      for (int j = 0; j < n; ++j) sum1[j] += sum2[j];
    for (int j = 0; j < n; ++j) dx[j] = Element<D>::put(sum2[j]);
    du += n;
    third.next();
  });
  third.fold();
  if (out)
    for (int c = 0; c < unit.channels; ++c) out[3 * c + 2] = (float)total1[c];
}

// body(unit, floats, doubles) for all units, with memory for so many numbers.
template <class Body>
int for_units(const Plan& plan, int64_t floats, int64_t doubles, int threads, Runtime runtime,
              Body body) {
  int status = OK;
  parallel_for(plan.batch * plan.slabs, threads, runtime, [&](int64_t begin, int64_t end) {
    double* sums = (double*)malloc(doubles * sizeof(double) + floats * sizeof(float));
    if (!sums) {
      __atomic_store_n(&status, (int)OUT_OF_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i) body(Unit(plan, i), (float*)(sums + doubles), sums);
    free(sums);
  });
  return status;
}

template <int D>
void forward_all(int* status, const Plan& plan, const Forward& f, int threads, Runtime runtime) {
  *status = for_units(plan, 4 * plan.slab * plan.rows, plan.slab, threads, runtime,
                      [&](const Unit& unit, float* scratch, double* sums) {
                        forward_unit<D>(unit, f, scratch, sums);
                      });
}

template <int D>
void backward_all(int* status, const Plan& plan, const Backward& b, bool silu, int threads,
                  Runtime runtime) {
  auto* run = silu ? (b.masks ? backward_unit<D, true, true> : backward_unit<D, true, false>)
                   : (b.masks ? backward_unit<D, false, true> : backward_unit<D, false, false>);
  const int64_t floats = plan.slab * (9 * plan.rows + plan.spatial);
  *status = for_units(plan, floats, 2 * plan.slab, threads, runtime,
                      [&](const Unit& unit, float* scratch, double* sums) {
                        run(unit, b, scratch, sums);
                      });
}

}  // namespace

EXPORT(group_norm_act_forward)(
    const void* x, int dtype, int64_t batch, int64_t spatial, int64_t channels, int64_t groups,
    const float* weight, const float* bias, const float* scale, const float* shift,
    const float* add, void* y, float* mean, float* rstd, int silu, double dropout,
    const int64_t* key, int layer, double tiny, int threads, Runtime runtime) {
  const Plan plan(batch, spatial, channels, groups);
  const int64_t none[3] = {0, 0, 0};
  const Masks masks(dropout ? key : none, layer, dropout);
  const Forward f = {x, y, mean, rstd, {weight, bias, scale, shift}, add, silu != 0,
                     dropout ? &masks : nullptr, (float)tiny};
  int status;
  FOR_DTYPE(dtype, forward_all, &status, plan, f, threads, runtime);
  return status;
}

EXPORT(group_norm_act_backward)(
    const void* dy, int dtype, int64_t batch, int64_t spatial, int64_t channels, int64_t groups,
    const void* x, const float* mean, const float* rstd, const float* weight, const float* bias,
    const float* scale, const float* shift, const float* add, void* dx, float* sums,
    int silu, double dropout, const int64_t* key, int layer, int threads, Runtime runtime) {
  const Plan plan(batch, spatial, channels, groups);
  const int64_t none[3] = {0, 0, 0};
  const Masks masks(dropout ? key : none, layer, dropout);
  const Backward b = {dy, x, dx, sums, mean, rstd, {weight, bias, scale, shift}, add,
                      dropout ? &masks : nullptr};
  int status;
  FOR_DTYPE(dtype, backward_all, &status, plan, b, silu != 0, threads, runtime);
  return status;
}
