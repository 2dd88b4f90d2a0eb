#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx2,fma")))
#define LCR_BYTES 32
#define LCR_PAIRS 1
#include "reasoning_kernels.h"
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningPairsAvx2 = kReasoningTable;
constexpr ScoringKernels kScoringPairsAvx2 = kScoringTable;

}  // namespace lcr_fast
#endif
