// torch.ops.gsto_ops.batch_norm_sum and its backwards on the CPU. The schemas are those of gsto_ops/ops.
#include <memory>

#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

// One line per plane where nothing is resampled and all maps have dense planes.
void join_rows(BatchNormSumParams& p) {
  if (!p.planar || p.gate.data) return;
  const auto dense = [&](const TensorView& t) { return !t.data || p.height == 1 || t.stride_h == p.width; };
  bool joined = dense(p.input) && dense(p.output) && dense(p.grad_output) && dense(p.grad_sum);
  for (int64_t k = 0; k < p.term_count; ++k)
    joined = joined && !p.terms[k].low && dense(p.terms[k].map) && dense(p.terms[k].grad);
  if (!joined) return;
  p.width *= p.height;
  p.height = 1;
  for (int64_t k = 0; k < p.term_count; ++k) {
    p.terms[k].height = p.height;
    p.terms[k].width = p.width;
  }
}

// The terms of a call: their maps, norms and tables, which live as long as this.
class Terms {
 public:
  Terms(const Operator& op, const std::vector<Tensor>& maps, int64_t height, int64_t width, bool planar)
      : op_(op), height_(height), width_(width), planar_(planar) {
    for (const Tensor& map : maps) {
      STD_TORCH_CHECK(map.dim() == 4 && map.size(2) > 0 && map.size(3) > 0, "gsto_ops::", op.name,
                      ": terms must be (N, C, h, w), got ", shape_of(map));
      op.check("terms", map, {op.batch, op.channels, map.size(2), map.size(3)});
      NormTerm term;
      term.height = map.size(2);
      term.width = map.size(3);
      term.low = term.height != height || term.width != width;
      maps_.push_back(with_lines(map, planar));
      term.map = view(maps_.back());
      term.count = static_cast<double>(op.batch * term.height * term.width);
      terms_.push_back(term);
    }
  }

  using Field = const void* NormTerm::*;
  void set(const char* name, const std::vector<Tensor>& values, Field field) {
    STD_TORCH_CHECK(values.empty() || values.size() == terms_.size(), "gsto_ops::", op_.name, ": ", name,
                    " must have a tensor for each of the ", terms_.size(), " terms, or none, got ", values.size());
    for (size_t k = 0; k < values.size(); ++k) {
      op_.check(name, values[k], {op_.channels}, true);
      values_.push_back(as_dense(values[k]));
      terms_[k].*field = values_.back().data_ptr();
    }
  }

  void set_eps(const std::vector<double>& eps) {
    for (size_t k = 0; k < eps.size() && k < terms_.size(); ++k) terms_[k].eps = eps[k];
  }

  // Term by term: is it resampled?
  void set_tables(ResampleMode mode, bool align_corners, bool backward) {
    for (size_t k = 0; k < terms_.size(); ++k) {
      if (!terms_[k].low) continue;
      const Resampling r = resampling_of(op_.name, maps_[k], {height_, width_}, mode, align_corners);
      terms_[k].rows = add(r.rows, false);
      terms_[k].cols = add(r.cols, false);
      if (!backward) continue;
      terms_[k].rows_transposed = add(r.rows, true);
      terms_[k].cols_transposed = add(r.cols, true);
    }
  }

  BatchNormSumParams params() {
    BatchNormSumParams p;
    p.dtype = op_.dtype;
    p.batch = op_.batch;
    p.channels = op_.channels;
    p.height = height_;
    p.width = width_;
    p.planar = planar_;
    p.terms = terms_.data();
    p.term_count = static_cast<int64_t>(terms_.size());
    return p;
  }

  std::vector<NormTerm>& list() { return terms_; }

 private:
  AxisView add(const Axis& axis, bool transposed) {
    tables_.push_back(std::make_unique<AxisTable>(axis, transposed));
    return tables_.back()->view();
  }

  const Operator& op_;
  const int64_t height_, width_;
  const bool planar_;
  std::vector<NormTerm> terms_;
  std::vector<Tensor> maps_, values_;
  std::vector<std::unique_ptr<AxisTable>> tables_;
};

ResampleMode upsampling(const char* op, StringHandle handle) {
  const std::string mode = text_of(handle);
  STD_TORCH_CHECK(mode == "bilinear" || mode == "nearest", "gsto_ops::", op, ": mode must be bilinear or nearest, got ",
                  mode);
  return mode == "nearest" ? ResampleMode::kNearest : ResampleMode::kBilinear;
}

// The sum of `terms`, to `output`.
void sum(const Operator& op, OptionalTensor input, OptionalTensor gate, const std::vector<Tensor>& terms,
         const std::vector<Tensor>& mean, const std::vector<Tensor>& var, const std::vector<Tensor>& weight,
         const std::vector<Tensor>& bias, const std::vector<double>& eps, StringHandle activation, StringHandle mode,
         bool align_corners, const Tensor& output) {
  const bool planar = is_planar(op.input);
  Terms list(op, terms, op.height, op.width, planar);
  list.set("mean", mean, &NormTerm::mean);
  list.set("var", var, &NormTerm::var);
  list.set("weight", weight, &NormTerm::weight);
  list.set("bias", bias, &NormTerm::bias);
  list.set_eps(eps);
  list.set_tables(upsampling(op.name, mode), align_corners, false);
  BatchNormSumParams p = list.params();
  p.relu = is_relu(op.name, activation);
  p.normed = !mean.empty();
  STD_TORCH_CHECK(mean.size() == var.size() && mean.size() == weight.size() && mean.size() == bias.size() &&
                      mean.size() == eps.size(),
                  "gsto_ops::", op.name, ": mean, var, weight, bias and eps must be as many as the terms, or none");
  op.check("gate", gate, {op.batch, 1, op.height, op.width});
  STD_TORCH_CHECK(!gate.has_value() || input.has_value(), "gsto_ops::", op.name, ": gate needs an input");
  const OptionalTensor own = input.has_value() ? OptionalTensor(with_lines(*input, planar)) : std::nullopt;
  p.input = view(own);
  p.gate = view(gate);
  p.output = view(output);
  join_rows(p);
  chosen_kernels().batch_norm_sum(op.call(op.height * op.width), p);
}

Tensor forward(OptionalTensor input, OptionalTensor gate, std::vector<Tensor> terms, std::vector<Tensor> mean,
               std::vector<Tensor> var, std::vector<Tensor> weight, std::vector<Tensor> bias, std::vector<double> eps,
               bool, OptionalTensor, std::optional<StringHandle> group, StringHandle activation, StringHandle mode,
               bool align_corners, OptionalTensor) {
  if (group.has_value()) text_of(*group);  // an owned string: only the gradient has a use for it, as for the carrier
  STD_TORCH_CHECK(!terms.empty(), "gsto_ops::batch_norm_sum: terms must not be empty");
  const Operator op("batch_norm_sum", input.has_value() ? *input : terms[0]);
  const Tensor output = op.new_map(op.channels, op.height, op.width);
  sum(op, input, gate, terms, mean, var, weight, bias, eps, activation, mode, align_corners, output);
  return output;
}

// Every value of a term of the output's size is read before the one at its place is written.
void forward_in_place(OptionalTensor input, OptionalTensor gate, std::vector<Tensor> terms, std::vector<Tensor> mean,
                      std::vector<Tensor> var, std::vector<Tensor> weight, std::vector<Tensor> bias,
                      std::vector<double> eps, StringHandle activation, StringHandle mode, bool align_corners) {
  STD_TORCH_CHECK(!terms.empty(), "gsto_ops::batch_norm_sum_: terms must not be empty");
  const Operator op("batch_norm_sum_", input.has_value() ? *input : terms[0]);
  size_t k = 0;
  while (k < terms.size() && (terms[k].dim() != 4 || terms[k].size(2) != op.height || terms[k].size(3) != op.width))
    ++k;
  STD_TORCH_CHECK(k < terms.size(), "gsto_ops::batch_norm_sum_: no term has the size of the sum, ", op.height, " x ",
                  op.width);
  const Tensor lines = with_lines(terms[k], is_planar(op.input));
  const bool direct = lines.data_ptr() == terms[k].data_ptr();
  const Tensor output = direct ? terms[k] : op.new_map(op.channels, op.height, op.width);
  sum(op, input, gate, terms, mean, var, weight, bias, eps, activation, mode, align_corners, output);
  if (!direct) torch::stable::copy_(terms[k], output);
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> backward(const Tensor& grad_output, OptionalTensor output,
                                                         std::vector<Tensor> terms, std::vector<Tensor> mean,
                                                         std::vector<Tensor> var, std::vector<double> eps,
                                                         StringHandle mode, bool align_corners, OptionalTensor weight,
                                                         OptionalTensor bias) {
  STD_TORCH_CHECK(!terms.empty(), "gsto_ops::batch_norm_sum_backward: terms must not be empty");
  const Operator op("batch_norm_sum_backward", grad_output);
  const bool planar = is_planar(output.has_value() ? *output : terms[0]);
  op.check("output", output, {op.batch, op.channels, op.height, op.width});
  Terms list(op, terms, op.height, op.width, planar);
  list.set("mean", mean, &NormTerm::mean);
  list.set("var", var, &NormTerm::var);
  list.set_eps(eps);
  STD_TORCH_CHECK(mean.size() == var.size() && mean.size() == eps.size(), "gsto_ops::", op.name,
                  ": mean, var and eps must be as many as the terms, or none");
  if (bias.has_value()) {
    STD_TORCH_CHECK(terms.size() == 1 && mean.size() == 1 && weight.has_value() && !output.has_value(),
                    "gsto_ops::", op.name, ": bias is for a single term with mean and weight, and without output");
    list.set("weight", {*weight}, &NormTerm::weight);
    list.set("bias", {*bias}, &NormTerm::bias);
  }
  list.set_tables(upsampling(op.name, mode), align_corners, true);
  BatchNormSumParams p = list.params();
  p.relu = output.has_value();
  p.masked_by_term = bias.has_value();
  p.normed = !mean.empty();

  const Tensor grad = with_lines(grad_output, planar);
  const OptionalTensor own = output.has_value() ? OptionalTensor(with_lines(*output, planar)) : std::nullopt;
  const Operator result("batch_norm_sum_backward", output.has_value() ? *output : terms[0]);
  std::vector<Tensor> gathered, made;
  for (size_t k = 0; k < terms.size(); ++k) {
    if (!list.list()[k].low) continue;
    const Operator term("batch_norm_sum_backward", terms[k]);
    gathered.push_back(term.new_map(op.channels, term.height, term.width));
    // Made in the output's layout; a term in the other one (of one pixel, say, where the two look alike) gets a copy.
    made.push_back(is_planar(terms[k]) == planar ? gathered.back()
                                                 : result.new_map(op.channels, term.height, term.width));
    list.list()[k].gathered = view(made.back());
  }
  const Tensor grad_sum = p.relu ? result.new_map(op.channels, op.height, op.width) : result.new_tensor({0});
  const Tensor sums = op.new_statistics({1 + static_cast<int64_t>(mean.size()), op.channels});
  p.grad_output = view(grad);
  p.output = view(own);
  if (p.relu) p.grad_sum = view(grad_sum);
  p.sums = sums.data_ptr();
  join_rows(p);
  chosen_kernels().batch_norm_sum_backward(op.call(op.height * op.width), p);
  for (size_t k = 0; k < made.size(); ++k)
    if (made[k].data_ptr() != gathered[k].data_ptr()) torch::stable::copy_(gathered[k], made[k]);
  return {grad_sum, gathered, sums};
}

std::vector<Tensor> backward_terms(const Tensor& grad_sum, std::vector<Tensor> gathered, std::vector<Tensor> terms,
                                   std::vector<Tensor> mean, std::vector<Tensor> var, std::vector<Tensor> weight,
                                   std::vector<double> eps, OptionalTensor sums, OptionalTensor counts,
                                   OptionalTensor bias) {
  const Operator op("batch_norm_sum_backward_terms", grad_sum);
  STD_TORCH_CHECK(!bias.has_value() || terms.size() == 1, "gsto_ops::", op.name, ": bias is for a single term, got ",
                  terms.size());
  std::vector<Tensor> grads;
  if (terms.empty()) return grads;
  // Each term has its own size and layout, and this pass takes them one by one.
  size_t low = 0;
  for (size_t k = 0; k < terms.size(); ++k) {
    const Operator own(op.name, terms[k]);
    const bool planar = is_planar(terms[k]);
    Terms list(own, {terms[k]}, own.height, own.width, planar);
    const auto one = [&](const std::vector<Tensor>& values) {
      STD_TORCH_CHECK(values.size() == terms.size(), "gsto_ops::", op.name,
                      ": mean, var and weight must be as many as the terms");
      return std::vector<Tensor>{values[k]};
    };
    list.set("mean", one(mean), &NormTerm::mean);
    list.set("var", one(var), &NormTerm::var);
    list.set("weight", one(weight), &NormTerm::weight);
    list.set_eps({eps.at(k)});
    if (bias.has_value()) list.set("bias", {*bias}, &NormTerm::bias);
    BatchNormSumParams p = list.params();
    p.normed = true;
    p.masked_by_term = bias.has_value();
    const bool resampled = own.height != op.height || own.width != op.width;
    STD_TORCH_CHECK(!resampled || low < gathered.size(), "gsto_ops::", op.name,
                    ": gathered must have a map for every term of another size than grad_sum, got ", gathered.size());
    const Tensor& source = resampled ? gathered[low++] : grad_sum;
    own.check(resampled ? "gathered" : "grad_sum", source, {own.batch, own.channels, own.height, own.width});
    const Tensor grad = with_lines(source, planar);
    p.grad_sum = view(grad);

    grads.push_back(own.new_map(own.channels, own.height, own.width));
    NormTerm& term = list.list()[0];
    term.grad = view(grads.back());
    Tensor own_sums = sums.has_value() ? *sums : grad;
    if (sums.has_value()) {
      own.check("sums", *sums, {1 + static_cast<int64_t>(terms.size()), own.channels}, true);
      p.statistics = true;
      own_sums = as_dense(*sums);
      p.sums = own_sums.data_ptr();
      p.sums_row = 1 + static_cast<int64_t>(k);
      if (counts.has_value()) {
        own.check("counts", *counts, {static_cast<int64_t>(terms.size())}, true);
        const Tensor values = as_dense(*counts);
        term.count = own.dtype == gsto::ScalarType::kFloat64 ? static_cast<const double*>(values.data_ptr())[k]
                                                             : static_cast<const float*>(values.data_ptr())[k];
      }
    }
    join_rows(p);
    chosen_kernels().batch_norm_sum_backward_terms(own.call(own.height * own.width), p);
  }
  return grads;
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("batch_norm_sum", TORCH_BOX(&gsto::cpu::forward));
  m.impl("batch_norm_sum_", TORCH_BOX(&gsto::cpu::forward_in_place));
  m.impl("batch_norm_sum_backward", TORCH_BOX(&gsto::cpu::backward));
  m.impl("batch_norm_sum_backward_terms", TORCH_BOX(&gsto::cpu::backward_terms));
}
