// class_map, forward and backward. Included once per instruction set.
//
//   P = W x + bias
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct ClassMap : GatedPixels<S> {
  using A = Accumulate<S>;
  using Base = GatedPixels<S>;
  using Base::call;
  using Base::out_row;
  using Base::row;

  const ClassMapParams& p;

  ClassMap(const Call& c, const ClassMapParams& params, bool is_backward) : Base(c, params, is_backward), p(params) {}

  void forward() const {
    const Pixels pixels = this->forward_pixels();
    parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
      const typename Base::Input space(*this, pixels.chunk);
      const Buffer<A> product(pixels.chunk * out_row);
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const A* x = is_left_operand<S>(p.input, p.channels)
                         ? nullptr
                         : tile_of<S>(p.input, p.channels, n, h, w, count, space.tile.data());
        A* classes = tile_for<S>(p.output, p.out_channels, n, h, w, product.data());
        this->project_x(n, h, w, count, x, space, classes);
        this->finish_projection(count, nullptr, classes);
        finish_tile<S>(p.output, p.out_channels, n, h, w, count, classes);
      });
    });
  }

  void backward() const {
    const Pixels pixels = this->backward_pixels(this->pixels_per_tile(), p.grad_output);
    Reduction<A> reduction(pixels.tasks(), this->weight_sums());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const typename Base::Workspace space(*this, pixels.chunk);
      const Buffer<A> buffer(pixels.chunk * out_row);
      fill_pixels(space.gate.data(), pixels.chunk, A(1));  // there is none
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const A* grad = tile_of<S>(p.grad_output, p.out_channels, n, h, w, count, buffer.data());
        A* grad_input = tile_for<S>(p.grad_input, p.channels, n, h, w, space.u.data());
        this->projection_backward(grad, nullptr, space.gate.data(), count,
                                  this->summed_x(n, h, w, count, nullptr, space), grad_input, space, sums);
        finish_tile<S>(p.grad_input, p.channels, n, h, w, count, grad_input);
      });
    });
    this->store_weight_gradients(reduction, 0);
  }
};

inline void class_map(const Call& call, const ClassMapParams& params) {
  with_storage_type(params.dtype, [&](auto type) { ClassMap<decltype(type)>(call, params, false).forward(); });
}

inline void class_map_backward(const Call& call, const ClassMapParams& params) {
  with_storage_type(params.dtype, [&](auto type) { ClassMap<decltype(type)>(call, params, true).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
