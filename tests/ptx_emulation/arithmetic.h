// Instructions on registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "machine.h"

namespace ptx {

struct Bf16 {
  uint16_t bits;
};
struct Tf32 {
  uint32_t bits;
};

inline float to_float(Bf16 x) { return as<float>(uint64_t(x.bits) << 16); }
inline float to_float(_Float16 x) { return float(x); }
inline float to_float(Tf32 x) { return as<float>(x.bits & 0xffffe000u); }  // no more is read

inline uint16_t round_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t bits = as<uint32_t>(bits_of(x));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_fp16(float x) { return as<uint16_t>(bits_of(_Float16(x))); }

inline void require_operands(const Instruction& i, int n) {
  if (i.n_operands != n) throw Fault(std::to_string(i.n_operands) + " operands");
}

template <class To, class A, auto F>
void unary(Warp& w, const Instruction& i) {
  require_operands(i, 2);
  uint64_t *d = w.lanes(i.operand[0]), *a = w.lanes(i.operand[1]);
  PTX_EACH_LANE(l) d[l] = bits_of(To(F(as<A>(a[l]))));
}

template <class To, class A, class B, auto F>
void binary(Warp& w, const Instruction& i) {
  require_operands(i, 3);
  uint64_t *d = w.lanes(i.operand[0]), *a = w.lanes(i.operand[1]), *b = w.lanes(i.operand[2]);
  PTX_EACH_LANE(l) d[l] = bits_of(To(F(as<A>(a[l]), as<B>(b[l]))));
}

template <class To, class A, class B, class C, auto F>
void ternary(Warp& w, const Instruction& i) {
  require_operands(i, 4);
  uint64_t *d = w.lanes(i.operand[0]), *a = w.lanes(i.operand[1]), *b = w.lanes(i.operand[2]),
           *c = w.lanes(i.operand[3]);
  PTX_EACH_LANE(l) d[l] = bits_of(To(F(as<A>(a[l]), as<B>(b[l]), as<C>(c[l]))));
}

template <class H>
void greater_pairs(Warp& w, const Instruction& i) {  // two predicates, of the lower half first
  uint64_t *low = w.lanes(i.operand[0]), *high = w.lanes(i.operand[1]), *a = w.lanes(i.operand[2]),
           *b = w.lanes(i.operand[3]);
  PTX_EACH_LANE(l) {
    low[l] = to_float(as<H>(a[l])) > to_float(as<H>(b[l]));
    high[l] = to_float(as<H>(a[l] >> 16)) > to_float(as<H>(b[l] >> 16));
  }
}

inline void select(Warp& w, const Instruction& i) {
  uint64_t *d = w.lanes(i.operand[0]), *a = w.lanes(i.operand[1]), *b = w.lanes(i.operand[2]),
           *p = w.lanes(i.operand[3]);
  PTX_EACH_LANE(l) d[l] = p[l] ? a[l] : b[l];
}

template <class Part, int N>
void pack(Warp& w, const Instruction& i) {
  uint64_t* d = w.lanes(i.operand[0]);
  PTX_EACH_LANE(l) {
    uint64_t whole = 0;
    for (int n = 0; n < N; ++n) {
      whole |= uint64_t(as<Part>(w.lanes(i.operand[1 + n])[l])) << (8 * sizeof(Part) * n);
    }
    d[l] = whole;
  }
}

template <class Part, int N>
void unpack(Warp& w, const Instruction& i) {
  uint64_t whole[kLanes];
  std::memcpy(whole, w.lanes(i.operand[N]), sizeof whole);
  for (int n = 0; n < N; ++n) {
    uint64_t* d = w.lanes(i.operand[n]);
    PTX_EACH_LANE(l) d[l] = Part(whole[l] >> (8 * sizeof(Part) * n));
  }
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int n = 0; n < 4; ++n) {
    uint32_t which = selector >> (4 * n) & 15;
    uint8_t byte = uint8_t(both >> (8 * (which & 7)));
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign
    d |= uint32_t(byte) << (8 * n);
  }
  return d;
}

template <class T>
T extract_bits(T a, uint32_t from, uint32_t length) {
  using Bits = std::make_unsigned_t<T>;
  constexpr uint32_t kLast = 8 * sizeof(T) - 1;
  from &= 255, length &= 255;
  if (length == 0) return 0;
  if constexpr (std::is_signed_v<T>) {
    uint32_t top = std::min(from + length - 1, kLast);
    if (from > kLast) return a < 0 ? -1 : 0;
    return T(Bits(a) << (kLast - top)) >> (kLast - (top - from));
  }
  Bits field = from <= kLast ? Bits(a) >> from : 0;
  return length <= kLast ? field & ((Bits(1) << length) - 1) : field;
}

inline uint32_t reverse_bits(uint32_t a) {
  uint32_t d = 0;
  for (int n = 0; n < 32; ++n) d |= (a >> n & 1) << (31 - n);
  return d;
}

template <bool kButterfly>
void shuffle(Warp& w, const Instruction& i) {  // d, a, lane, clamp and segments, members
  w.require_every_lane("a shuffle");
  uint64_t source[kLanes];
  std::memcpy(source, w.lanes(i.operand[1]), sizeof source);
  uint64_t *d = w.lanes(i.operand[0]), *b = w.lanes(i.operand[2]), *c = w.lanes(i.operand[3]);
  PTX_EACH_LANE(l) {
    uint32_t asked = uint32_t(b[l]) & 31, clamp = uint32_t(c[l]) & 31, segment = c[l] >> 8 & 31;
    uint32_t last = (l & segment) | (clamp & ~segment);
    uint32_t from = kButterfly ? l ^ asked : (l & segment) | (asked & ~segment);
    d[l] = source[from <= last ? from : uint32_t(l)];
  }
}

template <class T, auto F>
void reduce(Warp& w, const Instruction& i) {  // d, a, members
  w.require_every_lane("a reduction");
  const uint64_t* a = w.lanes(i.operand[1]);
  T total = as<T>(a[0]);
  for (int l = 1; l < kLanes; ++l) total = F(total, as<T>(a[l]));
  std::fill_n(w.lanes(i.operand[0]), kLanes, bits_of(total));
}

}  // namespace ptx
