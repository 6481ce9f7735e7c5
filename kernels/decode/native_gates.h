// What do a step's tokens ask, and what are they asked by? The two small products of a gate, a few tokens at a time.
//
// A library's product of one row costs as much for its call as for the weights that it reads, and a step has two in
// every layer. A token's numbers depend on it alone, not on how many come with it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace {

// Outputs at once: each number of a token is read once for all of them, and their sums do not wait for each other.
constexpr int64_t OUTPUTS = 8;
// Products below which waking other threads costs more than it saves.
constexpr int64_t PRODUCTS_ALONE = 1 << 17;

template <int MANY, typename T>
inline void some(const T* __restrict x, const T* __restrict weight, int64_t width, T* __restrict to) {
  T sums[MANY] = {};
  for (int m = 0; m < MANY; ++m) {
    const T* __restrict w = weight + m * width;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i] * w[i];
    sums[m] = sum;
  }
  for (int m = 0; m < MANY; ++m) to[m] = sums[m];
}

// to (tokens, outputs) = x (tokens, width; rows `stride` apart) times weight (outputs, width) transposed.
template <typename T>
void products(const T* x, int64_t stride, int64_t tokens, int64_t width, const T* weight, int64_t outputs, T* to) {
  const int64_t tile = outputs * width, each = std::max<int64_t>(1, PRODUCTS_ALONE / std::max<int64_t>(1, tile));
  at::parallel_for(0, tokens, each, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t m = 0;
      for (; m + OUTPUTS <= outputs; m += OUTPUTS)
        some<OUTPUTS>(x + t * stride, weight + m * width, width, to + t * outputs + m);
      for (; m < outputs; ++m) some<1>(x + t * stride, weight + m * width, width, to + t * outputs + m);
    }
  });
}

}  // namespace
