#define LCR_TARGET
#define LCR_BYTES 16
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingBaseline = {count<Float32>, count<Float64>, count<Float16>,
                                       count<BFloat16>, dots<float>, dots<double>};

}  // namespace lcr_fast
