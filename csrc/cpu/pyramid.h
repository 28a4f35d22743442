// The cells of a pyramid of adaptive average poolings. Cut an axis where the windows of any level begin or end: then
// every cell between neighbouring cuts lies wholly inside or outside of each window. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gsto::cpu {

// Window b of `bins` along an axis of this length: adaptive average pooling's rule.
inline int64_t window_begin(int64_t b, int64_t bins, int64_t length) { return b * length / bins; }
inline int64_t window_end(int64_t b, int64_t bins, int64_t length) { return ((b + 1) * length + bins - 1) / bins; }

// Cell i is [cuts[i], cuts[i + 1]). `parts` cuts the axis into more cells, so that threads find work.
inline std::vector<int64_t> cut_axis(int64_t length, const std::vector<int64_t>& bins, int64_t parts) {
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

}  // namespace gsto::cpu
