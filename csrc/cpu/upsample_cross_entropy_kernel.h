// upsample_cross_entropy, forward and backward. Included once per instruction set.
//
// A task is a block of the label map (forward) or of the logit map (backward). The few logits that it needs are
// resampled along the columns and turned into planes, [class][column of the label map], two rows of them at a time; the
// pixels are then the lanes of vectors, so no lane is wasted on 19 classes and no sum runs across lanes.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// log(x) for normal x > 0, with a relative error below 1e-7. A NaN stays one.
inline Vec<float> logarithm(Vec<float> x) {
  const Bits bits = bit_cast<Bits>(x) - 0x3f3504f3u;  // 2^-0.5: brings the mantissa to [2^-0.5, 2^0.5)
  const Vec<float> exponent = __builtin_convertvector(bit_cast<typename Vectors<float>::Mask>(bits) >> 23, Vec<float>);
  const Vec<float> m = bit_cast<Vec<float>>((bits & 0x007fffff) + 0x3f3504f3u) - 1.0f;
  Vec<float> poly = Vec<float>{} + 7.0376836292e-2f;
  for (const float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    poly = poly * m + coefficient;
  const Vec<float> square = m * m;
  const Vec<float> log_m = m + (square * (m * poly - 0.5f) + exponent * -2.12194440e-4f);  // log(2) in two parts
  return x == x ? log_m + exponent * 0.693359375f : x;
}

inline Vec<double> logarithm(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = log(x[i]);
  return x;
}

// Calls f with a value of the labels' type.
template <class F>
inline void with_label_type(LabelType type, const F& f) {
  switch (type) {
    case LabelType::kInt64:
      return f(int64_t{});
    case LabelType::kInt32:
      return f(int32_t{});
    case LabelType::kUint8:
      return f(uint8_t{});
  }
}

template <class S>
struct UpsampleCrossEntropy {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

  const Call& call;
  const UpsampleCrossEntropyParams& p;
  const int64_t row;  // of a tile
  const Buffer<A> weight;

  UpsampleCrossEntropy(const Call& c, const UpsampleCrossEntropyParams& params)
      : call(c), p(params), row(padded<A>(p.channels)), weight(row) {
    if (p.weight.data) fill_padded<A>(p.weight, p.weight.stride_n, p.channels, weight.data());
  }

  // The logits of a run of label columns at the two logit rows between which a label row lies, and the labels there.
  struct Columns {
    const UpsampleCrossEntropy& op;
    const int64_t stride;  // of the planes: the widest run, in whole vectors
    const Buffer<A> loaded, tile, planes[2];
    const Buffer<int64_t> labels;  // -1: ignored
    int64_t n = 0, first = 0, count = 0, held[2] = {-1, -1};

    Columns(const UpsampleCrossEntropy& operation, int64_t widest, int64_t most_logits)
        : op(operation),
          stride(padded<A>(widest)),
          loaded(most_logits * op.row),
          tile(stride * op.row),
          planes{Buffer<A>(stride * op.row), Buffer<A>(stride * op.row)},
          labels(stride) {}

    void start(int64_t image, int64_t first_column, int64_t columns) {
      n = image, first = first_column, count = columns;
      held[0] = held[1] = -1;
    }

    const A* logits(int64_t i) {
      const Buffer<A>& to = planes[i % 2];
      if (held[i % 2] == i) return to.data();
      held[i % 2] = i;
      const AxisView& cols = op.call.cols;
      const int64_t w = cols.start[first], width = cols.end(first + count - 1) - w;
      const A* from = tile_of<S>(op.p.input, op.p.channels, n, i, w, width, loaded.data());
      for (int64_t o = 0; o < count; ++o) {
        const A* source = from + (cols.start[first + o] - w) * op.row;
        combine<false>(cols.template weights<A>(first + o), cols.taps(first + o), source, op.row, op.row,
                       tile.data() + o * op.row);
      }
      for (int64_t o = 0; o < count; o += lanes) {
        for (int64_t c = 0; c < op.row; c += lanes) {
          Vec<A> block[lanes];
          for (int64_t j = 0; j < lanes; ++j)
            block[j] = o + j < count ? load(tile.data() + (o + j) * op.row + c) : Vec<A>{};
          transpose<A>(block);
          for (int64_t j = 0; j < lanes; ++j) store(to.data() + (c + j) * stride + o, block[j]);
        }
      }
      return to.data();
    }

    template <class L>
    void load_labels(int64_t h) {
      const L* from = pixel<L>(op.p.target, n, h, first);
      for (int64_t i = 0; i < stride; ++i) labels.data()[i] = -1;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t label = static_cast<int64_t>(from[i * op.p.target.stride_w]);
        if (label == op.p.ignore_index) continue;
        if (label >= 0 && label < op.p.channels) {
          labels.data()[i] = label;
        } else {
          __atomic_store_n(op.p.bad_label, label, __ATOMIC_RELAXED);
        }
      }
    }

    // Reads row h of the labels. f(x) is then called with the function x(c, o), a vector of label columns of the
    // upsampled logits of class c, and with the row's taps.
    template <class F>
    void row_of(int64_t h, const F& f) {
      with_label_type(op.p.label_type, [&](auto type) { load_labels<decltype(type)>(h); });
      const AxisView& rows = op.call.rows;
      const int64_t i = rows.start[h], step = stride;
      const A* weights = rows.template weights<A>(h);
      const A* upper = logits(i);
      if (rows.taps(h) == 1) {
        f([=](int64_t c, int64_t o) { return load(upper + c * step + o); });
      } else {
        const A* lower = logits(i + 1);
        const A w0 = weights[0], w1 = weights[1];
        f([=](int64_t c, int64_t o) { return w0 * load(upper + c * step + o) + w1 * load(lower + c * step + o); });
      }
    }

    // Whether a vector of columns has a label, and the weights of its labels: 0 where ignored.
    bool weights_of(int64_t o, Vec<A>* to) const {
      bool any = false;
      for (int64_t j = 0; j < lanes; ++j) {
        const int64_t label = labels.data()[o + j];
        (*to)[j] = label < 0 ? A(0) : op.p.weight.data ? op.weight.data()[label] : A(1);
        any = any || label >= 0;
      }
      return any;
    }
  };

  // A vector of pixels to any strides.
  static void store_map(const TensorView& map, int64_t n, int64_t h, int64_t w, Vec<A> values, int64_t valid) {
    A* to = mutable_pixel<A>(map, n, h, w);
    if (map.stride_w == 1 && valid == lanes) return store(to, values);
    for (int64_t j = 0; j < valid; ++j) to[j * map.stride_w] = values[j];
  }

  static Vec<A> load_map(const TensorView& map, int64_t n, int64_t h, int64_t w, int64_t valid) {
    const A* from = pixel<A>(map, n, h, w);
    return map.stride_w == 1 && valid == lanes ? load(from) : load_some(from, valid, map.stride_w);
  }

  void forward() const {
    const Blocks<A> blocks(p.batch, call.rows, call.cols, p.channels);
    const Buffer<double> totals(2 * blocks.tasks());  // of each task, so that their sum has one order
    parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
      Columns columns(*this, blocks.width, blocks.input_width());
      const Buffer<A> scores(row * lanes);
      for (int64_t task = begin; task < end; ++task) {
        const Block block = blocks.block(task);
        columns.start(block.n, block.col0, block.width());
        double sums[2] = {};
        for (int64_t h = block.row0; h < block.row1; ++h)
          columns.row_of(h, [&](const auto& x) { forward_row(columns, h, x, scores.data(), sums); });
        for (int64_t s = 0; s < 2; ++s) totals.data()[2 * task + s] = sums[s];
      }
    });
    for (int64_t s = 0; s < 2; ++s) p.totals[s] = 0;
    for (int64_t i = 0; i < 2 * blocks.tasks(); ++i) p.totals[i % 2] += totals.data()[i];
  }

  template <class X>
  void forward_row(const Columns& columns, int64_t h, const X& x, A* scores, double* sums) const {
    Vec<A> sum[2] = {};
    for (int64_t o = 0; o < columns.count; o += lanes) {
      Vec<A> top = x(0, o);
      store(scores, top);
      for (int64_t c = 1; c < p.channels; ++c) {
        const Vec<A> score = x(c, o);
        store(scores + c * lanes, score);
        top = score > top ? score : top;
      }
      Vec<A> mass = {};
      for (int64_t c = 0; c < p.channels; ++c) mass += exponential(load(scores + c * lanes) - top);
      const Vec<A> logsumexp = top + logarithm(mass);
      const int64_t w = columns.first + o, valid = least(lanes, columns.count - o);
      store_map(p.logsumexp, columns.n, h, w, logsumexp, valid);

      Vec<A> factor = {}, picked;
      columns.weights_of(o, &factor);
      for (int64_t j = 0; j < lanes; ++j) picked[j] = scores[most(0, columns.labels.data()[o + j]) * lanes + j];
      // An ignored pixel has no loss, even where its logits are not finite.
      const auto labelled = factor != 0;
      const Vec<A> loss = labelled ? factor * (logsumexp - picked) : Vec<A>{};
      sum[0] += loss;
      sum[1] += factor;
      if (p.loss.data) store_map(p.loss, columns.n, h, w, loss, valid);
    }
    for (int64_t s = 0; s < 2; ++s) sums[s] += static_cast<double>(sum_lanes<A>(sum[s]));
  }

  // The gradient of the planes of two logit rows, whose even and odd ones take turns.
  struct Gradients {
    const Buffer<A> planes[2];
    int64_t held[2] = {-1, -1};

    explicit Gradients(int64_t size) : planes{Buffer<A>(size), Buffer<A>(size)} {}

    A* at(int64_t i, int64_t size) {
      A* to = planes[i % 2].data();
      if (held[i % 2] != i) fill_pixels<A>(to, size, 0);
      held[i % 2] = i;
      return to;
    }
  };

  void backward() const {
    const AxisView &rows = call.rows_transposed, &cols = call.cols_transposed;
    const Blocks<A> blocks(p.batch, rows, cols, p.channels);
    int64_t widest = 1, most_logits = 1;  // label columns that a block of logits belongs to, and logits that these need
    for (int64_t col = 0; col < p.in_width; col += blocks.width) {
      const int64_t first = cols.start[col], last = cols.end(least(p.in_width, col + blocks.width) - 1);
      if (first == last) continue;
      widest = most(widest, last - first);
      most_logits = most(most_logits, call.cols.end(last - 1) - call.cols.start[first]);
    }
    parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
      Columns columns(*this, widest, most_logits);
      Gradients gradients(columns.stride * row);
      const Buffer<A> tile(columns.stride * row), result(blocks.width * row);
      for (int64_t task = begin; task < end; ++task)
        backward_block(blocks.block(task), columns, gradients, tile.data(), result.data());
    });
  }

  void backward_block(const Block& block, Columns& columns, Gradients& gradients, A* tile, A* result) const {
    const AxisView &rows = call.rows_transposed, &cols = call.cols_transposed;
    const int64_t first = cols.start[block.col0], last = cols.end(block.col1 - 1);
    columns.start(block.n, first, last - first);
    gradients.held[0] = gradients.held[1] = -1;
    int64_t finished = block.row0;
    const auto finish_until = [&](int64_t i) {
      for (; finished < i; ++finished) finish_row(block, finished, columns, gradients, tile, result);
    };
    const int64_t row_end = first == last ? rows.start[block.row0] : rows.end(block.row1 - 1);
    for (int64_t h = rows.start[block.row0]; h < row_end; ++h) {
      const int64_t i = call.rows.start[h], size = columns.stride * row;
      finish_until(least(i, block.row1));
      // A row just outside of the block may be among the two: it is made and never stored.
      const A* weights = call.rows.template weights<A>(h);
      A* upper = gradients.at(i, size);
      if (call.rows.taps(h) == 1) {
        columns.row_of(h, [&](const auto& x) { backward_row<1>(columns, h, x, weights, upper, nullptr); });
      } else {
        A* lower = gradients.at(i + 1, size);
        columns.row_of(h, [&](const auto& x) { backward_row<2>(columns, h, x, weights, upper, lower); });
      }
    }
    finish_until(block.row1);
  }

  template <int kTaps, class X>
  void backward_row(const Columns& columns, int64_t h, const X& x, const A* weights, A* upper, A* lower) const {
    const A w0 = weights[0], w1 = kTaps > 1 ? weights[1] : A(0), divisor = static_cast<A>(p.divisor);
    for (int64_t o = 0; o < columns.count; o += lanes) {
      Vec<A> factor = {};
      if (!columns.weights_of(o, &factor)) continue;
      const int64_t w = columns.first + o, valid = least(lanes, columns.count - o);
      const Vec<A> grad = factor * (load_map(p.grad_loss, columns.n, h, w, valid) / divisor);
      factor = factor != 0 ? grad : Vec<A>{};
      const Vec<A> logsumexp = load_map(p.logsumexp, columns.n, h, w, valid);
      for (int64_t c = 0; c < p.channels; ++c) {
        const Vec<A> softmax = factor * exponential(x(c, o) - logsumexp);
        const int64_t at = c * columns.stride + o;
        store(upper + at, load(upper + at) + w0 * softmax);
        if (kTaps > 1) store(lower + at, load(lower + at) + w1 * softmax);
      }
      for (int64_t j = 0; j < lanes; ++j) {
        const int64_t label = columns.labels.data()[o + j], at = label * columns.stride + o + j;
        if (label < 0) continue;
        upper[at] -= w0 * factor[j];
        if (kTaps > 1) lower[at] -= w1 * factor[j];
      }
    }
  }

  // Row i of a block of the gradient: the transposed resampling along the columns.
  void finish_row(const Block& block, int64_t i, const Columns& columns, const Gradients& gradients, A* tile,
                  A* result) const {
    const AxisView& cols = call.cols_transposed;
    A* to = tile_for<S>(p.grad_input, p.channels, block.n, i, block.col0, result);
    if (gradients.held[i % 2] != i) {
      fill_pixels<A>(to, block.width() * row, 0);  // no label row touches it
    } else {
      const A* planes = gradients.planes[i % 2].data();
      for (int64_t o = 0; o < columns.count; o += lanes) {
        for (int64_t c = 0; c < row; c += lanes) {
          Vec<A> values[lanes];
          for (int64_t j = 0; j < lanes; ++j) values[j] = load(planes + (c + j) * columns.stride + o);
          transpose<A>(values);
          for (int64_t j = 0; j < lanes; ++j) store(tile + (o + j) * row + c, values[j]);
        }
      }
      for (int64_t w = block.col0; w < block.col1; ++w)
        combine<false>(cols.template weights<A>(w), cols.taps(w), tile + (cols.start[w] - columns.first) * row, row,
                       row, to + (w - block.col0) * row);
    }
    finish_tile<S>(p.grad_input, p.channels, block.n, i, block.col0, block.width(), to);
  }
};

inline void upsample_cross_entropy(const Call& call, const UpsampleCrossEntropyParams& params) {
  with_storage_type(params.dtype, [&](auto type) { UpsampleCrossEntropy<decltype(type)>(call, params).forward(); });
}

inline void upsample_cross_entropy_backward(const Call& call, const UpsampleCrossEntropyParams& params) {
  with_storage_type(params.dtype, [&](auto type) { UpsampleCrossEntropy<decltype(type)>(call, params).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
