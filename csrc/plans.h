// Launch plans: tile sizes, grid sizes and split factors as pure functions of shapes, element size and multiprocessor
// count. Neither torch nor CUDA is needed, so the tests call them on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "pyramid.h"

namespace gsto::cuda {

constexpr int kThreads = 128;    // of every kernel
constexpr int kTilePixels = 64;  // of every tile of pixels
constexpr int kTileRows = 64;    // output channels per product tile
constexpr int kMaxLevels = 16;   // of a pyramid
constexpr int kMaxCuts = 128;    // of a pyramid, per axis
constexpr int kMaxTerms = 8;     // of a sum
constexpr int kMaxGates = 8;     // of a split

// Blocks of 128 threads that a multiprocessor holds at a time: the products' register limit.
constexpr int kResident = 3;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a kernel whose blocks take tile after tile, because each of them ends with a row of partial sums: two
// rounds of all multiprocessors, for balance; the sums then are a few percent of the traffic.
inline int persistent_blocks(int64_t tiles, int sms) {
  return static_cast<int>(std::min<int64_t>(tiles, int64_t{2} * kResident * sms));
}

// Row tiles (64 output channels) that one block of a product takes in turn: all of them, as the later ones find the
// pixels in L1, unless that leaves multiprocessors idle.
inline int row_tiles_per_block(int64_t pixel_tiles, int rows, int sms) {
  const int64_t row_tiles = std::max<int64_t>(1, ceil_div(rows, kTileRows));
  const int64_t groups = ceil_div(int64_t{kResident} * sms, std::max<int64_t>(1, pixel_tiles));
  return static_cast<int>(ceil_div(row_tiles, std::min(row_tiles, groups)));
}

// Whether the backward of the projection keeps du of 64 pixels in shared memory: 50 KiB at 192 channels, so that two
// blocks fit with their operands. Above, du takes the way through grad_input.
inline bool fuses_project_backward(int channels) { return channels <= 192; }

// The pixels of a call as `images` rows of `pixels`. With channels_last all images are one long row, so that no tile is
// cut at an image's end, as long as 32-bit positions can number it.
struct PixelRows {
  int64_t images, pixels;
};

inline PixelRows pixel_rows(int64_t batch, int64_t pixels, bool channels_last) {
  if (!channels_last || batch == 0 || batch * pixels >= (int64_t{1} << 31) - kTilePixels) return {batch, pixels};
  return {1, batch * pixels};
}

// Images that an operator of two passes takes at a time, so that the map between the passes stays in L2 (50 MB on an
// H200, 40 MB on an A100) and its workspace, which all of them share, is overwritten there before it is ever written to
// DRAM.
inline int64_t images_per_chunk(int64_t batch, int64_t bytes_per_image, int64_t chunk_bytes) {
  return std::clamp<int64_t>(chunk_bytes / std::max<int64_t>(1, bytes_per_image), 1, std::max<int64_t>(1, batch));
}

struct SplitPlan {
  int splits = 1;  // per image
  int64_t split_pixels = 32;
};

// Ranges of pixels over which a weight gradient is split: enough blocks for two rounds, at least 256 pixels each (the
// tile of partial sums that a range writes is as large as 128 pixels of its operands), and at most 64 MiB of partial
// sums.
inline SplitPlan plan_weight_gradient(int64_t batch, int64_t pixels, int channels, int out_channels, int sms) {
  const int64_t tiles = ceil_div(channels, kTileRows) * ceil_div(out_channels, kTileRows);
  const int64_t row_bytes = 4 * (int64_t{channels} * out_channels + out_channels);
  const int64_t wanted = std::min(ceil_div(int64_t{2} * kResident * sms, tiles), (int64_t{64} << 20) / row_bytes);
  const int64_t per_image = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(1, batch)), 1,
                                                std::max<int64_t>(1, ceil_div(pixels, 256)));
  SplitPlan plan;
  plan.split_pixels = std::max<int64_t>(1, ceil_div(ceil_div(pixels, per_image), 32)) * 32;  // whole steps of k
  plan.splits = static_cast<int>(ceil_div(pixels, plan.split_pixels));
  return plan;
}

// Address of element (image, channel, pixel) of a dense map.
template <bool kChannelsLast>
GSTO_HOST_DEVICE int64_t offset_of(int64_t image, int channels, int64_t pixels, int channel, int64_t pixel) {
  return kChannelsLast ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
}

// How the pixels of a map are cut into tiles: of at most 64, tile_width being a power of two, but for those of a sum.
struct Tiling {
  int height = 1, width = 1;  // of the map
  int tile_height = 1, tile_width = 1;
};

GSTO_HOST_DEVICE int tiles_of(const Tiling& t) {
  return (t.height + t.tile_height - 1) / t.tile_height * ((t.width + t.tile_width - 1) / t.tile_width);
}

struct TapPlan {
  Tiling tiling;
  int row_taps = 1, col_taps = 1;
  int region_pixels = 0;  // gate_resample: most inputs of a tile
  bool fits = true;
};

// The narrowest legal tile: a 16-byte unit of an NCHW map lies in one row.
inline int narrowest(bool channels_last, int element_size) { return channels_last ? 1 : 16 / element_size; }

inline int64_t tap_bytes(const TapPlan& plan) {
  return 4 * (int64_t{plan.tiling.tile_height} * (plan.row_taps + 2) +
              int64_t{plan.tiling.tile_width} * (plan.col_taps + 2));
}

// channels_last tiles are square, for little overlap between the taps of neighbours; NCHW tiles are wide, for long
// rows.
inline Tiling starting_tile(int height, int width, bool channels_last, int element_size) {
  Tiling t{height, width, 1, channels_last ? 8 : 32};
  while (t.tile_width > narrowest(channels_last, element_size) && t.tile_width / 2 >= width) t.tile_width /= 2;
  while (t.tile_height < height && t.tile_height * t.tile_width < kTilePixels) t.tile_height *= 2;
  while (t.tile_width < width && t.tile_height * t.tile_width < kTilePixels) t.tile_width *= 2;
  return t;
}

inline bool shrink(Tiling& t, bool rows_first, int least_width) {
  if (t.tile_height > 1 && (rows_first || t.tile_width / 2 < least_width)) {
    t.tile_height /= 2;
  } else if (t.tile_width / 2 >= least_width) {
    t.tile_width /= 2;
  } else {
    return false;
  }
  return true;
}

// Tiles of the results of a resampling, or with `transposed` of its inputs: tap tables stay under 32 KiB. Identities
// are one row.
inline TapPlan plan_resample(const Axis& rows, const Axis& cols, bool transposed, bool channels_last,
                             int element_size) {
  TapPlan plan;
  plan.row_taps = longest_run(rows, transposed);
  plan.col_taps = longest_run(cols, transposed);
  plan.tiling =
      starting_tile(transposed ? rows.in : rows.out, transposed ? cols.in : cols.out, channels_last, element_size);
  while (tap_bytes(plan) > (32 << 10) &&
         shrink(plan.tiling, plan.row_taps * plan.tiling.tile_height > plan.col_taps * plan.tiling.tile_width,
                narrowest(channels_last, element_size))) {
  }
  plan.fits = tap_bytes(plan) <= (96 << 10);
  return plan;
}

// Tiles of the results of gate + resampling. The inputs of a tile are read twice: 48 KiB of them leave the second
// reading to L1. It fits when the gates of the smallest tile take at most 32 KiB of shared memory.
inline TapPlan plan_gate_resample(const Axis& rows, const Axis& cols, int channels, bool channels_last,
                                  int element_size) {
  TapPlan plan = plan_resample(rows, cols, false, channels_last, element_size);
  const auto region = [&] {
    return int64_t{longest_region(rows, plan.tiling.tile_height)} * longest_region(cols, plan.tiling.tile_width);
  };
  while (region() * channels * element_size > (48 << 10) &&
         shrink(plan.tiling, plan.tiling.tile_height >= plan.tiling.tile_width || !channels_last,
                narrowest(channels_last, element_size))) {
  }
  plan.fits = plan.fits && region() <= 8192;
  plan.region_pixels = static_cast<int>(std::min<int64_t>(region(), 8192));
  return plan;
}

// The most elements, 16 bytes of them at most, that can be moved at once where rows of so many of them, or a whole
// number of `folds` of rows, lie behind each other from addresses of this alignment. 4 bytes is the next choice: a warp
// still moves 128 bytes.
inline int widest_unit(int64_t row, int64_t folds, int element_size, int alignment) {
  for (const int width : {16 / element_size, 4 / element_size}) {
    const int64_t fold = width / std::gcd<int64_t>(width, row);
    if (alignment % (width * element_size) == 0 && folds % fold == 0 && (fold == 1 || row >= width)) return width;
  }
  return 1;
}

// Elementwise kernels: what they ask of the multiprocessors, and the rows that a thread loads before it uses them.
// 5 x 128 threads x 4 units of 16 bytes = 40 KiB in flight per multiprocessor and map, where DRAM asks for 22 KiB.
constexpr int kStripResident = 5;
constexpr int kSumResident = 4;  // of kernels that keep sums, 128 registers
constexpr int kStripBatch = 4;

// How the elementwise kernels walk dense maps: as rows of units of `width` elements. channels_last: a row is `fold`
// pixels, as many as make its units whole (4 for 18 channels of 2 bytes), and a block takes `group_units` of each of
// its rows. NCHW: a row is one unit of the planes of one channel, which is the block's.
struct StripPlan {
  int width = 1, fold = 1;
  int row_units = 1;           // units of a row, or (NCHW) of a plane
  int group_units = 1;         // of them, those of a block; NCHW: 1
  int groups = 1;              // blocks side by side; NCHW: the channels
  int64_t rows = 0, span = 1;  // all rows, and a block's
  int blocks = 0;              // per group
};

GSTO_HOST_DEVICE int pass_rows(const StripPlan& plan) { return kThreads / plan.group_units; }

// `blocks`: how many of them in all are wanted.
inline StripPlan plan_strips(int64_t batch, int channels, int64_t pixels, bool channels_last, int element_size,
                             int alignment, int64_t blocks) {
  StripPlan plan;
  if (channels_last) {
    plan.width = widest_unit(channels, batch * pixels, element_size, alignment);
    plan.fold = plan.width / std::gcd(plan.width, channels);
    plan.row_units = channels * plan.fold / plan.width;
    const int most = std::min(kThreads, 256 / plan.width);  // 256 columns' parameters are in shared memory
    plan.group_units = static_cast<int>(ceil_div(plan.row_units, ceil_div(plan.row_units, most)));
    plan.groups = static_cast<int>(ceil_div(plan.row_units, plan.group_units));
    plan.rows = batch * pixels / plan.fold;
  } else {
    plan.width = widest_unit(pixels, 1, element_size, alignment);
    plan.row_units = static_cast<int>(pixels / plan.width);
    plan.groups = channels;
    plan.rows = batch * plan.row_units;
  }
  const int64_t step = int64_t{kStripBatch} * pass_rows(plan);
  plan.span =
      std::max<int64_t>(1, ceil_div(ceil_div(plan.rows, std::max<int64_t>(1, blocks / plan.groups)), step)) * step;
  plan.blocks = static_cast<int>(ceil_div(plan.rows, plan.span));
  return plan;
}

// Tiles of a sum of resampled maps: a thread takes `run` neighbours of a row at a time, for which it interpolates every
// source column once. NCHW tiles are wide, for long rows.
struct SumTilePlan {
  Tiling tiling;
  int width = 1, run = 1;
  int group = 1, groups = 1;  // units of channels (NCHW: channels) of a block, and blocks side by side
};

inline SumTilePlan plan_sum_tile(int channels, int height, int width, bool channels_last, int element_size,
                                 int alignment) {
  SumTilePlan plan;
  plan.width = widest_unit(channels_last ? channels : width, 1, element_size, alignment);
  plan.run = channels_last ? 4 : plan.width;
  const int units = channels_last ? channels / plan.width : channels;
  const int most = channels_last ? std::min(kThreads, 256 / plan.width) : 16;
  plan.group = static_cast<int>(ceil_div(units, ceil_div(units, most)));
  plan.groups = static_cast<int>(ceil_div(units, plan.group));
  const int row = static_cast<int>(std::min<int64_t>(channels_last ? 16 : 64, ceil_div(width, plan.run) * plan.run));
  plan.tiling = {height, width, std::min(height, (channels_last ? 128 : 512) / row), row};
  return plan;
}

// Windows of all pyramid levels cut the axes; a cell between cuts lies inside or outside of every window.
struct Pyramid {
  int levels = 0;
  int bins_h[kMaxLevels] = {}, bins_w[kMaxLevels] = {};
  int row_cuts = 0, col_cuts = 0;  // cells per axis
  int rows[kMaxCuts + 1] = {}, cols[kMaxCuts + 1] = {};
  int bands = 1;  // tiles per cell: bands of its rows
  int total_bins = 0;
  int step_pixels = kTilePixels;  // pixels between the first and the second reading of x
};

// The number of cells, or 0 when they are too many.
inline int cut_axis(int length, const int* bins, int levels, int* cuts) {
  const std::vector<int64_t> found = gsto::cut_axis(length, std::vector<int64_t>(bins, bins + levels));
  if (found.size() > kMaxCuts + 1) return 0;
  std::transform(found.begin(), found.end(), cuts, [](int64_t cut) { return static_cast<int>(cut); });
  return static_cast<int>(found.size()) - 1;
}

// False when the windows have more than 128 cells along an axis.
inline bool plan_pyramid(Pyramid& pyramid, int64_t batch, int channels, int height, int width, int element_size,
                         int sms) {
  pyramid.row_cuts = cut_axis(height, pyramid.bins_h, pyramid.levels, pyramid.rows);
  pyramid.col_cuts = cut_axis(width, pyramid.bins_w, pyramid.levels, pyramid.cols);
  if (pyramid.row_cuts == 0 || pyramid.col_cuts == 0) return false;
  pyramid.total_bins = 0;
  for (int k = 0; k < pyramid.levels; ++k) pyramid.total_bins += pyramid.bins_h[k] * pyramid.bins_w[k];
  // Two rounds of blocks, if the cells' height allows.
  const int64_t cells = std::max<int64_t>(1, batch * pyramid.row_cuts * pyramid.col_cuts);
  pyramid.bands =
      static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{8} * sms, cells), 1, ceil_div(height, pyramid.row_cuts)));
  // 64 KiB of x between the two readings: with four blocks on each of 132 multiprocessors 34 MB, which L2 holds.
  pyramid.step_pixels = kTilePixels;
  while (pyramid.step_pixels > 16 && int64_t{pyramid.step_pixels} * channels * element_size > (64 << 10))
    pyramid.step_pixels /= 2;
  return true;
}

}  // namespace gsto::cuda
