// How are the CPU's kernels called from Python? One step looks at types and layouts and chooses slots, for
// native_math.h; several tokens at once, whose types Python has compared, are handed on to native_extend.h; what gates
// ask of a few tokens, to native_gates.h; which slots the next steps can take, to native_slots.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>

#include "native_extend.h"
#include "native_gates.h"
#include "native_math.h"
#include "native_slots.h"

namespace {

using Tensors = std::vector<at::Tensor>;

// The order in which Python hands over a Pages.
enum State { KEYS, VALUES, DROP_TIMES, GUARDS, POSITIONS, TABLE, USED, FREE, REFUSED, GATE_KEYS };

// Where every row's token goes, as the caller says or as `free` and `used` do, which then move on. Fills in `chunks`.
std::vector<Row> placed(const at::Tensor& steps, const Tensors& state, const Tensors& next,
                        std::vector<Chunk>& chunks) {
  const at::Tensor& table = state[TABLE];
  const int64_t most = table.size(1), page = state[KEYS].size(2), pool = state[KEYS].size(0);
  const int64_t per = std::max<int64_t>(1, CHUNK / page);
  const View<int32_t> step(steps);
  int32_t *used = state[USED].data_ptr<int32_t>(), *free = state[FREE].data_ptr<int32_t>();
  std::vector<Row> rows(table.size(0));
  for (int64_t r = 0; r < table.size(0); ++r) {
    Row& row = rows[r];
    const int32_t* pages = table.const_data_ptr<int32_t>() + r * most;
    row.now = *step.at(r);
    if (row.now < 0) continue;
    if (!next.empty()) {
      row.rank = std::find(pages, pages + most, *View<int64_t>(next[0]).at(r)) - pages;
      row.place = *View<int64_t>(next[1]).at(r);
      TORCH_CHECK_INDEX(row.rank < most && row.place >= 0 && row.place < page, "pages.next: not a slot of row ", r);
      row.slots = most * page;
    } else {
      const int64_t slot = free[r] >= 0 ? free[r] : used[r];
      row.rank = slot / page;
      row.place = slot % page;
      if (slot < 0 || slot >= most * page || pages[row.rank] < 0) {
        ++state[REFUSED].data_ptr<int32_t>()[r];
        continue;
      }
      used[r] = std::max(used[r], static_cast<int32_t>(slot + 1));
      row.slots = std::min<int64_t>(used[r], most * page);
    }
    row.alive = true;
    row.first_chunk = static_cast<int64_t>(chunks.size());
    int64_t end = (row.slots + page - 1) / page;
    while (end > row.rank + 1 && pages[end - 1] < 0) --end;
    for (int64_t k = 0; k < end; ++k) TORCH_CHECK_INDEX(pages[k] < pool, "pages.table: no such page, ", pages[k]);
    for (int64_t k = 0; k < end; k += per) chunks.push_back({r, k, std::min(end, k + per)});
    row.chunks = static_cast<int64_t>(chunks.size()) - row.first_chunk;
  }
  return rows;
}

bool are(at::ScalarType type, const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& t) {
    return t.scalar_type() == type && t.is_cpu() && (t.dim() < 2 || t.size(-1) <= 1 || t.stride(-1) == 1);
  });
}

// Where it lies: item() counts as waiting for a device.
double number(const at::Tensor& one) {
  switch (one.scalar_type()) {
    case at::kDouble: return *one.const_data_ptr<double>();
    case at::kFloat: return *one.const_data_ptr<float>();
    default: return one.item<double>();
  }
}

template <typename T>
at::Tensor typed(const Tensors& token, const Tensors& gates, double beta, const Tensors& times, const Tensors& state,
                 const Tensors& next, double scale) {
  const at::Tensor &query = token[0], &keys = state[KEYS];
  at::Tensor output = at::empty(query.sizes(), query.options());
  Step<T> s{.query = View<T>(query),
            .key = View<T>(token[1]),
            .value = View<T>(token[2]),
            .beta = static_cast<T>(beta),
            .guard = View<int32_t>(times[1]),
            .drop_time = View<int32_t>(times[2]),
            .keys = keys.data_ptr<T>(),
            .values = state[VALUES].data_ptr<T>(),
            .drop_times = state[DROP_TIMES].data_ptr<int32_t>(),
            .guards = state[GUARDS].data_ptr<int32_t>(),
            .positions = state[POSITIONS].data_ptr<int32_t>(),
            .table = state[TABLE].const_data_ptr<int32_t>(),
            .rows = query.size(0),
            .heads = query.size(1),
            .kv_heads = keys.size(1),
            .width = query.size(2),
            .page = keys.size(2),
            .most = state[TABLE].size(1),
            .scale = static_cast<T>(scale),
            .output = output.data_ptr<T>()};
  if (!gates.empty()) {
    s.gate_query.emplace(gates[0]);
    s.gate_key.emplace(gates[1]);
    s.gate_keys = state[GATE_KEYS].data_ptr<T>();
    s.rank = gates[0].size(1);
  }
  const pybind11::gil_scoped_release others_may_run;
  std::vector<Chunk> chunks;
  const auto rows = placed(times[0], state, next, chunks);
  run(s, rows, chunks, next.empty() ? state[FREE].data_ptr<int32_t>() : nullptr);
  return output;
}

// The output; nothing, and nothing is changed, where types or layouts are not those that this file is written for.
// token: query, key, value; gates: interaction query, key, beta, or none; times: step, guard, drop time; state: in the
// order above, interaction keys only with gates; next: page and place of every row's token, or none.
std::optional<at::Tensor> step(const Tensors& token, const Tensors& gates, const Tensors& times, const Tensors& state,
                               const Tensors& next, double scale) {
  const auto type = token[0].scalar_type();
  const at::Tensor &query = token[0], &key = token[1], &keys = state[KEYS], &table = state[TABLE];
  const bool numbers = (type == at::kFloat || type == at::kDouble) && are(type, token) &&
                       are(type, {keys, state[VALUES]}) &&
                       (gates.empty() || (are(type, {gates[0], gates[1], state[GATE_KEYS]}) && gates[2].is_cpu()));
  const bool whole = std::all_of(state.begin(), state.end(), [](const at::Tensor& t) { return t.is_contiguous(); });
  const Tensors integers(state.begin() + DROP_TIMES, state.begin() + GATE_KEYS);
  if (!numbers || !whole || !are(at::kInt, integers) || !are(at::kInt, times) || !are(at::kLong, next))
    return std::nullopt;
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && query.size(2) == keys.size(3) && key.size(1) == keys.size(1) &&
                  query.size(1) % key.size(1) == 0 && token[2].sizes() == key.sizes() &&
                  keys.sizes() == state[VALUES].sizes() && key.size(2) == query.size(2),
              "query, key or value do not fit the pages");
  for (const Tensors* group : {&token, &times, &next})
    for (const at::Tensor& t : *group) TORCH_CHECK(t.size(0) == table.size(0), "want one token for each row");
  const double beta = gates.empty() ? 0.0 : number(gates[2]);
  return (type == at::kFloat ? typed<float> : typed<double>)(token, gates, beta, times, state, next, scale);
}

template <typename T>
at::Tensor extended(const at::Tensor& query, const Tensors& gates, const at::Tensor& steps, const Tensors& state,
                    double scale) {
  const at::Tensor &keys = state[KEYS], &table = state[TABLE], &used = state[USED];
  at::Tensor output = at::zeros(query.sizes(), query.options());
  Extend<T> e{};
  e.query = query.const_data_ptr<T>();
  e.query_row = query.stride(0), e.query_head = query.stride(1), e.query_token = query.stride(2);
  e.keys = keys.const_data_ptr<T>(), e.values = state[VALUES].const_data_ptr<T>();
  e.drop_times = state[DROP_TIMES].data_ptr<int32_t>(), e.guards = state[GUARDS].const_data_ptr<int32_t>();
  e.positions = state[POSITIONS].const_data_ptr<int32_t>(), e.table = table.const_data_ptr<int32_t>();
  e.rows = query.size(0), e.heads = query.size(1), e.n = query.size(2), e.width = query.size(3);
  e.kv_heads = keys.size(1), e.page = keys.size(2), e.most = table.size(1);
  e.scale = static_cast<T>(scale), e.output = output.data_ptr<T>();
  if (!gates.empty()) {
    e.gate_query = gates[0].const_data_ptr<T>(), e.gate_keys = state[GATE_KEYS].const_data_ptr<T>();
    e.rank = gates[0].size(2), e.beta = static_cast<T>(number(gates[1]));
  }
  for (int64_t r = 0; r < e.rows; ++r)
    for (int64_t k = 0; k * e.page < std::min<int64_t>(used.const_data_ptr<int32_t>()[r], e.most * e.page); ++k) {
      const int32_t page = e.table[r * e.most + k];
      TORCH_CHECK_INDEX(page >= 0 && page < keys.size(0), "pages.table: no such page, ", page);
    }
  const pybind11::gil_scoped_release others_may_run;
  e.run(steps.const_data_ptr<int32_t>(), used.const_data_ptr<int32_t>());
  return output;
}

// The output for queries (rows, heads, n, width) whose tokens are stored. gates: interaction queries and beta, or none;
// steps: (rows, n); state: as above. Raises where layouts are not those that this file is written for.
at::Tensor extend(const at::Tensor& query, const Tensors& gates, const at::Tensor& steps, const Tensors& state,
                  double scale) {
  const auto type = query.scalar_type();
  const bool whole = std::all_of(state.begin(), state.end(), [](const at::Tensor& t) { return t.is_contiguous(); });
  const Tensors integers(state.begin() + DROP_TIMES, state.begin() + GATE_KEYS);
  const at::Tensor& keys = state[KEYS];
  TORCH_CHECK((type == at::kFloat || type == at::kDouble) && are(type, {query, keys, state[VALUES]}) && whole &&
                  are(at::kInt, integers) && are(at::kInt, {steps}) && steps.is_contiguous(),
              "query, steps or pages have another type or layout");
  TORCH_CHECK(gates.empty() || (are(type, {gates[0], state[GATE_KEYS]}) && gates[0].is_contiguous() &&
                                gates[0].size(0) == query.size(0) && gates[0].size(1) == query.size(2) &&
                                gates[0].size(2) == state[GATE_KEYS].size(2)),
              "interaction queries do not fit the pages");
  TORCH_CHECK(query.dim() == 4 && query.size(3) == keys.size(3) && query.size(1) % keys.size(1) == 0 &&
                  keys.sizes() == state[VALUES].sizes() && query.size(0) == state[TABLE].size(0) &&
                  steps.size(0) == query.size(0) && steps.size(1) == query.size(2),
              "query or steps do not fit the pages");
  return (type == at::kFloat ? extended<float> : extended<double>)(query, gates, steps, state, scale);
}

template <typename T>
void multiplied(const at::Tensor& hidden, const Tensors& weights, const Tensors& to) {
  const auto product = [&](int which) {
    return Product<T>{weights[which].const_data_ptr<T>(), weights[which].size(0), to[which].data_ptr<T>()};
  };
  const int64_t tokens = hidden.size(0) * hidden.size(1);
  multiply(hidden.const_data_ptr<T>(), tokens, hidden.size(2), product(0), product(1));
}

// Interaction queries and keys of hidden (rows, n, width) under their weights (rank, width), and a copy of beta without
// axes; nothing where types or layouts are not those that this file is written for, or the weights are elsewhere.
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> interactions(const at::Tensor& hidden,
                                                                           const at::Tensor& query,
                                                                           const at::Tensor& key,
                                                                           const at::Tensor& beta) {
  const auto type = hidden.scalar_type();
  if ((type != at::kFloat && type != at::kDouble) || hidden.dim() != 3 || beta.numel() != 1) return std::nullopt;
  for (const at::Tensor* t : {&hidden, &query, &key, &beta})
    if (t->scalar_type() != type || !t->is_cpu() || !t->is_contiguous()) return std::nullopt;
  for (const at::Tensor* t : {&query, &key})
    if (t->dim() != 2 || t->size(1) != hidden.size(2)) return std::nullopt;
  const auto room = [&](const at::Tensor& weight) {
    return at::empty({hidden.size(0), hidden.size(1), weight.size(0)}, hidden.options());
  };
  const Tensors to = {room(query), room(key)};
  (type == at::kFloat ? multiplied<float> : multiplied<double>)(hidden, {query, key}, to);
  at::Tensor offset = at::empty({}, beta.options());
  std::memcpy(offset.data_ptr(), beta.const_data_ptr(), beta.element_size());
  return std::make_tuple(to[0], to[1], offset);
}

// For every row, the first `ahead` slots along its table that its next tokens can take, (rows, ahead), and how many such
// slots it has, (rows,): a row with fewer has anything behind them. steps: (rows,), of the next token.
std::tuple<at::Tensor, at::Tensor> takeable_slots(const at::Tensor& steps, const at::Tensor& drop_times,
                                                  const at::Tensor& table, const at::Tensor& used, int64_t ahead) {
  for (const at::Tensor* t : {&drop_times, &table, &used}) TORCH_CHECK(t->is_contiguous(), "pages have another layout");
  TORCH_CHECK(are(at::kInt, {steps, drop_times, table, used}) && steps.size(0) == table.size(0) &&
                  used.size(0) == table.size(0),
              "want one step for each row, and int32 throughout");
  const int64_t rows = table.size(0), most = table.size(1);
  const View<int32_t> step(steps);
  at::Tensor slots = at::empty({rows, ahead}, table.options().dtype(at::kLong));
  at::Tensor counts = at::empty({rows}, slots.options());
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* pages = table.const_data_ptr<int32_t>() + r * most;
    for (int64_t k = 0; k < most; ++k) TORCH_CHECK_INDEX(pages[k] < drop_times.size(0), "no such page, ", pages[k]);
    counts.data_ptr<int64_t>()[r] =
        takeable(pages, most, drop_times.size(1), used.const_data_ptr<int32_t>()[r], drop_times.const_data_ptr<int32_t>(),
                 *step.at(r), ahead, slots.data_ptr<int64_t>() + r * ahead);
  }
  return {slots, counts};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("step", &step);
  m.def("interactions", &interactions);
  m.def("extend", &extend);
  m.def("takeable_slots", &takeable_slots);
}
