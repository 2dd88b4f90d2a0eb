#define LCR_TARGET
#define LCR_BYTES 16
#include "reasoning_kernels.h"

namespace lcr_fast {

constexpr ReasoningKernels kReasoningBaseline = kReasoningTable;

}  // namespace lcr_fast
