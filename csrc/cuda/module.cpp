// gsto_ops._CUDA: what Python sees of the CUDA kernels beside the operators, whose registration comes with loading it.
// It is a library of its own because it needs torch's CUDA libraries, without which gsto_ops._C has to load.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/binding.h"
#include "cuda/upsample_cross_entropy.h"

namespace gsto::cuda {

LaunchProbe*& launch_probe() {
  static thread_local LaunchProbe* probe = nullptr;
  return probe;
}

namespace {

namespace py = pybind11;

struct Recorder : LaunchProbe {
  py::list kernels;
  std::string name;

  void see(const void* kernel, int threads, size_t shared_bytes) override {
    cudaFuncAttributes attributes{};
    int blocks = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess && shared_bytes > 48 * 1024)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (error != cudaSuccess) throw std::runtime_error(name + ": " + cudaGetErrorString(error));
    py::dict d;
    d["kernel"] = name;
    d["registers"] = attributes.numRegs;
    d["shared_bytes"] = shared_bytes + attributes.sharedSizeBytes;
    d["local_bytes"] = attributes.localSizeBytes;
    d["binary_version"] = attributes.binaryVersion;
    d["blocks_per_sm"] = blocks;
    kernels.append(d);
  }
};

int element_size(ScalarType dtype) { return dtype == ScalarType::kFloat32 ? 4 : 2; }

template <class Params>
constexpr auto has_batch(int) -> decltype(Params::batch, true) {
  return true;
}
template <class Params>
constexpr bool has_batch(...) {
  return false;
}

// The kernels as a map of 64 channels, projected to 64, launches them.
py::list kernel_attributes() {
  struct Reset {
    ~Reset() { launch_probe() = nullptr; }
  } reset;
  Recorder recorder;
  launch_probe() = &recorder;
  const Axis axis = make_axis(64, 32, ResampleMode::kBilinear, false, 0);
  const TapPlan plan = plan_gate_resample(axis, axis, 64, true, 2);
  const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  for (const ScalarType dtype : {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (const bool channels_last : {false, true}) {
      for (const bool tf32 : {false, true}) {
        if (tf32 && dtype != ScalarType::kFloat32) continue;
        const Format format = {dtype, channels_last, tf32};
        const std::string suffix = std::string("<") + (tf32 ? "tf32" : dtypes[static_cast<int>(dtype)]) +
                                   (channels_last ? ", channels_last>" : ", nchw>");
        const auto run = [&](const char* name, auto launcher, auto params) {
          params.format = format;
          if constexpr (has_batch<decltype(params)>(0)) params.batch = 1;
          params.channels = 64;
          recorder.name = name + suffix;
          launcher(params, nullptr);
        };
        const auto product = [&](auto params) {
          params.pixels = 4096;
          params.out_channels = 64;
          return params;
        };
        ProjectParams project = product(ProjectParams{});
        project.row_tiles_per_block = 1;
        run("project", launch_project, project);
        ProjectBackwardParams backward = product(ProjectBackwardParams{});
        backward.input = &backward;  // not read: it asks for the fused form
        backward.blocks = backward.row_tiles_per_block = 1;
        run("project_backward", launch_project_backward, backward);
        WeightGradientParams weight = product(WeightGradientParams{});
        weight.splits = 1;
        run("weight_gradient", launch_weight_gradient, weight);
        GatedSplitParams split{};
        split.pixels = 4096;
        split.gates = split.projections = split.row_tiles_per_block = 1;
        split.row_begin[1] = 64;
        run("split_project", launch_gated_split, split);
        if (tf32) continue;
        split.projections = 0;
        split.copies = 1;
        run("split_gates", launch_gated_split, split);
        GatedSplitBackwardParams split_backward{};
        split_backward.pixels = 4096;
        split_backward.gates = split_backward.grads = split_backward.blocks = 1;
        run("split_backward", launch_gated_split_backward, split_backward);
        const auto gather = [&](auto params) {
          params.rows = params.cols = axis;
          params.tiling = plan.tiling;
          params.row_taps = plan.row_taps;
          params.col_taps = plan.col_taps;
          return params;
        };
        ResampleParams resample = gather(ResampleParams{});
        resample.blocks = resample.channel_groups = 1;
        run("resample", launch_resample, resample);
        resample.transposed = true;
        run("resample_transposed", launch_resample, resample);
        GateResampleParams gate = gather(GateResampleParams{});
        gate.region_pixels = plan.region_pixels;
        run("gate_resample", launch_gate_resample, gate);
        GateBackwardParams gate_backward = gather(GateBackwardParams{});
        gate_backward.blocks = 1;
        run("gate_backward", launch_gate_backward, gate_backward);
        const StripPlan strips = plan_strips(1, 64, 4096, channels_last, element_size(dtype), 16, 1);
        const auto elementwise = [&](auto params) {
          params.plan = strips;
          params.pixels = 4096;
          return params;
        };
        run("channel_statistics", launch_channel_statistics, elementwise(ChannelStatisticsParams{}));
        run("batch_norm_sum", launch_batch_norm_sum, elementwise(BatchNormSumParams{}));
        run("batch_norm_sum_backward", launch_batch_norm_sum_backward, elementwise(BatchNormSumBackwardParams{}));
        run("batch_norm_sum_terms", launch_batch_norm_sum_terms, elementwise(BatchNormSumTermsParams{}));
        ResampledSumParams sum{};
        sum.tiles = plan_sum_tile(64, 64, 64, channels_last, element_size(dtype), 16);
        run("resampled_sum", launch_resampled_sum, sum);
        PyramidParams pyramid{};
        pyramid.pyramid.levels = 4;
        run("pyramid", launch_pyramid, pyramid);
        PyramidBackwardParams pyramid_backward{};
        pyramid_backward.pyramid.levels = 4;
        pyramid_backward.blocks = 1;
        run("pyramid_backward", launch_pyramid_backward, pyramid_backward);
        if (channels_last) continue;  // the layout is no part of these kernels
        UpsampleCrossEntropyParams loss{};
        loss.rows = loss.cols = axis;
        loss.taps = 3;
        run("upsample_cross_entropy", launch_upsample_cross_entropy, loss);
        UpsampleCrossEntropyBackwardParams gradient{};
        gradient.rows = gradient.cols = axis;
        gradient.channels = kLossClasses;
        plan_loss_backward(gradient);
        run("upsample_cross_entropy_backward", launch_upsample_cross_entropy_backward, gradient);
      }
    }
  }
  return recorder.kernels;
}

}  // namespace
}  // namespace gsto::cuda

PYBIND11_MODULE(_CUDA, m) {
  namespace py = pybind11;
  // torch's own setting, read at every float32 call: compiled graphs and autograd's threads see a change too.
  gsto::cuda::set_tf32_policy(+[] {
    py::gil_scoped_acquire gil;
    return py::module_::import("torch")
               .attr("backends")
               .attr("cuda")
               .attr("matmul")
               .attr("fp32_precision")
               .cast<std::string>() == "tf32";
  });
  m.def("kernel_attributes", &gsto::cuda::kernel_attributes,
        "Registers, shared and local memory, and blocks per multiprocessor of every CUDA kernel on the current GPU.");
}
