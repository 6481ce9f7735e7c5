// What do a step's tokens ask, and what are they asked by? The two small products of a gate, a few tokens at a time.
//
// A library's product of one row costs as much for its call as for the weights that it reads, and a step has two in
// every layer. A token's numbers depend on it alone, not on how many come with it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Outputs at once: each number of a token is read once for all of them, and their sums do not wait for each other.
constexpr int64_t OUTPUTS = 8;
// Products below which waking other threads costs more than it saves: one token of width 512 at rank 64 has twice that,
// and between a step's other products two threads take 22 us for it, one 28.
constexpr int64_t PRODUCTS_ALONE = 1 << 15;

template <int MANY, typename T>
inline void some(const T* x, const T* weight, int64_t width, T* to) {
  // Sums side by side, written as the vectors that they are: left to itself the compiler adds one number at a time.
  constexpr int64_t LANES = 64 / static_cast<int64_t>(sizeof(T));
  typedef T Lanes __attribute__((vector_size(64)));
  Lanes sums[MANY] = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Lanes numbers, weights;
    std::memcpy(&numbers, x + i, sizeof(Lanes));
    for (int m = 0; m < MANY; ++m) {
      std::memcpy(&weights, weight + m * width + i, sizeof(Lanes));
      sums[m] += numbers * weights;
    }
  }
  for (int m = 0; m < MANY; ++m) {
    T sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[m][lane];
    for (int64_t rest = i; rest < width; ++rest) sum += x[rest] * weight[m * width + rest];
    to[m] = sum;
  }
}

// One of the two: to (tokens, outputs) = x (tokens, width) times weight (outputs, width) transposed.
template <typename T>
struct Product {
  const T* weight;
  int64_t outputs;
  T* to;
  int64_t blocks() const { return (outputs + OUTPUTS - 1) / OUTPUTS; }
};

// Both, cut into blocks of outputs, which threads share.
template <typename T>
void multiply(const T* x, int64_t tokens, int64_t width, const Product<T>& one, const Product<T>& other) {
  const int64_t split = one.blocks(), blocks = split + other.blocks();
  const int64_t each = std::max<int64_t>(1, PRODUCTS_ALONE / std::max<int64_t>(1, OUTPUTS * width * tokens));
  at::parallel_for(0, blocks, each, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Product<T>& p = b < split ? one : other;
      const int64_t begin = (b < split ? b : b - split) * OUTPUTS, end = std::min(begin + OUTPUTS, p.outputs);
      for (int64_t t = 0; t < tokens; ++t) {
        const T* row = x + t * width;
        T* to = p.to + t * p.outputs;
        if (end - begin == OUTPUTS) {
          some<OUTPUTS>(row, p.weight + begin * width, width, to + begin);
        } else {
          for (int64_t m = begin; m < end; ++m) some<1>(row, p.weight + m * width, width, to + m);
        }
      }
    }
  });
}

}  // namespace
