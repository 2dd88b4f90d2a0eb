// How a number of a state or a weight is stored.
#pragma once

namespace lcr_fast {

enum class FloatType { kFloat32, kFloat16, kBFloat16 };

}  // namespace lcr_fast
