// Checks of tensors' values, which the CPU can read before anything is computed.
#pragma once
#include <algorithm>

#include "../operators/checks.h"

namespace mixupe {

inline void check_rows(const char* name, const Vector<int64_t>& rows, int64_t count, int64_t batch) {
  for (int64_t i = 0; rows && i < count; ++i)
    if (rows[i] < 0 || rows[i] >= batch) fail(name, " must be in [0, ", batch - 1, "], got ", rows[i]);
}

inline void check_labels(const char* name, const Vector<int64_t>& labels, int64_t rows, int64_t classes,
                         int64_t ignore_index) {
  for (int64_t i = 0; labels && i < rows; ++i)
    if ((labels[i] < 0 || labels[i] >= classes) && labels[i] != ignore_index)
      fail(name, " must be a class in [0, ", classes - 1, "], got ", labels[i]);
}

template <typename T>
void check_weights(const Vector<T>& lam, int64_t count) {
  for (int64_t i = 0; lam && i < (lam.stride ? count : std::min<int64_t>(count, 1)); ++i)
    if (!(lam[i] >= T(0) && lam[i] <= T(1))) fail("lam must be in [0, 1], got ", shortest(lam[i]));
}

}  // namespace mixupe
