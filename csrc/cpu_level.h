// Which instruction set the CPU kernels use.
#pragma once
#include <cstdint>

namespace lcr_fast {

// In order: each has the instructions of those before it. The numbers are those of CPU_LEVELS in
// lcr_fast/ops/ranking.py.
enum class CpuLevel : int64_t {
  kBaseline,
  kAvx2,        // with FMA
  kAvx512,      // F, BW, VL and DQ
  kAvx512Bf16,  // products of bfloat16 pairs, too
};

// The best level of this CPU or the one that LCR_FAST_CPU=baseline|avx2|avx512|avx512bf16 names,
// read once. Fails where that names none, or one that this CPU lacks.
CpuLevel cpu_level();

}  // namespace lcr_fast
