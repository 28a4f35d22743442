// torch.ops.gsto_ops.batch_norm_sum and the two passes of its backward on CUDA. The schemas are defined in gsto_ops.
#include <array>

#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

using Tensors = std::vector<Tensor>;

// The batch norms of the terms, or none. Holds the tensors that the kernels' pointers lead to.
class Norms {
 public:
  Norms(const Call& call, size_t terms, const Tensors& mean, const Tensors& variance, const Tensors* weight,
        const Tensors* bias, const std::vector<double>& eps)
      : eps_(eps) {
    const char* names[] = {"mean", "var", "weight", "bias"};
    const Tensors* lists[] = {&mean, &variance, weight, bias};
    for (size_t i = 0; i < 4; ++i) {
      if (lists[i] == nullptr) continue;
      STD_TORCH_CHECK(lists[i]->size() == mean.size(), "gsto_ops::", call.op, ": ", names[i],
                      " must have as many entries as mean, ", mean.size(), ", got ", lists[i]->size());
      for (const Tensor& values : *lists[i]) {
        call.check(names[i], values, {call.channels}, true);
        values_[i].push_back(as_dense(values));
      }
    }
    STD_TORCH_CHECK(mean.empty() || mean.size() == terms, "gsto_ops::", call.op,
                    ": mean, var, weight and bias must have one entry per term (", terms, ") or none, got ",
                    mean.size());
    STD_TORCH_CHECK(eps.size() == mean.size(), "gsto_ops::", call.op, ": eps must have as many entries as mean, ",
                    mean.size(), ", got ", eps.size());
  }

  Norm operator[](size_t k) const {
    Norm norm{};
    if (eps_.empty()) return norm;
    norm.mean = at(0, k);
    norm.variance = at(1, k);
    norm.weight = at(2, k);
    norm.bias = at(3, k);
    norm.eps = static_cast<float>(eps_[k]);
    return norm;
  }

 private:
  const float* at(size_t list, size_t k) const {
    return values_[list].empty() ? nullptr : static_cast<const float*>(values_[list][k].data_ptr());
  }

  std::array<Tensors, 4> values_;
  const std::vector<double>& eps_;
};

void check_terms(const Call& call, const Tensors& terms) {
  STD_TORCH_CHECK(!terms.empty() && terms.size() <= kMaxTerms, "gsto_ops::", call.op, ": terms must be 1 to ",
                  kMaxTerms, " maps on CUDA, got ", terms.size());
  for (const Tensor& term : terms) {
    check_map(call.op, term);
    call.check("a term", term, {call.batch, call.channels, term.size(2), term.size(3)});
  }
}

bool same_size(const Tensor& a, const Tensor& b) { return a.size(2) == b.size(2) && a.size(3) == b.size(3); }

struct Sampling {
  ResampleMode mode;
  bool align_corners;

  Sampling(const char* op, StringHandle handle, bool align_corners_) : align_corners(align_corners_) {
    const std::string name = text_of(handle);
    STD_TORCH_CHECK(name == "bilinear" || name == "nearest", "gsto_ops::", op,
                    ": mode must be bilinear or nearest, got ", name);
    mode = name == "nearest" ? ResampleMode::kNearest : ResampleMode::kBilinear;
  }

  Resampling operator()(const Tensor& term, int height, int width) const {
    return {make_axis(term.size(2), height, mode, align_corners, 0),
            make_axis(term.size(3), width, mode, align_corners, 0)};
  }
};

Tensor forward(OptionalTensor input, OptionalTensor gate, Tensors terms, Tensors mean, Tensors var, Tensors weight,
               Tensors bias, std::vector<double> eps, bool /*training*/, OptionalTensor /*counts*/,
               std::optional<StringHandle> group, StringHandle activation, StringHandle mode, bool align_corners,
               OptionalTensor /*carrier*/) {
  if (group.has_value()) text_of(*group);  // frees it: whose statistics they are matters in the backward alone
  const char* op = "batch_norm_sum";
  const bool relu = is_relu(op, activation);
  const Sampling sampling(op, mode, align_corners);
  STD_TORCH_CHECK(input.has_value() || !terms.empty(), "gsto_ops::", op, ": neither input nor terms");
  STD_TORCH_CHECK(input.has_value() || !gate.has_value(), "gsto_ops::", op, ": gate without input");
  const Call call(op, input.has_value() ? *input : terms[0]);
  check_terms(call, terms);
  call.check("gate", gate, {call.batch, 1, call.height, call.width});
  const Norms norms(call, terms.size(), mean, var, &weight, &bias, eps);
  const Tensor output = call.new_map(call.channels, call.height, call.width);
  ResampledSumParams p{};
  std::vector<const void*> maps = {output.data_ptr()};
  bool resampled = false;
  for (size_t k = 0; k < terms.size(); ++k) {
    terms[k] = call.dense(terms[k]);
    p.term[k] = terms[k].data_ptr();
    p.norm[k] = norms[k];
    p.resampled[k] = !same_size(terms[k], call.input);
    if (p.resampled[k]) {
      const Resampling r = sampling(terms[k], call.height, call.width);
      p.rows[k] = r.rows;
      p.cols[k] = r.cols;
      resampled = true;
    }
    if (!p.resampled[k] || call.format.channels_last) maps.push_back(p.term[k]);
  }
  if (input.has_value()) maps.push_back(p.input = call.input.data_ptr());
  // One of the gates (N, K, H, W) of a branch is read where it is, but by strips, which do not know an image's end.
  const bool rows = gate.has_value() && resampled && gate->stride(3) == 1 && gate->stride(2) == call.width;
  const OptionalTensor gates = rows ? gate : contiguous(gate);
  p.gate = data_of(gates);
  if (p.gate != nullptr && !call.format.channels_last && !resampled) maps.push_back(p.gate);
  p.format = call.format;
  p.channels = call.channels;
  p.pixels = call.pixels;
  p.terms = static_cast<int>(terms.size());
  p.relu = relu;
  p.output = output.data_ptr();
  if (resampled) {
    p.batch = call.batch;
    p.gate_stride = rows ? gates->stride(0) : call.pixels;
    p.tiles = plan_sum_tile(call.channels, call.height, call.width, call.format.channels_last, call.element_size,
                            alignment_of(maps));
    call.launched(launch_resampled_sum(p, call.stream));
  } else {
    p.plan = call.plan_strips_of(call.batch, maps, false);
    call.launched(launch_batch_norm_sum(p, call.stream));
  }
  return output;
}

std::tuple<Tensor, Tensors, Tensor> backward(const Tensor& grad_output, OptionalTensor output, Tensors terms,
                                             Tensors mean, Tensors var, std::vector<double> eps, StringHandle mode,
                                             bool align_corners, OptionalTensor weight, OptionalTensor bias) {
  const char* op = "batch_norm_sum_backward";
  const Sampling sampling(op, mode, align_corners);
  const bool masked = bias.has_value();  // by the single term
  STD_TORCH_CHECK(!masked || (terms.size() == 1 && mean.size() == 1 && weight.has_value() && !output.has_value()),
                  "gsto_ops::", op, ": bias is for a single term with mean and weight, and without output");
  const Call call(op, output.has_value() ? *output : masked ? terms[0] : grad_output);
  call.check("grad_output", grad_output, {call.batch, call.channels, call.height, call.width});
  check_terms(call, terms);
  const Tensors weights = masked ? Tensors{*weight} : Tensors{}, biases = masked ? Tensors{*bias} : Tensors{};
  const Norms norms(call, terms.size(), mean, var, masked ? &weights : nullptr, masked ? &biases : nullptr, eps);
  const Tensor dy = call.dense(grad_output);
  const Tensor grad_sum =
      output.has_value() ? call.new_map(call.channels, call.height, call.width) : call.new_tensor({0});
  const Tensor sums = call.new_floats({1 + static_cast<int64_t>(mean.size()), call.channels});
  float* totals = static_cast<float*>(sums.data_ptr());

  // Terms of the output's size have their sums taken on the way, the others are gathered from dm.
  std::vector<size_t> same, low;
  Tensors formats_of, gathered;
  for (size_t k = 0; k < terms.size(); ++k) {
    if (same_size(terms[k], dy)) {
      if (!mean.empty()) same.push_back(k);
    } else {
      low.push_back(k);
      formats_of.push_back(terms[k]);
      gathered.push_back(call.new_map(call.channels, terms[k].size(2), terms[k].size(3)));
    }
    terms[k] = call.dense(terms[k]);
  }

  // A few images at a time where others gather from dm, which then is in L2.
  const int64_t image_bytes = int64_t{call.channels} * call.pixels * call.element_size;
  const int64_t step = low.empty() ? call.batch : images_per_chunk(call.batch, image_bytes, kChunkBytes);
  const int64_t last = call.batch == 0 ? 0 : (call.batch - 1) % step + 1;  // images of the last chunk
  // Partial sums: `rows` of `columns` x C, of which `used` are there.
  struct Partial {
    Tensor sums;
    int64_t rows, columns, used = 0;

    float* take(int64_t count, int channels) {
      float* from = static_cast<float*>(sums.data_ptr()) + used * columns * channels;
      used += count;
      return from;
    }
  };
  const auto partial_sums = [&](const auto& rows_of, int64_t columns) {
    const int64_t rows = call.batch == 0 ? 0 : (call.batch - last) / step * rows_of(step) + rows_of(last);
    return Partial{call.new_floats({rows, columns, call.channels}), rows, columns};
  };
  // The first pass takes dm's own sum and that of the first term of its size; one more pass over dm for each further
  // one.
  std::vector<Partial> same_sums, low_sums;
  const size_t passes = std::max<size_t>(1, same.size());
  const auto plan_of = [&](size_t i, int64_t images) {
    // All chunks begin as aligned as the maps do, less what the images' size takes away.
    std::vector<const void*> maps = {dy.data_ptr(), reinterpret_cast<const void*>(step * image_bytes)};
    if (output.has_value()) maps.insert(maps.end(), {call.input.data_ptr(), grad_sum.data_ptr()});
    if (!same.empty()) maps.push_back(terms[same[i]].data_ptr());
    return call.plan_strips_of(images, maps, true);
  };
  const auto blocks_of = [&](size_t i, int64_t images) {
    const Resampling r = sampling(terms[low[i]], call.height, call.width);
    return persistent_blocks(images * tiles_of(call.plan_taps(r, true).tiling), call.sms);
  };
  for (size_t i = 0; i < passes; ++i) {
    const auto rows_of = [&](int64_t images) {
      const StripPlan plan = plan_of(i, images);
      return int64_t{plan.blocks} * plan.fold;
    };
    same_sums.push_back(partial_sums(rows_of, same.empty() ? 1 : 2));
  }
  for (size_t i = 0; i < low.size() && !mean.empty(); ++i)
    low_sums.push_back(partial_sums([&](int64_t images) { return int64_t{blocks_of(i, images)}; }, 2));

  for (int64_t first = 0; first < call.batch; first += step) {
    const int64_t count = std::min(step, call.batch - first);
    const auto slice = [&](Tensor map) {
      return count == call.batch ? map : torch::stable::narrow(map, 0, first, count);
    };
    const Call part(op, slice(call.input));
    const Tensor grad = slice(dy), dm = output.has_value() ? slice(grad_sum) : grad;
    for (size_t i = 0; i < passes; ++i) {
      const bool masks = i == 0 && output.has_value();
      BatchNormSumBackwardParams p{};
      p.format = call.format;
      p.plan = plan_of(i, count);
      p.channels = call.channels;
      p.pixels = call.pixels;
      p.grad_output = (i == 0 ? grad : dm).data_ptr();
      p.output = masks ? part.input.data_ptr() : nullptr;
      p.grad_sum = masks ? dm.data_ptr() : nullptr;
      const Tensor term = same.empty() ? Tensor() : slice(terms[same[i]]);
      if (!same.empty()) {
        p.term = term.data_ptr();
        p.norm = norms[same[i]];
      }
      p.sums = same_sums[i].take(int64_t{p.plan.blocks} * p.plan.fold, call.channels);
      call.launched(launch_batch_norm_sum_backward(p, call.stream));
    }
    for (size_t i = 0; i < low.size(); ++i) {
      const Tensor term = slice(terms[low[i]]), result = slice(gathered[i]);
      const Resampling r = sampling(term, call.height, call.width);
      if (mean.empty()) {
        part.resample_transposed(r, dm, result, std::nullopt);
        continue;
      }
      const int blocks = blocks_of(i, count);
      ResampleParams p{};
      p.transposed = true;
      p.mask = term.data_ptr();
      p.mean = norms[low[i]].mean;
      p.sums = low_sums[i].take(blocks, call.channels);
      part.resample_with(p, r, dm, result, blocks);
    }
  }
  // The first C columns are a term's sum, the others dm's own, which is the same for all.
  const auto finish = [&](const Partial& partial, const Norm& norm, float* to, float* tail) {
    const int64_t columns = partial.columns * call.channels;
    SumRowsParams p{static_cast<const float*>(partial.sums.data_ptr()),
                    partial.rows,
                    columns,
                    tail == nullptr ? call.channels : columns,
                    ScalarType::kFloat32,
                    to,
                    tail,
                    call.channels,
                    norm.variance,
                    norm.eps};
    call.launched(launch_sum_rows(p, call.stream));
  };
  const auto finish_term = [&](const Partial& partial, size_t k, float* tail) {
    finish(partial, norms[k], totals + static_cast<int64_t>(1 + k) * call.channels, tail);
  };
  if (same.empty()) finish(same_sums[0], Norm{}, totals, nullptr);
  for (size_t i = 0; i < same.size(); ++i) finish_term(same_sums[i], same[i], i == 0 ? totals : nullptr);
  for (size_t i = 0; i < low_sums.size(); ++i) finish_term(low_sums[i], low[i], nullptr);
  for (size_t i = 0; i < low.size(); ++i) gathered[i] = as_dense(gathered[i], is_channels_last(formats_of[i]));
  return {grad_sum, gathered, sums};
}

Tensors backward_terms(const Tensor& grad_sum, Tensors gathered, Tensors terms, Tensors mean, Tensors var,
                       Tensors weight, std::vector<double> eps, OptionalTensor sums, OptionalTensor counts,
                       OptionalTensor bias) {
  const char* op = "batch_norm_sum_backward_terms";
  const Call whole(op, grad_sum);
  check_terms(whole, terms);
  STD_TORCH_CHECK(!bias.has_value() || terms.size() == 1, "gsto_ops::", op, ": bias is for a single term, got ",
                  terms.size());
  const Tensors biases = bias.has_value() ? Tensors{*bias} : Tensors{};
  const Norms norms(whole, terms.size(), mean, var, &weight, bias.has_value() ? &biases : nullptr, eps);
  const int64_t count = static_cast<int64_t>(terms.size());
  STD_TORCH_CHECK(mean.size() == terms.size(), "gsto_ops::", op, ": one norm per term is needed, got ", mean.size());
  whole.check("sums", sums, {1 + count, whole.channels}, true);
  whole.check("counts", counts, {count}, true);
  const OptionalTensor totals = contiguous(sums);
  const OptionalTensor pixels = contiguous(counts);
  const float* sum = static_cast<const float*>(data_of(totals));
  const float* counted = static_cast<const float*>(data_of(pixels));

  Tensors results(terms.size());
  // Terms of one size and one layout share a pass if they share their gradient.
  const auto run = [&](const Tensor& given, const std::vector<size_t>& which) {
    const Call call(op, terms[which[0]]);
    call.check("a gradient", given, {call.batch, call.channels, call.height, call.width});
    const Tensor grad = call.dense(given);
    Tensors held;
    std::vector<const void*> maps = {grad.data_ptr()};
    BatchNormSumTermsParams p{};
    for (const size_t k : which) {
      const int i = p.terms++;
      held.push_back(call.dense(terms[k]));
      results[k] = call.new_map(call.channels, call.height, call.width);
      p.term[i] = held.back().data_ptr();
      p.grad_term[i] = results[k].data_ptr();
      p.norm[i] = norms[k];
      if (sum != nullptr) p.term_sum[i] = sum + static_cast<int64_t>(1 + k) * call.channels;
      if (counted != nullptr) p.count[i] = counted + k;
      maps.insert(maps.end(), {p.term[i], p.grad_term[i]});
    }
    p.format = call.format;
    p.channels = call.channels;
    p.pixels = call.pixels;
    p.plan = call.plan_strips_of(call.batch, maps, false);
    p.grad = grad.data_ptr();
    p.masked = bias.has_value();
    p.sum = sum;
    p.pixels_counted = static_cast<float>(call.batch * call.pixels);
    call.launched(launch_batch_norm_sum_terms(p, call.stream));
  };
  size_t next = 0;
  std::vector<size_t> same[2];
  for (size_t k = 0; k < terms.size(); ++k) {
    if (same_size(terms[k], grad_sum)) {
      same[is_channels_last(terms[k])].push_back(k);
      continue;
    }
    STD_TORCH_CHECK(next < gathered.size(), "gsto_ops::", op,
                    ": gathered must have an entry per term of another size than grad_sum's ", shape_of(grad_sum),
                    ", got ", gathered.size());
    run(gathered[next++], {k});
  }
  for (const auto& which : same)
    if (!which.empty()) run(grad_sum, which);
  return results;
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("batch_norm_sum", TORCH_BOX(&gsto::cuda::forward));
  m.impl("batch_norm_sum_backward", TORCH_BOX(&gsto::cuda::backward));
  m.impl("batch_norm_sum_backward_terms", TORCH_BOX(&gsto::cuda::backward_terms));
}
