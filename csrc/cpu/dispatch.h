// Which compiled variant of the CPU kernels runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace gsto::cpu {

// The variants in this build, best first; the last one, "baseline", runs everywhere.
std::vector<const Kernels*> compiled_kernels();

// Those of them that this machine can run.
std::vector<const Kernels*> supported_kernels();

// The variant in use: the best that this machine can run, unless choose_kernels() named another.
const Kernels& chosen_kernels();

// Throws std::invalid_argument when the variant is not in the build or cannot run here.
void choose_kernels(const std::string& name);

}  // namespace gsto::cpu
