#define LCR_TARGET
#define LCR_BYTES 16
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingBaseline = {kCount<Float32>,  kCount<Float64>, kCount<Float16>,
                                             kCount<BFloat16>, dots<float>,     dots<double>};

}  // namespace lcr_fast
