// Mean and sum of squared differences of a set of values, merged in a fixed order (Chan): no difference of large sums.
#pragma once

#include "cuda/kernels.h"

namespace gsto::cuda {

struct Statistics {
  float count = 0, mean = 0, squares = 0;

  GSTO_DEVICE void merge(float other_count, float other_mean, float other_squares) {
    const float total = count + other_count;
    if (other_count == 0 || total == 0) return;
    const float delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * count * (other_count / total);
    count = total;
  }
};

// all[0] = what all threads of the block have. `all` has an entry per thread, in shared memory; the first thread may
// read it on return.
GSTO_DEVICE void merge_threads(const Statistics& mine, Statistics* all) {
  const int tid = static_cast<int>(threadIdx.x);
  all[tid] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (tid < half) all[tid].merge(all[tid + half].count, all[tid + half].mean, all[tid + half].squares);
  }
}

}  // namespace gsto::cuda
