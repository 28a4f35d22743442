// The launch plans of the CUDA kernels as Python functions that return dicts, for the tests; no GPU and no CUDA build
// needed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "plans.h"

namespace gsto::cuda {

namespace py = pybind11;

inline Axis axis_from(int64_t in, int64_t out, const std::string& mode, bool align_corners, double scale) {
  if (in < 1 || out < 1)
    throw py::value_error("sizes must be positive, got " + std::to_string(in) + " and " + std::to_string(out));
  if (mode != "bilinear" && mode != "avg" && mode != "nearest")
    throw py::value_error("mode must be bilinear, avg or nearest, got '" + mode + "'");
  const ResampleMode kind = mode == "avg"       ? ResampleMode::kAvg
                            : mode == "nearest" ? ResampleMode::kNearest
                                                : ResampleMode::kBilinear;
  return make_axis(in, out, kind, align_corners, scale);
}

inline py::dict to_dict(const TapPlan& plan) {
  py::dict d;
  d["tile"] = py::make_tuple(plan.tiling.tile_height, plan.tiling.tile_width);
  d["tiles"] = tiles_of(plan.tiling);
  d["taps"] = py::make_tuple(plan.row_taps, plan.col_taps);
  d["region_pixels"] = plan.region_pixels;
  d["table_bytes"] = tap_bytes(plan);
  d["fits"] = plan.fits;
  return d;
}

inline void bind_plans(py::module_& m) {
  m.def(
      "axis_taps",
      [](int64_t in, int64_t out, const std::string& mode, bool align_corners, double scale) {
        const Axis axis = axis_from(in, out, mode, align_corners, scale);
        py::list all;
        for (int o = 0; o < axis.out; ++o) {
          const Taps<float> taps = taps_of(axis, o);
          all.append(py::make_tuple(taps.start, taps.count, taps.first, taps.rest));
        }
        return all;
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("mode"), py::arg("align_corners") = false,
      py::arg("scale") = 0.0,
      "Per output of a resampled axis: (first input, inputs, weight of the first, weight of each other).");
  m.def(
      "map_offset",
      [](int64_t image, int channels, int64_t pixels, int channel, int64_t pixel, bool channels_last) {
        return channels_last ? offset_of<true>(image, channels, pixels, channel, pixel)
                             : offset_of<false>(image, channels, pixels, channel, pixel);
      },
      py::arg("image"), py::arg("channels"), py::arg("pixels"), py::arg("channel"), py::arg("pixel"),
      py::arg("channels_last"), "Where the CUDA kernels find an element of a dense map.");
  m.def(
      "plan_pixel_rows",
      [](int64_t batch, int64_t pixels, bool channels_last) {
        const PixelRows rows = pixel_rows(batch, pixels, channels_last);
        return py::make_tuple(rows.images, rows.pixels);
      },
      py::arg("batch"), py::arg("pixels"), py::arg("channels_last"));
  m.def("plan_images_per_chunk", &images_per_chunk, py::arg("batch"), py::arg("bytes_per_image"),
        py::arg("chunk_bytes"));
  m.def(
      "axis_readers",
      [](int64_t in, int64_t out, const std::string& mode, bool align_corners, double scale) {
        const Axis axis = axis_from(in, out, mode, align_corners, scale);
        py::list all;
        for (int i = 0; i < axis.in; ++i) {
          int begin = 0, end = 0;
          readers_of(axis, i, begin, end);
          all.append(py::make_tuple(begin, end));
        }
        return all;
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("mode"), py::arg("align_corners") = false,
      py::arg("scale") = 0.0, "Per input of a resampled axis: the range of outputs that read it.");
  m.def(
      "plan_resample",
      [](std::pair<int64_t, int64_t> in, std::pair<int64_t, int64_t> out, const std::string& mode, bool align_corners,
         bool transposed, bool channels_last, int element_size) {
        return to_dict(plan_resample(axis_from(in.first, out.first, mode, align_corners, 0),
                                     axis_from(in.second, out.second, mode, align_corners, 0), transposed,
                                     channels_last, element_size));
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("mode"), py::kw_only(), py::arg("align_corners") = false,
      py::arg("transposed") = false, py::arg("channels_last") = true, py::arg("element_size") = 2);
  m.def(
      "plan_gate_resample",
      [](std::pair<int64_t, int64_t> in, std::pair<int64_t, int64_t> out, const std::string& mode, int channels,
         bool channels_last, int element_size) {
        return to_dict(plan_gate_resample(axis_from(in.first, out.first, mode, false, 0),
                                          axis_from(in.second, out.second, mode, false, 0), channels, channels_last,
                                          element_size));
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("mode"), py::arg("channels"), py::kw_only(),
      py::arg("channels_last") = true, py::arg("element_size") = 2);
  m.def(
      "plan_project",
      [](int64_t pixels, int out_channels, int sms) {
        py::dict d;
        const int64_t tiles = ceil_div(pixels, kTilePixels);
        d["tiles"] = tiles;
        d["row_tiles_per_block"] = row_tiles_per_block(tiles, out_channels, sms);
        d["blocks"] =
            tiles * ceil_div(ceil_div(out_channels, kTileRows), row_tiles_per_block(tiles, out_channels, sms));
        return d;
      },
      py::arg("pixels"), py::arg("out_channels"), py::arg("sms"));
  m.def(
      "plan_project_backward",
      [](int64_t pixels, int channels, int sms) {
        py::dict d;
        d["fused"] = fuses_project_backward(channels);
        d["blocks"] = persistent_blocks(ceil_div(pixels, kTilePixels), sms);
        return d;
      },
      py::arg("pixels"), py::arg("channels"), py::arg("sms"));
  m.def(
      "plan_weight_gradient",
      [](int64_t batch, int64_t pixels, int channels, int out_channels, int sms) {
        const SplitPlan plan = plan_weight_gradient(batch, pixels, channels, out_channels, sms);
        py::dict d;
        d["splits"] = plan.splits;
        d["split_pixels"] = plan.split_pixels;
        d["workspace_bytes"] = 4 * batch * plan.splits * (int64_t{channels} * out_channels + out_channels);
        return d;
      },
      py::arg("batch"), py::arg("pixels"), py::arg("channels"), py::arg("out_channels"), py::arg("sms"));
  m.def(
      "plan_strips",
      [](int64_t batch, int channels, int64_t pixels, bool channels_last, int element_size, int alignment,
         int64_t blocks) {
        const StripPlan plan = plan_strips(batch, channels, pixels, channels_last, element_size, alignment, blocks);
        py::dict d;
        d["width"] = plan.width;
        d["fold"] = plan.fold;
        d["row_units"] = plan.row_units;
        d["group_units"] = plan.group_units;
        d["groups"] = plan.groups;
        d["rows"] = plan.rows;
        d["span"] = plan.span;
        d["blocks"] = plan.blocks;
        d["pass_rows"] = pass_rows(plan);
        return d;
      },
      py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::kw_only(), py::arg("channels_last") = true,
      py::arg("element_size") = 2, py::arg("alignment") = 16, py::arg("blocks") = 132 * kSumResident);
  m.def(
      "plan_sum_tile",
      [](int channels, int height, int width, bool channels_last, int element_size, int alignment) {
        const SumTilePlan plan = plan_sum_tile(channels, height, width, channels_last, element_size, alignment);
        py::dict d;
        d["tile"] = py::make_tuple(plan.tiling.tile_height, plan.tiling.tile_width);
        d["width"] = plan.width;
        d["run"] = plan.run;
        d["group"] = plan.group;
        d["groups"] = plan.groups;
        return d;
      },
      py::arg("channels"), py::arg("height"), py::arg("width"), py::kw_only(), py::arg("channels_last") = true,
      py::arg("element_size") = 2, py::arg("alignment") = 16);
  m.def(
      "plan_pyramid",
      [](int64_t batch, int channels, int height, int width, const std::vector<int>& bins, int element_size, int sms) {
        if (bins.empty() || bins.size() > kMaxLevels)
          throw py::value_error("bins must have 1 to " + std::to_string(kMaxLevels) + " entries, got " +
                                std::to_string(bins.size()));
        Pyramid p;
        p.levels = static_cast<int>(bins.size());
        for (size_t k = 0; k < bins.size(); ++k) p.bins_h[k] = p.bins_w[k] = bins[k];
        py::dict d;
        d["fits"] = plan_pyramid(p, batch, channels, height, width, element_size, sms);
        d["rows"] = std::vector<int>(p.rows, p.rows + p.row_cuts + 1);
        d["cols"] = std::vector<int>(p.cols, p.cols + p.col_cuts + 1);
        d["bands"] = p.bands;
        d["step_pixels"] = p.step_pixels;
        d["total_bins"] = p.total_bins;
        return d;
      },
      py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("bins"), py::kw_only(),
      py::arg("element_size") = 2, py::arg("sms") = 132);
}

}  // namespace gsto::cuda
