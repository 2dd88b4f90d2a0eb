#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx2,fma")))
#define LCR_BYTES 32
#include "reasoning_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningAvx2 = kReasoningTable;

}  // namespace lcr_fast
#endif
