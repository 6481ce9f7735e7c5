// What does a CPU compute in one decoding step? Dead slots are asked for their drop time and never read.
//
// A row's table is cut into chunks of about CHUNK slots. First every chunk stores the token that falls into it, asks
// its gates and lists its live slots; then every chunk and key/value head attends to those, with a running softmax;
// then the chunks of a row are put together. Chunks depend on the row alone, so neither other rows nor the number of
// threads change a bit of the output. What a step means is said in README.md.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace {

// Slots per task: enough that putting chunks together costs little, few enough that one long row fills the threads.
constexpr int64_t CHUNK = 256;
// Numbers below which waking other threads costs more than it saves.
constexpr int64_t ALONE = 4096;
// Keys that are asked for before their turn.
constexpr int64_t AHEAD = 8;
// Finite, so that nothing is infinity less infinity. A chunk that saw nothing weighs 0.
template <typename T>
constexpr T LOWEST = std::numeric_limits<T>::lowest();

struct Chunk {
  int64_t row, first, last;  // pages first to last - 1 of the row's table
};

// One token per row, and where it goes.
struct Row {
  bool alive = false;  // it neither idles nor lacks room
  int32_t now = -1;
  int64_t rank = 0, place = 0;          // of its token: which page of its table, and where in it
  int64_t slots = 0;                    // of its table to look at
  int64_t first_chunk = 0, chunks = 0;  // its own among all
};

// A tensor whose last axis lies in one piece.
template <typename T>
struct View {
  T* data;
  int64_t row, head;
  explicit View(const at::Tensor& t)
      : data(t.data_ptr<T>()), row(t.stride(0)), head(t.dim() == 3 ? t.stride(1) : 0) {}
  T* at(int64_t r, int64_t h = 0) const { return data + r * row + h * head; }
};

// Room that outlives a call, so that no step asks the system for memory.
template <typename T>
T* scratch(std::vector<T>& held, int64_t count) {
  if (static_cast<int64_t>(held.size()) < count) held.resize(count);
  return held.data();
}

// Asks for a slot's numbers before they are needed: live slots are no stream that a processor would foresee.
template <typename T>
inline void fetch(const T* from, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

template <int WIDTH, typename T>
inline T dot(const T* __restrict a, const T* __restrict b, int64_t width) {
  T sum = 0;
  const int64_t n = WIDTH ? WIDTH : width;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// e^x of x <= 0, to 2 units in the last place; in words that a compiler turns into vectors.
inline float exponential(float x) {
  constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float shifted = x * 1.44269504f + ROUNDS, n = shifted - ROUNDS;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

inline double exponential(double x) { return std::exp(x); }

// task(i) of 0 to count - 1, each by the next thread that is free: rows differ in length.
template <typename F>
void each(int64_t count, int64_t numbers, const F& task) {
  const int64_t threads = numbers < ALONE ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

template <typename T>
struct Step {
  View<T> query, key, value;
  std::optional<View<T>> gate_query, gate_key;
  T beta;
  View<int32_t> guard, drop_time;
  T *keys, *values, *gate_keys;
  int32_t *drop_times, *guards, *positions;
  const int32_t* table;
  int64_t rows, heads, kv_heads, width, rank, page, most;
  T scale;
  T* output;
  // Of every page of every row: its live slots, how many these are, and the first slot that is not live.
  int32_t *live, *count, *dead;
  T* parts;  // per chunk and head: largest logit, sum of weights, weighted values

  // Writes the row's token into its slot.
  void store(int64_t r, const Row& row) const {
    const int64_t page_index = table[r * most + row.rank], slot = page_index * page + row.place;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t to = ((page_index * kv_heads + h) * page + row.place) * width;
      std::copy_n(key.at(r, h), width, keys + to);
      std::copy_n(value.at(r, h), width, values + to);
    }
    if (gate_key && gate_keys) std::copy_n(gate_key->at(r), rank, gate_keys + slot * rank);
    guards[slot] = *guard.at(r);
    drop_times[slot] = *drop_time.at(r);
    positions[slot] = row.now;
  }

  // Drops what the gates of this step drop, and lists what is left.
  void list(const Chunk& chunk, const Row& row) const {
    for (int64_t k = chunk.first; k < chunk.last; ++k) {
      const int64_t of = chunk.row * most + k, page_index = table[of];
      const int64_t end = page_index < 0 ? 0 : std::min(page, row.slots - k * page);
      int32_t* places = live + of * page;
      int64_t n = 0;
      for (int64_t i = 0; i < end; ++i) {
        places[n] = static_cast<int32_t>(i);
        n += drop_times[page_index * page + i] > row.now;
      }
      if (gate_query) n = gate(chunk.row, row.now, page_index * page, places, n);
      count[of] = static_cast<int32_t>(n);
      int64_t hole = 0;
      while (hole < n && places[hole] == hole) ++hole;
      // Slots behind `used` are nobody's.
      dead[of] = hole < end ? static_cast<int32_t>(hole) : -1;
    }
  }

  // Drops what the row's gate drops among n live slots of a page, and closes the gaps in the list; how many are left.
  int64_t gate(int64_t r, int32_t now, int64_t base, int32_t* places, int64_t n) const {
    const T over = T(1) / std::sqrt(T(rank));
    const T* mine = gate_query->at(r);
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i + AHEAD < n) fetch(gate_keys + (base + places[i + AHEAD]) * rank, rank);
      const int64_t slot = base + places[i];
      if (guards[slot] <= now && dot<0>(mine, gate_keys + slot * rank, rank) * over + beta <= 0)
        drop_times[slot] = now;
      else
        places[left++] = places[i];
    }
    return left;
  }

  T* part(int64_t chunk, int64_t head) const { return parts + (chunk * heads + head) * (width + 2); }

  // One key/value head of one chunk, for all query heads that share it.
  template <int WIDTH>
  void attend(int64_t index, const Chunk& chunk, int64_t kv_head) const {
    static thread_local std::vector<T> held;
    const int64_t n_width = WIDTH ? WIDTH : width, groups = heads / kv_heads;
    T* queries = scratch(held, groups * n_width + page);
    T* weights = queries + groups * n_width;
    for (int64_t g = 0; g < groups; ++g) {
      const T* from = query.at(chunk.row, kv_head * groups + g);
      for (int64_t d = 0; d < n_width; ++d) queries[g * n_width + d] = from[d] * scale;
      T* out = part(index, kv_head * groups + g);
      std::fill_n(out, n_width + 2, T(0));
      out[0] = LOWEST<T>;
    }
    for (int64_t k = chunk.first; k < chunk.last; ++k) {
      const int64_t of = chunk.row * most + k, n = count[of];
      if (n == 0) continue;
      const int32_t* places = live + of * page;
      const int64_t base = (table[of] * kv_heads + kv_head) * page * n_width;
      for (int64_t g = 0; g < groups; ++g)
        add<WIDTH>(keys + base, values + base, places, n, queries + g * n_width, weights,
                   part(index, kv_head * groups + g));
    }
  }

  // The running softmax of one query takes in the live slots of a page.
  template <int WIDTH>
  void add(const T* page_keys, const T* page_values, const int32_t* places, int64_t n, const T* one, T* weights,
           T* out) const {
    const int64_t n_width = WIDTH ? WIDTH : width;
    T top = out[0];
    for (int64_t i = 0; i < n; ++i) {
      fetch(page_values + places[i] * n_width, n_width);
      if (i + AHEAD < n) fetch(page_keys + places[i + AHEAD] * n_width, n_width);
      weights[i] = dot<WIDTH>(one, page_keys + places[i] * n_width, n_width);
      top = weights[i] > top ? weights[i] : top;
    }
    const T less = exponential(out[0] - top);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = exponential(weights[i] - top);
      sum += weights[i];
    }
    out[0] = top;
    out[1] = out[1] * less + sum;
    T* __restrict seen = out + 2;
    if (less != T(1))
      for (int64_t d = 0; d < n_width; ++d) seen[d] *= less;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const T *__restrict a = page_values + places[i] * n_width, *__restrict b = page_values + places[i + 1] * n_width;
      const T *__restrict c = page_values + places[i + 2] * n_width,
              *__restrict e = page_values + places[i + 3] * n_width;
      const T p = weights[i], q = weights[i + 1], r = weights[i + 2], s = weights[i + 3];
      for (int64_t d = 0; d < n_width; ++d) seen[d] += (p * a[d] + q * b[d]) + (r * c[d] + s * e[d]);
    }
    for (; i < n; ++i) {
      const T* __restrict a = page_values + places[i] * n_width;
      for (int64_t d = 0; d < n_width; ++d) seen[d] += weights[i] * a[d];
    }
  }

  // The output of one head: its row's chunks put together.
  void combine(int64_t r, int64_t head, const Row& row) const {
    T* out = output + (r * heads + head) * width;
    T top = LOWEST<T>, sum = 0;
    for (int64_t c = row.first_chunk; c < row.first_chunk + row.chunks; ++c) top = std::max(top, part(c, head)[0]);
    std::fill_n(out, width, T(0));
    for (int64_t c = row.first_chunk; c < row.first_chunk + row.chunks; ++c) {
      const T* from = part(c, head);
      const T weight = exponential(from[0] - top);
      sum += weight * from[1];
      for (int64_t d = 0; d < width; ++d) out[d] += weight * from[2 + d];
    }
    for (int64_t d = 0; d < width; ++d) out[d] /= sum;
  }
};

template <typename T>
void run(Step<T>& s, const std::vector<Row>& rows, const std::vector<Chunk>& chunks, int32_t* free) {
  static thread_local std::vector<int32_t> integers;
  static thread_local std::vector<T> numbers;
  const int64_t pages = s.rows * s.most, n_chunks = static_cast<int64_t>(chunks.size());
  s.live = scratch(integers, pages * (s.page + 2));
  s.count = s.live + pages * s.page;
  s.dead = s.count + pages;
  s.parts = scratch(numbers, n_chunks * s.heads * (s.width + 2));
  int64_t slots = 0;
  for (const Row& row : rows) slots += row.slots;
  each(n_chunks, slots * s.rank, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const Row& row = rows[chunk.row];
    if (chunk.first <= row.rank && row.rank < chunk.last) s.store(chunk.row, row);
    s.list(chunk, row);
  });
  each(n_chunks * s.kv_heads, slots * s.kv_heads * s.width, [&](int64_t i) {
    const int64_t index = i / s.kv_heads, head = i % s.kv_heads;
    const Chunk& chunk = chunks[index];
    if (s.width == 64)
      s.template attend<64>(index, chunk, head);
    else if (s.width == 128)
      s.template attend<128>(index, chunk, head);
    else
      s.template attend<0>(index, chunk, head);
  });
  each(s.rows * s.heads, n_chunks * s.heads * s.width, [&](int64_t i) {
    const int64_t r = i / s.heads, head = i % s.heads;
    if (rows[r].alive)
      s.combine(r, head, rows[r]);
    else  // an idle row has nothing to say; one without room must not go unnoticed
      std::fill_n(s.output + i * s.width, s.width, rows[r].now < 0 ? T(0) : std::numeric_limits<T>::quiet_NaN());
  });
  for (int64_t r = 0; free && r < s.rows; ++r) {
    if (!rows[r].alive) continue;
    free[r] = -1;
    for (int64_t k = 0; k * s.page < rows[r].slots && free[r] < 0; ++k)
      if (s.dead[r * s.most + k] >= 0) free[r] = static_cast<int32_t>(k * s.page + s.dead[r * s.most + k]);
  }
}

}  // namespace
