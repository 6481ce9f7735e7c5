// What does a CPU compute when several tokens at once have joined rows that have context? Every key is read once.
//
// The tokens are stored already. A row's table is cut into chunks as in native_math.h. First every chunk asks the gates
// of all queries and lists who is seen by any; then every chunk and key/value head attends, page by page, LANES queries
// at a time (native_tile.h). A query's bits depend on its row alone, neither on the other queries nor on the number of
// threads.
#pragma once

#include "native_math.h"
#include "native_tile.h"

namespace {

// The queries of one row: how many, and where its lists of columns and steps begin.
struct Asking {
  int64_t count = 0, slots = 0, first_chunk = 0, chunks = 0, first_part = 0;
};

template <typename T>
struct Extend {
  const T* query;  // strides of row, head and token below
  int64_t query_row, query_head, query_token;
  const T* gate_query;  // (rows, n, rank) in one piece; null without gates
  T beta;
  const T *keys, *values, *gate_keys;
  int32_t* drop_times;
  const int32_t *guards, *positions, *table;
  int64_t rows, heads, kv_heads, n, width, rank, page, most;
  T scale;
  T* output;
  std::vector<int32_t> columns, steps;  // (rows, n): of the queries that are no padding
  std::vector<Asking> asking;
  std::vector<Chunk> chunks;
  Seen* seen;       // of every page of every row
  int32_t* counts;  // how many these are
  int32_t* partly;  // and how many of them some query of the row does not see
  T* parts;         // per chunk, head and query: largest logit, sum of weights, weighted values

  void list(const Chunk& chunk) const {
    const Asking& row = asking[chunk.row];
    const int32_t* now = steps.data() + chunk.row * n;
    for (int64_t k = chunk.first; k < chunk.last; ++k) {
      const int64_t of = chunk.row * most + k, base = table[of] * page;
      const int64_t end = table[of] < 0 ? 0 : std::min(page, row.slots - k * page);
      Seen* found = seen + of * page;
      int64_t kept = 0, part_seen = 0;
      for (int64_t i = 0; i < end; ++i) {
        const int32_t at = positions[base + i];
        if (at < 0 || drop_times[base + i] <= now[0]) continue;
        if (gate_query) gate(chunk.row, row.count, now, base + i);
        int64_t from = 0, to = row.count;
        while (from < to && now[from] < at) ++from;
        while (from < to && now[to - 1] >= drop_times[base + i]) --to;
        if (from == to) continue;
        found[kept++] = {int32_t(i), int32_t(from), int32_t(to)};
        part_seen += from > 0 || to < row.count;
      }
      counts[of] = static_cast<int32_t>(kept);
      partly[of] = static_cast<int32_t>(part_seen);
    }
  }

  // The first of the row's gates that drops this key, before it is gone anyway.
  void gate(int64_t r, int64_t count, const int32_t* now, int64_t slot) const {
    const T over = T(1) / std::sqrt(T(rank));
    for (int64_t q = 0; q < count && now[q] < drop_times[slot]; ++q) {
      const T* mine = gate_query + (r * n + columns[r * n + q]) * rank;
      if (guards[slot] <= now[q] && dot<0>(mine, gate_keys + slot * rank, rank) * over + beta <= 0)
        drop_times[slot] = now[q];
    }
  }

  T* part(const Chunk& chunk, int64_t index, int64_t head, int64_t q) const {
    const Asking& row = asking[chunk.row];
    const int64_t mine = row.first_part + ((index - row.first_chunk) * heads + head) * row.count + q;
    return parts + mine * (width + 2);
  }

  // One key/value head of one chunk, for all queries of all query heads that share it.
  template <int WIDTH>
  void attend(int64_t index, const Chunk& chunk, int64_t kv_head) const {
    static thread_local std::vector<T> held;
    const Asking& row = asking[chunk.row];
    const int64_t n_width = WIDTH ? WIDTH : width, groups = heads / kv_heads, asked = groups * row.count;
    const int64_t lanes = (asked + LANES - 1) / LANES * LANES;
    T* scaled = scratch(held, lanes * (2 * n_width + 2) + page * LANES * (1 + FOLDED));
    T *out = scaled + lanes * n_width, *top = out + lanes * n_width, *sum = top + lanes, *weights = sum + lanes;
    std::fill_n(scaled, 2 * lanes * n_width, T(0));
    std::fill_n(top, lanes, LOWEST<T>);
    std::fill_n(sum, lanes, T(0));
    for (int64_t j = 0; j < asked; ++j) {
      const int64_t head = kv_head * groups + j / row.count, column = columns[chunk.row * n + j % row.count];
      const T* from = query + chunk.row * query_row + head * query_head + column * query_token;
      for (int64_t d = 0; d < n_width; ++d) scaled[j * n_width + d] = from[d] * scale;
    }
    const auto first_of = [&](int64_t of) { return (table[of] * kv_heads + kv_head) * page * n_width; };
    for (int64_t k = chunk.first; k < chunk.last; ++k) {
      const int64_t of = chunk.row * most + k;
      if (counts[of] == 0) continue;
      const T* next = k + 1 < chunk.last && counts[of + 1] ? keys + first_of(of + 1) : nullptr;
      const PageOf<T> now{keys + first_of(of), values + first_of(of), seen + of * page, counts[of], partly[of] == 0,
                          next};
      for (int64_t t = 0; t < lanes; t += LANES)
        Tile<T>{n_width, t, std::min(LANES, asked - t), row.count, scaled + t * n_width, top + t, sum + t,
                out + t * n_width, weights, weights + page * LANES}
            .template take<WIDTH>(now, t == 0);
    }
    for (int64_t j = 0; j < asked; ++j) {
      T* to = part(chunk, index, kv_head * groups + j / row.count, j % row.count);
      to[0] = top[j];
      to[1] = sum[j];
      std::copy_n(out + j * n_width, n_width, to + 2);
    }
  }

  // The outputs of one head of one row: its chunks put together.
  void combine(int64_t r, int64_t head) const {
    const Asking& row = asking[r];
    for (int64_t q = 0; q < row.count; ++q) {
      T* out = output + ((r * heads + head) * n + columns[r * n + q]) * width;
      T top = LOWEST<T>, sum = 0;
      const auto from = [&](int64_t c) { return part(chunks[c], c, head, q); };
      for (int64_t c = row.first_chunk; c < row.first_chunk + row.chunks; ++c) top = std::max(top, from(c)[0]);
      for (int64_t c = row.first_chunk; c < row.first_chunk + row.chunks; ++c) {
        const T weight = exponential(from(c)[0] - top);
        sum += weight * from(c)[1];
        for (int64_t d = 0; d < width; ++d) out[d] += weight * from(c)[2 + d];
      }
      for (int64_t d = 0; d < width; ++d) out[d] /= sum;
    }
  }

  // steps_of: (rows, n) with padding, negative; used: slots taken, of every row. The output holds zeros.
  void run(const int32_t* steps_of, const int32_t* used) {
    static thread_local std::vector<Seen> lists;
    static thread_local std::vector<int32_t> integers;
    static thread_local std::vector<T> numbers;
    columns.resize(rows * n);
    steps.resize(rows * n);
    asking.resize(rows);
    const int64_t per = std::max<int64_t>(1, CHUNK / page);
    int64_t all = 0, work = 0;
    for (int64_t r = 0; r < rows; ++r) {
      Asking& row = asking[r];
      for (int64_t i = 0; i < n; ++i)
        if (steps_of[r * n + i] >= 0) {
          columns[r * n + row.count] = static_cast<int32_t>(i);
          steps[r * n + row.count++] = steps_of[r * n + i];
        }
      row.first_chunk = static_cast<int64_t>(chunks.size());
      row.first_part = all;
      row.slots = std::min<int64_t>(used[r], most * page);
      if (row.count == 0) continue;
      const int64_t end = (row.slots + page - 1) / page;
      for (int64_t k = 0; k < end; k += per) chunks.push_back({r, k, std::min(end, k + per)});
      row.chunks = static_cast<int64_t>(chunks.size()) - row.first_chunk;
      all += row.chunks * heads * row.count;
      work += row.slots * row.count;
    }
    seen = scratch(lists, rows * most * page);
    counts = scratch(integers, 2 * rows * most);
    partly = counts + rows * most;
    parts = scratch(numbers, all * (width + 2));
    const auto n_chunks = static_cast<int64_t>(chunks.size());
    each(n_chunks, gate_query ? work * rank : work, [&](int64_t i) { list(chunks[i]); });
    each(n_chunks * kv_heads, work * heads * width, [&](int64_t i) {
      const int64_t index = i / kv_heads, head = i % kv_heads;
      if (width == 64)
        attend<64>(index, chunks[index], head);
      else
        attend<0>(index, chunks[index], head);
    });
    each(rows * heads, all * width, [&](int64_t i) { combine(i / heads, i % heads); });
  }
};

}  // namespace
