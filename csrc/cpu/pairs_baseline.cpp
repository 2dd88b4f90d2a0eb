#define LCR_TARGET
#define LCR_BYTES 16
#define LCR_PAIRS 1
#include "reasoning_kernels.h"
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningPairsBaseline = kReasoningTable;
constexpr ScoringKernels kScoringPairsBaseline = kScoringTable;

}  // namespace lcr_fast
