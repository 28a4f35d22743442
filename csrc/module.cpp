// gsto_ops._C: what is not a tensor operator. Loading it also registers the operators' kernels.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dispatch.h"
#include "cuda/plan_bindings.h"

namespace py = pybind11;

namespace {

py::list names(const std::vector<const gsto::cpu::Kernels*>& variants) {
  py::list list;
  for (const gsto::cpu::Kernels* kernels : variants) list.append(kernels->name);
  return list;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = std::string("GCC ") + __VERSION__;
#endif
  info["cpp_standard"] = __cplusplus / 100 % 100;
  info["instruction_sets"] = names(gsto::cpu::compiled_kernels());
  info["instruction_sets_here"] = names(gsto::cpu::supported_kernels());
  info["instruction_set"] = gsto::cpu::chosen_kernels().name;
  info["torch_target"] =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "How this extension was compiled, and the instruction set that its CPU kernels use.");
  m.def("use_instruction_set", &gsto::cpu::choose_kernels, py::arg("name"),
        "Makes the CPU kernels use one of build_info()['instruction_sets_here']; ValueError for any other name.");
  gsto::cuda::bind_plans(m);
}
