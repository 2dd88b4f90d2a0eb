#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16")))
#define LCR_BYTES 64
#define LCR_PAIRS
#include "reasoning_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningAvx512Bf16 = kReasoningTable;

}  // namespace lcr_fast
#endif
