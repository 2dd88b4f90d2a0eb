#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16")))
#define LCR_BYTES 64
#define LCR_PAIRS 2
#include "reasoning_kernels.h"
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningPairsAvx512Bf16 = kReasoningTable;
constexpr ScoringKernels kScoringPairsAvx512Bf16 = kScoringTable;

}  // namespace lcr_fast
#endif
