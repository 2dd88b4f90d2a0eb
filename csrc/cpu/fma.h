// Multiply and add: the one operation of which compilers choose the rounding unless told.
//
// The build forbids them to contract a * b + c, so that a number has the same bits whichever
// compiler made the code around it; what should be fused says so.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LCR_TARGET
#error "define LCR_TARGET and LCR_BYTES before including this file"
#endif

#define LCR_INLINE LCR_TARGET __attribute__((always_inline)) static inline

namespace lcr_fast {
namespace {

typedef float Vec __attribute__((vector_size(LCR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(LCR_BYTES)));

// x in every lane. Not added to 0, which would turn -0 into 0.
LCR_INLINE Vec splat(float x) { return x - Vec{}; }
LCR_INLINE DoubleVec splat(double x) { return x - DoubleVec{}; }

// a * b + c, rounded once; twice at the baseline, where not every CPU has the instruction.
LCR_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if LCR_BYTES == 64 && defined(__x86_64__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LCR_BYTES == 32 && defined(__x86_64__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

LCR_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
#if LCR_BYTES == 64 && defined(__x86_64__)
  return (DoubleVec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif LCR_BYTES == 32 && defined(__x86_64__)
  return (DoubleVec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace lcr_fast
