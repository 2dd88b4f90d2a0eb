// Which instruction set the CPU kernels use.
#pragma once
#include <cstdint>

namespace lcr_fast {

// 0 baseline, 1 AVX2, 2 AVX-512.
// LCR_FAST_CPU=baseline|avx2|avx512 chooses one, read once. Returns -1 where that names none, -2
// where this CPU lacks it.
int64_t cpu_level();

}  // namespace lcr_fast
