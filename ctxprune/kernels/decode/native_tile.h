// How do a few queries attend to the keys of one page? Four side by side, every key read once for all of them.
//
// A key's numbers are taken a vector at a time, and multiplied with those of each query; a vector of products is folded
// to four numbers, and these are added for a whole page at once, so that no sum is ever taken within a vector. Then a
// softmax that runs on from page to page, with the four queries' logits of a key beside each other, and the values,
// weighted. What is computed for a query depends neither on those beside it nor on how many these are.
#pragma once

#include "native_math.h"

namespace {

// Queries that are computed side by side.
constexpr int64_t LANES = 4;

// COUNT numbers that lie in one piece anywhere.
template <typename T, int64_t COUNT>
struct Numbers {
  typedef T Vector __attribute__((vector_size(COUNT * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T, int64_t COUNT>
using Vector = typename Numbers<T, COUNT>::Vector;

// What a register holds, and how many keys (or vectors of the output) meet the queries at once: their products stay in
// registers, of which there are 32 with AVX-512 and 16 without.
#ifdef __AVX512F__
constexpr int64_t REGISTER = 64, AT_ONCE = 4;
#else
constexpr int64_t REGISTER = 32, AT_ONCE = 2;
#endif
template <typename T>
constexpr int64_t PIECE = REGISTER / sizeof(T);
// What is left of a vector of products; the numbers that the softmax looks at together, which divide a page's.
constexpr int64_t FOLDED = 4, TOGETHER = 4 * LANES;

// A slot that some query of its row sees: those from `from` to `to` - 1, counted without padding.
struct Seen {
  int32_t place, from, to;
};

template <int64_t COUNT, typename T>
inline Vector<T, FOLDED> folded(const Vector<T, COUNT>& numbers) {
  if constexpr (COUNT == FOLDED) {
    return numbers;
  } else {
    const auto* half = reinterpret_cast<const Vector<T, COUNT / 2>*>(&numbers);
    return folded<COUNT / 2, T>(half[0] + half[1]);
  }
}

// The keys of a page, for one key/value head.
template <typename T>
struct PageOf {
  const T *keys, *values;
  const Seen* found;
  int64_t count;
  bool whole;          // every query of the row sees all of these
  const T* next_keys;  // of the page that comes next, to be asked for meanwhile; null: none
};

// Queries of a row, LANES at most, and what they have seen so far.
template <typename T>
struct Tile {
  int64_t width, first, real, queries;  // first: its place among all of the row and head, `queries` per query head
  const T* query;                       // (LANES, width), scaled
  T *top, *sum, *out;                   // (LANES), (LANES), (LANES, width): largest logit, sum and values so far
  T *weights, *parts;                   // room for a page: (page, LANES) and FOLDED times that

  // The running softmax takes in a page. fresh: it has not been read for other queries just now.
  template <int WIDTH>
  void take(const PageOf<T>& page, bool fresh) const {
    const int64_t n_width = WIDTH ? WIDTH : width;
    int64_t count = page.count;
    const int64_t last = first / queries == (first + real - 1) / queries ? (first + real - 1) % queries : queries - 1;
    while (count > 0 && page.found[count - 1].from > last) --count;  // they come after all of these queries
    if (count == 0) return;
    for (int64_t i = 0; i < count; i += AT_ONCE) multiply<WIDTH>(page, i, count, fresh);
    const int64_t blocks = (count * LANES + TOGETHER - 1) / TOGETHER, all = blocks * TOGETHER;
#pragma omp simd
    for (int64_t j = 0; j < all; ++j)
      weights[j] = (parts[FOLDED * j] + parts[FOLDED * j + 1]) + (parts[FOLDED * j + 2] + parts[FOLDED * j + 3]);
    unseen(page, count, all, LOWEST<T>);
    T highest[TOGETHER], total[TOGETHER] = {}, less[LANES];
    for (int64_t l = 0; l < TOGETHER; ++l) highest[l] = top[l % LANES];
    for (int64_t b = 0; b < blocks; ++b)
#pragma omp simd
      for (int64_t l = 0; l < TOGETHER; ++l) {
        const T logit = weights[b * TOGETHER + l];
        highest[l] = logit > highest[l] ? logit : highest[l];
      }
    for (int64_t l = 0; l < LANES; ++l) {
      for (int64_t i = l + LANES; i < TOGETHER; i += LANES) highest[l] = std::max(highest[l], highest[i]);
      for (int64_t i = l + LANES; i < TOGETHER; i += LANES) highest[i] = highest[l];
      less[l] = exponential(top[l] - highest[l]);
      top[l] = highest[l];
    }
    for (int64_t b = 0; b < blocks; ++b)
#pragma omp simd
      for (int64_t l = 0; l < TOGETHER; ++l)
        weights[b * TOGETHER + l] = exponential(weights[b * TOGETHER + l] - highest[l]);
    unseen(page, count, all, T(0));  // a query that has seen nothing yet has no top
    for (int64_t b = 0; b < blocks; ++b)
#pragma omp simd
      for (int64_t l = 0; l < TOGETHER; ++l) total[l] += weights[b * TOGETHER + l];
    for (int64_t l = 0; l < LANES; ++l)
      sum[l] = sum[l] * less[l] + ((total[l] + total[l + LANES]) + (total[l + 2 * LANES] + total[l + 3 * LANES]));
    const T* next = fresh ? page.next_keys : nullptr;
    switch (real) {
      case 1: mix<1>(page, count, n_width, less, next); break;
      case 2: mix<2>(page, count, n_width, less, next); break;
      case 3: mix<3>(page, count, n_width, less, next); break;
      default: mix<LANES>(page, count, n_width, less, next);
    }
  }

  // Products of all queries with keys i to i + AT_ONCE - 1, folded.
  template <int WIDTH>
  void multiply(const PageOf<T>& page, int64_t i, int64_t count, bool fresh) const {
    using Piece = Vector<T, PIECE<T>>;
    const int64_t n_width = WIDTH ? WIDTH : width;
    const T* one[AT_ONCE];
    for (int64_t j = 0; j < AT_ONCE; ++j) {
      const int64_t place = page.found[std::min(i + j, count - 1)].place;
      one[j] = page.keys + place * n_width;
      if (fresh) fetch(page.values + place * n_width, n_width);
    }
    Piece held[AT_ONCE][LANES] = {};
    int64_t d = 0;
    for (; d + PIECE<T> <= n_width; d += PIECE<T>) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < AT_ONCE; ++j) {
        const Piece key = *reinterpret_cast<const Piece*>(one[j] + d);
#pragma GCC unroll 4
        for (int64_t l = 0; l < LANES; ++l)
          held[j][l] += key * *reinterpret_cast<const Piece*>(query + l * n_width + d);
      }
    }
    Vector<T, FOLDED>* to = reinterpret_cast<Vector<T, FOLDED>*>(parts) + i * LANES;
#pragma GCC unroll 4
    for (int64_t j = 0; j < AT_ONCE; ++j)
#pragma GCC unroll 4
      for (int64_t l = 0; l < LANES; ++l) to[j * LANES + l] = folded<PIECE<T>, T>(held[j][l]);
    for (; d < n_width; ++d)
      for (int64_t j = 0; j < AT_ONCE; ++j)
        for (int64_t l = 0; l < LANES; ++l)
          parts[((i + j) * LANES + l) * FOLDED + d % FOLDED] += one[j][d] * query[l * n_width + d];
  }

  // `instead` for the weights of keys that a query does not see, and for those behind the last key.
  void unseen(const PageOf<T>& page, int64_t count, int64_t all, T instead) const {
    std::fill(weights + count * LANES, weights + all, instead);
    if (page.whole) return;
    for (int64_t i = 0; i < count; ++i) {
      const Seen& key = page.found[i];
      if (key.from == 0 && key.to == queries) continue;
      for (int64_t l = 0; l < LANES; ++l) {
        const int64_t q = (first + l) % queries;
        if (q < key.from || q >= key.to) weights[i * LANES + l] = instead;
      }
    }
  }

  // The values of a page, weighted, are added to the outputs of so many queries; less: how much less those before weigh.
  template <int QUERIES>
  void mix(const PageOf<T>& page, int64_t count, int64_t n_width, const T* less, const T* next) const {
    int64_t d = 0;
    for (; d + AT_ONCE * PIECE<T> <= n_width; d += AT_ONCE * PIECE<T>)
      mix<QUERIES, AT_ONCE>(page, count, n_width, less, d == 0 ? next : nullptr, d);
    for (; d + PIECE<T> <= n_width; d += PIECE<T>)
      mix<QUERIES, 1>(page, count, n_width, less, d == 0 ? next : nullptr, d);
    for (; d < n_width; ++d)
      for (int64_t q = 0; q < QUERIES; ++q) {
        T& of = out[q * n_width + d];
        of *= less[q];
        for (int64_t i = 0; i < count; ++i)
          of += weights[i * LANES + q] * page.values[page.found[i].place * n_width + d];
      }
  }

  // The same of PIECES vectors, from number d of each value.
  template <int QUERIES, int PIECES>
  void mix(const PageOf<T>& page, int64_t count, int64_t n_width, const T* less, const T* next, int64_t d) const {
    using Piece = Vector<T, PIECE<T>>;
    Piece held[QUERIES][PIECES];
#pragma GCC unroll 4
    for (int64_t q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
      for (int64_t p = 0; p < PIECES; ++p)
        held[q][p] = reinterpret_cast<const Piece*>(out + q * n_width + d)[p] * less[q];
    for (int64_t i = 0; i < count; ++i) {
      if (next) fetch(next + i * n_width, n_width);
      const Piece* value = reinterpret_cast<const Piece*>(page.values + page.found[i].place * n_width + d);
#pragma GCC unroll 4
      for (int64_t q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PIECES; ++p) held[q][p] += weights[i * LANES + q] * value[p];
    }
#pragma GCC unroll 4
    for (int64_t q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
      for (int64_t p = 0; p < PIECES; ++p) reinterpret_cast<Piece*>(out + q * n_width + d)[p] = held[q][p];
  }
};

}  // namespace
