// Which slots can the next tokens of a row take? Looked up for many steps at once, so that no step has to search.
#pragma once

#include <cstdint>

namespace {

// Of one row's slots along its table: those never used, and behind them those of keys dropped before step `now`; the
// first `ahead` of these into `slots`, and how many there are.
inline int64_t takeable(const int32_t* table, int64_t most, int64_t page, int64_t used, const int32_t* drop_times,
                        int32_t now, int64_t ahead, int64_t* slots) {
  int64_t given = 0, count = 0;
  while (given < most && table[given] >= 0) ++given;
  const auto take = [&](int64_t slot) {
    if (count < ahead) slots[count] = slot;
    ++count;
  };
  for (int64_t slot = used; slot < given * page; ++slot) take(slot);
  for (int64_t k = 0; k < given && k * page < used; ++k) {
    const int32_t* times = drop_times + table[k] * page;
    for (int64_t i = 0; i < page && k * page + i < used; ++i)
      if (times[i] < now) take(k * page + i);
  }
  return count;
}

}  // namespace
