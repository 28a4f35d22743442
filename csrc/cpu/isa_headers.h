// All headers of the kernels that are not compiled per instruction set. A variant's source includes this before it
// switches instruction sets: otherwise an inline function of std, compiled with AVX-512, could be the copy that the
// linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#ifdef GSTO_X86_VARIANTS
#include <immintrin.h>
#endif
#include "pyramid.h"
