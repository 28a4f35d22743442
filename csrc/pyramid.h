// The cells of a pyramid of adaptive average poolings, on the host. Cut an axis where the windows of any level begin or
// end: then every cell between neighbouring cuts lies wholly inside or outside of each window. No torch header.
#pragma once

#include <algorithm>
#include <vector>

#include "axis.h"

namespace gsto {

// Cell i is [cuts[i], cuts[i + 1]). `parts` cuts the axis into more cells, so that threads find work.
inline std::vector<int64_t> cut_axis(int64_t length, const std::vector<int64_t>& bins, int64_t parts = 1) {
  std::vector<int64_t> cuts;
  for (int64_t i = 0; i <= parts; ++i) cuts.push_back(i * length / parts);
  for (const int64_t count : bins) {
    for (int64_t b = 0; b < count; ++b) {
      cuts.push_back(window_begin(b, count, length));
      cuts.push_back(window_end(b, count, length));
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

}  // namespace gsto
