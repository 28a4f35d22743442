// batch_norm_sum, forward and backward. Included once per instruction set.
//
//   y = act(gate x + sum_k up(a_k t_k + b_k)),  a_k = weight_k / sqrt(var_k + eps_k),  b_k = bias_k - mean_k a_k
//
// Forward reads every map once and writes y. Backward reads dy, y and the terms, and writes d = dy (y > 0), the terms'
// up^T(d) and the sums; the second pass reads d and the terms and writes their gradients. Behind a single norm both
// passes read dy and find y > 0 from the term. Upsampling goes line by line: a line of a low-resolution term is
// stretched once, and the output's lines are mixed from two stretched lines.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// The lines of one low-resolution term, stretched to the output's width, for rows in ascending order.
template <class S>
struct StretchedRows {
  using A = Accumulate<S>;

  const NormTerm& term;
  const Lines<S>& lines;
  const Columns<A> columns;
  const Buffer<A> rows, values;
  const int64_t row_size;
  int64_t held[2] = {-1, -1};
  int64_t image = -1;

  StretchedRows(const NormTerm& t, const Lines<S>& l)
      : term(t),
        lines(l),
        columns(t.cols),
        rows(2 * padded<A>(l.size)),
        values(padded<A>(t.width * l.unit)),
        row_size(padded<A>(l.size)) {}

  // Term row i of a group of image n.
  const A* row(int64_t n, int64_t group, int64_t i) {
    if (image != n * lines.groups + group) {
      image = n * lines.groups + group;
      held[0] = held[1] = -1;
    }
    A* to = rows.data() + i % 2 * row_size;
    if (held[i % 2] != i) {
      held[i % 2] = i;
      const S* from = lines.line(term.map, n, group, i);
      resample_line(columns, line_values(from, term.width * lines.unit, values.data()), lines.unit, to);
    }
    return to;
  }
};

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <class S>
struct BatchNormSum {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

  const Call& call;
  const BatchNormSumParams& p;
  const Lines<S> lines;
  const Buffer<A> patterns;  // of every term: its scale, then its mean; then the shift of all
  const int64_t pattern;

  BatchNormSum(const Call& c, const BatchNormSumParams& params)
      : call(c),
        p(params),
        lines(p.planar, p.batch, p.channels, p.height, p.width),
        patterns((2 * p.term_count + 1) * lines.pattern_size()),
        pattern(lines.pattern_size()) {
    for (int64_t k = 0; k < p.term_count; ++k) {
      const NormTerm& t = p.terms[k];
      lines.fill(patterns.data() + 2 * k * pattern, [&](int64_t c) { return scale(t, c); });
      lines.fill(patterns.data() + (2 * k + 1) * pattern, [&](int64_t c) { return p.normed ? at(t.mean, c) : A(0); });
    }
    lines.fill(patterns.data() + 2 * p.term_count * pattern, [&](int64_t c) {
      A shift = 0;
      for (int64_t k = 0; p.normed && k < p.term_count; ++k)
        if (p.terms[k].bias) shift += at(p.terms[k].bias, c) - at(p.terms[k].mean, c) * scale(p.terms[k], c);
      return shift;
    });
  }

  static A at(const void* values, int64_t c) { return static_cast<const A*>(values)[c]; }
  A inverse_deviation(const NormTerm& t, int64_t c) const {
    return A(1) / square_root(at(t.var, c) + static_cast<A>(t.eps));
  }
  // backward, the first pass, has no use for it where the ReLU's mask is not the norm's.
  A scale(const NormTerm& t, int64_t c) const { return t.weight ? at(t.weight, c) * inverse_deviation(t, c) : A(1); }

  // The patterns of a group.
  const A* scale_of(int64_t k, int64_t group) const { return patterns.data() + 2 * k * pattern + group * lines.period; }
  const A* mean_of(int64_t k, int64_t group) const { return scale_of(k, group) + pattern; }
  const A* shift_of(int64_t group) const { return scale_of(p.term_count, group); }

  // The input's line times its gate.
  void gate_line(int64_t n, int64_t h, const S* from, A* to) const {
    const S* gates = pixel<S>(p.gate, n, h, 0);
    for (int64_t w = 0; w < p.width; ++w) {
      const A gate = load_some(gates + w * p.gate.stride_w, 1)[0];
      const S* values = from + w * lines.unit;
      for (int64_t c = 0; c < lines.unit; c += lanes) {
        const int64_t valid = least(lanes, lines.unit - c);
        store_valid(to + w * lines.unit + c, gate * load_valid(values + c, valid), valid);
      }
    }
  }

  struct Mixed {  // a low-resolution term's two lines for one output line
    const A *upper, *lower;
    A upper_weight, lower_weight;
    const A* scale;
  };
  struct Same {
    const S* line;
    const A* scale;
  };

  void forward() const {
    parallel_for(call, lines.tasks(), [&](int64_t begin, int64_t end) {
      Array<StretchedRows<S>> stretched(p.term_count);
      for (int64_t k = 0; k < p.term_count; ++k)
        if (p.terms[k].low) stretched.add(p.terms[k], lines);
      Array<Mixed> mixed(p.term_count);
      Array<Same> same(p.term_count);
      const Buffer<A> gated(p.gate.data ? padded<A>(lines.size) : 0);
      lines.visit(begin, end, [&](int64_t n, int64_t group, int64_t first, int64_t last) {
        for (int64_t h = first; h < last; ++h) {
          mixed.clear();
          same.clear();
          for (int64_t k = 0; k < p.term_count; ++k) {
            const NormTerm& t = p.terms[k];
            if (!t.low) {
              same.add(Same{lines.line(t.map, n, group, h), scale_of(k, group)});
              continue;
            }
            const int64_t start = t.rows.start[h], taps = t.rows.taps(h);
            const A* weights = t.rows.template weights<A>(h);
            StretchedRows<S>& rows = stretched[mixed.size()];
            const A* upper = rows.row(n, group, start);
            const A* lower = taps > 1 ? rows.row(n, group, start + 1) : upper;
            mixed.add(Mixed{upper, lower, weights[0], taps > 1 ? weights[1] : A(0), scale_of(k, group)});
          }
          const S* input = p.input.data ? lines.line(p.input, n, group, h) : nullptr;
          S* output = lines.line(p.output, n, group, h);
          const A* shift = shift_of(group);
          if (p.gate.data) {
            gate_line(n, h, input, gated.data());
            sum_line(gated.data(), same, mixed, shift, output);
          } else {
            sum_line(input, same, mixed, shift, output);
          }
        }
      });
    });
  }

  template <class X>
  void sum_line(const X* input, const Array<Same>& same, const Array<Mixed>& mixed, const A* shift, S* output) const {
    if (same.size() == 1 && mixed.size() == 0) {  // batch norm and ReLU; the end of a residual block
      const Same term = same[0];
      lines.vectors([&](int64_t i, int64_t j, int64_t valid) {
        Vec<A> value = load(shift + j) + load(term.scale + j) * load_valid(term.line + i, valid);
        if (input) value += load_valid(input + i, valid);
        store_valid(output + i, p.relu ? relu(value) : value, valid);
      });
      return;
    }
    lines.vectors([&](int64_t i, int64_t j, int64_t valid) {
      Vec<A> value = load(shift + j);
      if (input) value += load_valid(input + i, valid);
      for (int64_t k = 0; k < same.size(); ++k) value += load(same[k].scale + j) * load_valid(same[k].line + i, valid);
      for (int64_t k = 0; k < mixed.size(); ++k) {
        const Mixed& m = mixed[k];
        value += load(m.scale + j) * (m.upper_weight * load(m.upper + i) + m.lower_weight * load(m.lower + i));
      }
      store_valid(output + i, p.relu ? relu(value) : value, valid);
    });
  }

  // Sums of a pattern each: of d, and with norms of d_k (t_k - mean_k) for every term of the output's size. Those of
  // the channels are over the standard deviation: the gradients of the norms' biases and weights.
  void backward() const {
    const int64_t kinds = 1 + (p.normed ? p.term_count : 0);
    Array<Narrowed> narrowed(p.term_count);
    for (int64_t k = 0; k < p.term_count; ++k)
      if (p.terms[k].low) narrowed.add(p.terms[k], lines, k);
    Reduction<A> reduction(lines.tasks(), kinds * pattern, lines.values());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> values(narrowed.size() ? padded<A>(lines.size) : 0);
      lines.visit(begin, end, [&](int64_t n, int64_t group, int64_t first, int64_t last) {
        for (int64_t h = first; h < last; ++h) {
          gradient_line(n, group, h, sums + group * lines.period, narrowed.size() ? values.data() : nullptr);
          for (int64_t k = 0; k < narrowed.size(); ++k) narrowed[k].take(n, group, h, values.data());
        }
      });
    });
    const Buffer<A> totals(kinds * pattern);
    add_slots(reduction, kinds * pattern, totals.data());
    A* sums = static_cast<A*>(p.sums);
    for (int64_t kind = 0; kind < kinds; ++kind)
      if (kind == 0 || !p.terms[kind - 1].low) lines.fold(totals.data() + kind * pattern, sums + kind * p.channels);
    for (int64_t k = 0; k < narrowed.size(); ++k) {
      const Narrowed& term = narrowed[k];
      gather(term, p.normed ? sums + (1 + term.index) * p.channels : nullptr);
    }
    for (int64_t k = 0; k + 1 < kinds; ++k)
      for (int64_t c = 0; c < p.channels; ++c) sums[(1 + k) * p.channels + c] *= inverse_deviation(p.terms[k], c);
  }

  static void add_slots(const Reduction<A>& reduction, int64_t size, A* totals) {
    for (int64_t i = 0; i < size; ++i) totals[i] = 0;
    for (int64_t s = 0; s < reduction.slots(); ++s)
      for (int64_t i = 0; i < size; ++i) totals[i] += reduction.slot(s)[i];
  }

  // The gradient d of y where the ReLU behind a single norm let t through; the sum is forward's.
  static Vec<A> under_relu(const A* scale, const A* shift, Vec<A> t, Vec<A> d) {
    return load(shift) + load(scale) * t > 0 ? d : Vec<A>{};
  }

  void gradient_line(int64_t n, int64_t group, int64_t h, A* sums, A* values) const {
    const S* grad = lines.line(p.grad_output, n, group, h);
    const S* output = p.relu ? lines.line(p.output, n, group, h) : nullptr;
    S* to = p.relu ? lines.line(p.grad_sum, n, group, h) : nullptr;
    const auto gradient = [&](int64_t i, int64_t valid) {
      Vec<A> d = read_valid(grad + i, valid);
      if (output) {
        d = load_valid(output + i, valid) > 0 ? d : Vec<A>{};
        store_valid(to + i, d, valid);
      }
      if (values) store(values + i, d);
      return d;
    };
    if (p.normed && p.term_count == 1 && !p.terms[0].low) {  // batch norm and ReLU; the end of a residual block
      const S* term = lines.line(p.terms[0].map, n, group, h);
      const A* mean = mean_of(0, group);
      if (p.masked_by_term) {
        const A *scale = scale_of(0, group), *shift = shift_of(group);
        return lines.template add_up<2>(sums, pattern, [&](int64_t i, int64_t j, int64_t valid, auto& sum) {
          const Vec<A> t = read_valid(term + i, valid);
          const Vec<A> d = under_relu(scale + j, shift + j, t, read_valid(grad + i, valid));
          sum[0] += d;
          sum[1] += d * (t - load(mean + j));
        });
      }
      return lines.template add_up<2>(sums, pattern, [&](int64_t i, int64_t j, int64_t valid, auto& sum) {
        const Vec<A> d = gradient(i, valid);
        sum[0] += d;
        sum[1] += d * (read_valid(term + i, valid) - load(mean + j));
      });
    }
    lines.vectors([&](int64_t i, int64_t j, int64_t valid) {
      const Vec<A> d = gradient(i, valid);
      store(sums + j, load(sums + j) + d);
      for (int64_t k = 0; p.normed && k < p.term_count; ++k) {
        if (p.terms[k].low) continue;
        const Vec<A> term = load_valid(lines.line(p.terms[k].map, n, group, h) + i, valid);
        A* sum = sums + (1 + k) * pattern + j;
        store(sum, load(sum) + d * (term - load(mean_of(k, group) + j)));
      }
    });
  }

  // The gradient of a low-resolution term, first along the columns: lines of the output's height and the term's width.
  struct Narrowed {
    const NormTerm& term;
    const Lines<S>& lines;
    const Columns<A> columns;
    const int64_t index, line;
    const Buffer<A> values;

    Narrowed(const NormTerm& t, const Lines<S>& l, int64_t k)
        : term(t),
          lines(l),
          columns(t.cols_transposed),
          index(k),
          line(padded<A>(t.width * l.unit)),
          values(l.batch * l.groups * l.height * line) {}

    A* at(int64_t n, int64_t group, int64_t h) const {
      return values.data() + ((n * lines.groups + group) * lines.height + h) * line;
    }
    void take(int64_t n, int64_t group, int64_t h, const A* from) const {
      resample_line(columns, from, lines.unit, at(n, group, h));
    }
  };

  // Then along the rows, and the sums of the term.
  void gather(const Narrowed& narrowed, A* sums) const {
    const NormTerm& term = narrowed.term;
    const Lines<S> small(p.planar, p.batch, p.channels, term.height, term.width);
    const A* means = patterns.data() + (2 * narrowed.index + 1) * pattern;
    Reduction<A> reduction(small.tasks(), pattern, small.values());
    reduction.run(call, [&](int64_t begin, int64_t end, A* slot) {
      const Buffer<A> values(narrowed.line);
      small.visit(begin, end, [&](int64_t n, int64_t group, int64_t first, int64_t last) {
        for (int64_t h = first; h < last; ++h) {
          const AxisView& rows = term.rows_transposed;
          const A* from = narrowed.at(n, group, rows.taps(h) ? rows.start[h] : 0);
          combine<false>(rows.template weights<A>(h), rows.taps(h), from, narrowed.line, narrowed.line, values.data());
          S* to = small.line(term.gathered, n, group, h);
          const S* map = small.line(term.map, n, group, h);
          A* sum = slot + group * small.period;
          const A* mean = means + group * small.period;
          small.vectors([&](int64_t i, int64_t j, int64_t valid) {
            const Vec<A> d = load_valid(values.data() + i, valid);
            store_valid(to + i, d, valid);
            if (sums) store(sum + j, load(sum + j) + d * (load_valid(map + i, valid) - load(mean + j)));
          });
        }
      });
    });
    if (!sums) return;
    const Buffer<A> totals(pattern);
    add_slots(reduction, pattern, totals.data());
    small.fold(totals.data(), sums);
  }

  // Of one term: scale (G - sum d / n - u sum d u / n), u = (t - mean) invstd; scale G where the statistics are
  // constants.
  void backward_terms() const {
    const NormTerm& term = p.terms[0];
    const Buffer<A> offset(pattern), slope(pattern);
    const A* sums = static_cast<const A*>(p.sums);
    const A count = static_cast<A>(term.count);
    lines.fill(offset.data(), [&](int64_t c) { return p.statistics ? sums[c] / count : A(0); });
    lines.fill(slope.data(), [&](int64_t c) {
      return p.statistics ? sums[p.sums_row * p.channels + c] * inverse_deviation(term, c) / count : A(0);
    });
    const bool statistics = p.statistics, masked = p.masked_by_term;
    parallel_for(call, lines.tasks(), [&](int64_t begin, int64_t end) {
      lines.visit(begin, end, [&](int64_t n, int64_t group, int64_t first, int64_t last) {
        const A* scale = scale_of(0, group);
        const A* mean = mean_of(0, group);
        const A* open = shift_of(group);
        const A* shift = offset.data() + group * lines.period;
        const A* factor = slope.data() + group * lines.period;
        for (int64_t h = first; h < last; ++h) {
          const S* grad = lines.line(p.grad_sum, n, group, h);
          const S* map = lines.line(term.map, n, group, h);
          S* to = lines.line(term.grad, n, group, h);
          lines.vectors([&](int64_t i, int64_t j, int64_t valid) {
            Vec<A> d = load_valid(grad + i, valid);
            if (statistics || masked) {
              const Vec<A> t = load_valid(map + i, valid);
              if (masked) d = under_relu(scale + j, open + j, t, d);
              if (statistics) d -= load(shift + j) + load(factor + j) * (t - load(mean + j));
            }
            store_valid(to + i, load(scale + j) * d, valid);
          });
        }
      });
    });
  }
};

inline void batch_norm_sum(const Call& call, const BatchNormSumParams& params) {
  with_storage_type(params.dtype, [&](auto type) { BatchNormSum<decltype(type)>(call, params).forward(); });
}

inline void batch_norm_sum_backward(const Call& call, const BatchNormSumParams& params) {
  with_storage_type(params.dtype, [&](auto type) { BatchNormSum<decltype(type)>(call, params).backward(); });
}

inline void batch_norm_sum_backward_terms(const Call& call, const BatchNormSumParams& params) {
  with_storage_type(params.dtype, [&](auto type) { BatchNormSum<decltype(type)>(call, params).backward_terms(); });
}

}  // namespace gsto::cpu::GSTO_ISA
