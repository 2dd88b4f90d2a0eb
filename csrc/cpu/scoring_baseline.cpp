#define LCR_TARGET
#define LCR_BYTES 16
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ScoringKernels kScoringBaseline = kScoringTable;

}  // namespace lcr_fast
