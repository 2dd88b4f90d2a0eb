// Which instruction set the CPU kernels use.
#pragma once
#include <cstdint>

namespace lcr_fast {

// 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with products of bfloat16 pairs.
// LCR_FAST_CPU=baseline|avx2|avx512|avx512bf16 chooses one, read once. Returns -1 where that names
// none, -2 where this CPU lacks it.
int64_t cpu_level();

}  // namespace lcr_fast
