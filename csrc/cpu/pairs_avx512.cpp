#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LCR_BYTES 64
#define LCR_PAIRS 1
#include "reasoning_kernels.h"
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningPairsAvx512 = kReasoningTable;
constexpr ScoringKernels kScoringPairsAvx512 = kScoringTable;

}  // namespace lcr_fast
#endif
