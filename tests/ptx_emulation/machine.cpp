// Executes PTX on a CPU, against the memory of this process.
//
// It shows what no interpreter of the source and no disassembly can: what compiled code computes,
// and whether it may. Faults, with their instruction: memory outside of every argument, misaligned
// addresses, shared or tensor memory that nobody wrote, products before a fence, operands that
// change under them, branches and barriers that part a warp where they must not, and races. A race
// is two accesses to a byte, one of them a write, by two warps with no barrier between them, or by
// two programs; writes of the same value are none. What is asynchronous lasts as long as it may.
//
// Not modelled: the rounding of approximate instructions and the order of a product's sums (both
// are exact here, rounded once), denormals flushed to zero, and whatever ptxas makes of PTX.

#include <cstdio>
#include <memory>
#include <unordered_map>

#include "arithmetic.h"
#include "matrices.h"
#include "memory.h"
#include "tensor_memory.h"

namespace ptx {
namespace {

void nothing(Warp&, const Instruction&) {}

void barrier(Warp& w, const Instruction&) {
  w.require_every_lane("a barrier");
  require_no_load(w);
  ++w.machine->counts.barriers;
  w.next = Next::kBarrier;
}

void leave(Warp& w, const Instruction&) {
  w.require_every_lane("a return");
  w.next = Next::kDone;
}

void branch(Warp& w, const Instruction& i) {
  int to = i.operand[0];
  if (w.mask == w.active) {
    w.at = to - 1;  // it is counted up behind every instruction
  } else {
    w.parted.push_back({w.at + 1, w.active & ~w.mask});
    w.parted.push_back({to, w.mask});
    w.active = 0;
  }
}

enum Special { kThread, kLane, kProgram, kGrid };

template <Special kWhat, int kAxis = 0>
void read_special(Warp& w, const Instruction& i) {
  uint64_t* d = w.lanes(i.operand[0]);
  PTX_EACH_LANE(l) {
    if (kWhat == kThread) d[l] = w.index * kLanes + l;
    if (kWhat == kLane) d[l] = l;
    if (kWhat == kProgram) d[l] = w.machine->program_id[kAxis];
    if (kWhat == kGrid) d[l] = w.machine->grid[kAxis];
  }
}

// --- instructions by name --------------------------------------------------------------------

using Table = std::unordered_map<std::string, Execute>;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using Predicate = uint64_t;

#define ONE(NAME, TO, A, BODY) table[NAME] = unary<TO, A, [](A a) -> TO { return (BODY); }>;
#define TWO(NAME, TO, A, B, BODY) \
  table[NAME] = binary<TO, A, B, [](A a, B b) -> TO { return (BODY); }>;
#define THREE(NAME, TO, A, B, C, BODY) \
  table[NAME] = ternary<TO, A, B, C, [](A a, B b, C c) -> TO { return (BODY); }>;

void add_moves(Table& table) {
  for (const char* type : {"b16", "u16", "s16"}) ONE(std::string("mov.") + type, u16, u16, a)
  for (const char* type : {"b32", "u32", "s32", "f32"}) ONE(std::string("mov.") + type, u32, u32, a)
  for (const char* type : {"b64", "u64", "s64", "f64"}) ONE(std::string("mov.") + type, u64, u64, a)
  for (const char* type : {"b16", "b32", "b64", "f32", "f64"}) {
    table[std::string("selp.") + type] = select;
  }
  table["mov.b32.pack"] = pack<u16, 2>;
  table["mov.b32.unpack"] = unpack<u16, 2>;
  table["mov.b64.pack"] = pack<u32, 2>;
  table["mov.b64.unpack"] = unpack<u32, 2>;
  table["mov.b64.pack4"] = pack<u16, 4>;
  table["mov.b64.unpack4"] = unpack<u16, 4>;
  table["shfl.sync.bfly.b32"] = shuffle<true>;
  table["shfl.sync.idx.b32"] = shuffle<false>;
  table["redux.sync.max.s32"] = reduce<s32, [](s32 a, s32 b) { return std::max(a, b); }>;
  table["redux.sync.min.s32"] = reduce<s32, [](s32 a, s32 b) { return std::min(a, b); }>;
  table["redux.sync.max.u32"] = reduce<u32, [](u32 a, u32 b) { return std::max(a, b); }>;
  table["redux.sync.min.u32"] = reduce<u32, [](u32 a, u32 b) { return std::min(a, b); }>;
  table["redux.sync.add.s32"] = reduce<u32, [](u32 a, u32 b) { return a + b; }>;
  table["redux.sync.or.b32"] = reduce<u32, [](u32 a, u32 b) { return a | b; }>;
  table["redux.sync.and.b32"] = reduce<u32, [](u32 a, u32 b) { return a & b; }>;
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  TWO("setp.eq." + type, Predicate, T, T, a == b)
  TWO("setp.ne." + type, Predicate, T, T, a < b || a > b)  // false of what is no number
  TWO("setp.lt." + type, Predicate, T, T, a < b)
  TWO("setp.le." + type, Predicate, T, T, a <= b)
  TWO("setp.gt." + type, Predicate, T, T, a > b)
  TWO("setp.ge." + type, Predicate, T, T, a >= b)
}

template <class T>
void add_unordered(Table& table, const std::string& type) {  // true of what is no number
  TWO("setp.equ." + type, Predicate, T, T, !(a < b || a > b))
  TWO("setp.neu." + type, Predicate, T, T, !(a == b))
  TWO("setp.ltu." + type, Predicate, T, T, !(a >= b))
  TWO("setp.leu." + type, Predicate, T, T, !(a > b))
  TWO("setp.gtu." + type, Predicate, T, T, !(a <= b))
  TWO("setp.geu." + type, Predicate, T, T, !(a < b))
  TWO("setp.num." + type, Predicate, T, T, a == a && b == b)
  TWO("setp.nan." + type, Predicate, T, T, a != a || b != b)
}

template <class S, class U, class Wide>  // signed, unsigned, and unsigned of at least 32 bits
void add_integers(Table& table, const std::string& bits) {
  constexpr u32 kBits = 8 * sizeof(U);
  for (const std::string& type : {"s" + bits, "u" + bits}) {
    TWO("add." + type, U, U, U, a + b)
    TWO("sub." + type, U, U, U, a - b)
    TWO("mul.lo." + type, U, U, U, Wide(a) * b)
    THREE("mad.lo." + type, U, U, U, U, Wide(a) * b + c)
  }
  TWO("div.s" + bits, S, S, S, b ? a / b : -1)
  TWO("div.u" + bits, U, U, U, b ? a / b : ~U(0))
  TWO("rem.s" + bits, S, S, S, b ? a % b : a)
  TWO("rem.u" + bits, U, U, U, b ? a % b : a)
  TWO("min.s" + bits, S, S, S, std::min(a, b))
  TWO("min.u" + bits, U, U, U, std::min(a, b))
  TWO("max.s" + bits, S, S, S, std::max(a, b))
  TWO("max.u" + bits, U, U, U, std::max(a, b))
  ONE("neg.s" + bits, U, U, -Wide(a))
  ONE("abs.s" + bits, S, S, a < 0 ? -a : a)
  TWO("and.b" + bits, U, U, U, a & b)
  TWO("or.b" + bits, U, U, U, a | b)
  TWO("xor.b" + bits, U, U, U, a ^ b)
  ONE("not.b" + bits, U, U, ~a)
  TWO("shl.b" + bits, U, U, u32, b < kBits ? Wide(a) << b : 0)
  TWO("shr.u" + bits, U, U, u32, b < kBits ? a >> b : 0)
  TWO("shr.b" + bits, U, U, u32, b < kBits ? a >> b : 0)
  TWO("shr.s" + bits, S, S, u32, a >> std::min(b, kBits - 1))
  add_comparisons<S>(table, "s" + bits);
  add_comparisons<U>(table, "u" + bits);
  add_comparisons<U>(table, "b" + bits);
}

void add_more_integers(Table& table) {
  TWO("and.pred", Predicate, Predicate, Predicate, a && b)
  TWO("or.pred", Predicate, Predicate, Predicate, a || b)
  TWO("xor.pred", Predicate, Predicate, Predicate, !a != !b)
  ONE("mov.pred", Predicate, Predicate, a)
  ONE("not.pred", Predicate, Predicate, !a)
  TWO("mul.wide.s16", s32, s16, s16, s32(a) * b)
  TWO("mul.wide.u16", u32, u16, u16, u32(a) * b)
  TWO("mul.wide.s32", s64, s32, s32, s64(a) * b)
  TWO("mul.wide.u32", u64, u32, u32, u64(a) * b)
  THREE("mad.wide.s16", s32, s16, s16, s32, s32(u32(s32(a) * b) + u32(c)))
  THREE("mad.wide.u16", u32, u16, u16, u32, u32(a) * b + c)
  THREE("mad.wide.s32", s64, s32, s32, s64, s64(u64(s64(a) * b) + u64(c)))
  THREE("mad.wide.u32", u64, u32, u32, u64, u64(a) * b + c)
  TWO("mul.hi.s32", s32, s32, s32, s64(a) * b >> 32)
  TWO("mul.hi.u32", u32, u32, u32, u64(a) * b >> 32)
  TWO("mul.hi.u64", u64, u64, u64, static_cast<unsigned __int128>(a) * b >> 64)
  THREE("prmt.b32", u32, u32, u32, u32, permute_bytes(a, b, c))
  THREE("bfe.u32", u32, u32, u32, u32, extract_bits(a, b, c))
  THREE("bfe.s32", s32, s32, u32, u32, extract_bits(a, b, c))
  THREE("bfe.u64", u64, u64, u32, u32, extract_bits(a, b, c))
  THREE("bfe.s64", s64, s64, u32, u32, extract_bits(a, b, c))
  THREE("shf.l.wrap.b32", u32, u32, u32, u32, u32((u64(b) << 32 | a) << (c & 31) >> 32))
  THREE("shf.r.wrap.b32", u32, u32, u32, u32, u32((u64(b) << 32 | a) >> (c & 31)))
  ONE("popc.b32", u32, u32, __builtin_popcount(a))
  ONE("clz.b32", u32, u32, a ? __builtin_clz(a) : 32)
  ONE("brev.b32", u32, u32, reverse_bits(a))
  ONE("cvt.s8.s32", s16, s32, int8_t(a))
  ONE("cvt.s8.s16", s16, s16, int8_t(a))
  ONE("cvt.s16.s8", s16, int8_t, a)
  ONE("cvt.u8.u32", u16, u32, uint8_t(a))
  ONE("cvt.u8.u16", u16, u16, uint8_t(a))
  ONE("cvt.u16.u8", u16, uint8_t, a)
  ONE("cvt.u16.u32", u16, u32, a)
  ONE("cvt.u16.u64", u16, u64, a)
  ONE("cvt.s32.s8", s32, int8_t, a)
  ONE("cvt.s32.s16", s32, s16, a)
  ONE("cvt.u32.u8", u32, uint8_t, a)
  ONE("cvt.u32.u16", u32, u16, a)
  ONE("cvt.u32.u64", u32, u64, a)
  ONE("cvt.s64.s8", s64, int8_t, a)
  ONE("cvt.s64.s16", s64, s16, a)
  ONE("cvt.s64.s32", s64, s32, a)
  ONE("cvt.u64.u8", u64, uint8_t, a)
  ONE("cvt.u64.u16", u64, u16, a)
  ONE("cvt.u64.u32", u64, u32, a)
}

bool is_other(float a, float b) { return a < b || a > b; }  // false of what is no number

template <class H>
void add_halves(Table& table, const std::string& type, auto round) {
  using Round = decltype(round);
  ONE("cvt.f32." + type, float, H, to_float(a))
  ONE("cvt.rn." + type + ".f32", u16, float, Round{}(a))
  TWO("cvt.rn." + type + "x2.f32", u32, float, float, u32(Round{}(a)) << 16 | Round{}(b))
  TWO("setp.gt." + type, Predicate, H, H, to_float(a) > to_float(b))
  TWO("setp.lt." + type, Predicate, H, H, to_float(a) < to_float(b))
  TWO("setp.eq." + type, Predicate, H, H, to_float(a) == to_float(b))
  TWO("setp.ne." + type, Predicate, H, H, is_other(to_float(a), to_float(b)))
  TWO("setp.nan." + type, Predicate, H, H, std::isnan(to_float(a)) || std::isnan(to_float(b)))
  for (const std::string mode : {"", ".rn"}) {  // to float32, as it is added or multiplied
    TWO("add" + mode + ".f32." + type, float, H, float, to_float(a) + b)
    TWO("sub" + mode + ".f32." + type, float, H, float, to_float(a) - b)
    THREE("fma" + mode + ".f32." + type, float, H, H, float, std::fma(to_float(a), to_float(b), c))
  }
  table["setp.gt." + type + "x2"] = greater_pairs<H>;
}

struct Pair {
  float low, high;
};

void add_pairs_of_floats(Table& table) {  // in 64 bits
  for (const std::string mode : {"", ".rn", ".ftz", ".rn.ftz"}) {
    TWO("add" + mode + ".f32x2", Pair, Pair, Pair, (Pair{a.low + b.low, a.high + b.high}))
    TWO("sub" + mode + ".f32x2", Pair, Pair, Pair, (Pair{a.low - b.low, a.high - b.high}))
    TWO("mul" + mode + ".f32x2", Pair, Pair, Pair, (Pair{a.low * b.low, a.high * b.high}))
    THREE("fma" + mode + ".f32x2", Pair, Pair, Pair, Pair,
          (Pair{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)}))
  }
}

int64_t truncate(float a, int64_t low, int64_t high) {
  if (std::isnan(a)) return 0;
  return a <= low ? low : a >= high ? high : int64_t(a);
}

bool some_nan(float a, float b, float c = 0) {
  return std::isnan(a) || std::isnan(b) || std::isnan(c);
}

void add_floats(Table& table) {
  for (const std::string mode : {"", ".rn", ".ftz", ".rn.ftz"}) {
    TWO("add" + mode + ".f32", float, float, float, a + b)
    TWO("sub" + mode + ".f32", float, float, float, a - b)
    TWO("mul" + mode + ".f32", float, float, float, a* b)
    THREE("fma" + mode + ".f32", float, float, float, float, std::fma(a, b, c))
  }
  for (const std::string mode : {"", ".ftz"}) {
    ONE("neg" + mode + ".f32", float, float, -a)
    ONE("abs" + mode + ".f32", float, float, std::fabs(a))
    TWO("max" + mode + ".f32", float, float, float, std::fmax(a, b))
    TWO("min" + mode + ".f32", float, float, float, std::fmin(a, b))
    THREE("max" + mode + ".f32.of_3", float, float, float, float, std::fmax(std::fmax(a, b), c))
    THREE("min" + mode + ".f32.of_3", float, float, float, float, std::fmin(std::fmin(a, b), c))
    TWO("max.NaN" + mode + ".f32", float, float, float, some_nan(a, b) ? NAN : std::fmax(a, b))
    TWO("min.NaN" + mode + ".f32", float, float, float, some_nan(a, b) ? NAN : std::fmin(a, b))
    THREE("max.NaN" + mode + ".f32.of_3", float, float, float, float,
          some_nan(a, b, c) ? NAN : std::fmax(std::fmax(a, b), c))
    THREE("min.NaN" + mode + ".f32.of_3", float, float, float, float,
          some_nan(a, b, c) ? NAN : std::fmin(std::fmin(a, b), c))
    TWO("div.full" + mode + ".f32", float, float, float, a / b)
    TWO("div.approx" + mode + ".f32", float, float, float, a / b)
    ONE("ex2.approx" + mode + ".f32", float, float, std::exp2(double(a)))
    ONE("lg2.approx" + mode + ".f32", float, float, std::log2(double(a)))
    ONE("rcp.approx" + mode + ".f32", float, float, 1.0f / a)
    ONE("sqrt.approx" + mode + ".f32", float, float, std::sqrt(a))
    ONE("rsqrt.approx" + mode + ".f32", float, float, 1.0 / std::sqrt(double(a)))
    add_comparisons<float>(table, (mode.empty() ? "" : "ftz.") + std::string("f32"));
    add_unordered<float>(table, (mode.empty() ? "" : "ftz.") + std::string("f32"));
  }
  TWO("div.rn.f32", float, float, float, a / b)
  ONE("rcp.rn.f32", float, float, 1.0f / a)
  ONE("sqrt.rn.f32", float, float, std::sqrt(a))
  ONE("cvt.rn.f32.s32", float, s32, a)
  ONE("cvt.rn.f32.u32", float, u32, a)
  ONE("cvt.rn.f32.s64", float, s64, a)
  ONE("cvt.rn.f32.u64", float, u64, a)
  ONE("cvt.rn.f32.s16", float, s16, a)
  ONE("cvt.rn.f32.u16", float, u16, a)
  ONE("cvt.rzi.s32.f32", s32, float, truncate(a, INT32_MIN, INT32_MAX))
  ONE("cvt.rzi.u32.f32", u32, float, truncate(a, 0, UINT32_MAX))
  ONE("cvt.rni.f32.f32", float, float, std::nearbyint(a))
  ONE("cvt.rmi.f32.f32", float, float, std::floor(a))
  add_halves<Bf16>(table, "bf16", [](float a) { return round_bf16(a); });
  add_halves<_Float16>(table, "f16", [](float a) { return round_fp16(a); });
}

template <class T>
void add_memory(Table& table, const std::string& type) {
  table["ld.global." + type] = load<T, 1, false>;
  table["ld.global.v2." + type] = load<T, 2, false>;
  table["ld.global.v4." + type] = load<T, 4, false>;
  table["st.global." + type] = store<T, 1, false>;
  table["st.global.v2." + type] = store<T, 2, false>;
  table["st.global.v4." + type] = store<T, 4, false>;
  table["ld.shared." + type] = load<T, 1, true>;
  table["ld.shared.v2." + type] = load<T, 2, true>;
  table["ld.shared.v4." + type] = load<T, 4, true>;
  table["st.shared." + type] = store<T, 1, true>;
  table["st.shared.v2." + type] = store<T, 2, true>;
  table["st.shared.v4." + type] = store<T, 4, true>;
}

void add_more_memory(Table& table) {
  table["ld.param.b8"] = table["ld.param.u8"] = load_argument<u16, uint8_t>;
  table["ld.param.b16"] = table["ld.param.u16"] = load_argument<u16, u16>;
  table["ld.param.b32"] = table["ld.param.u32"] = load_argument<u32, u32>;
  table["ld.param.b64"] = table["ld.param.u64"] = load_argument<u64, u64>;
  table["ld.param.f32"] = load_argument<u32, u32>;
  table["ld.param.s32"] = load_argument<s64, s32>;  // it may fill 64 bits
  table["cp.async.cg.shared.global"] = copy_async;
  table["cp.async.ca.shared.global"] = copy_async;
  table["cp.async.commit_group"] = commit_copies;
  table["cp.async.wait_group"] = wait_for_copies;
}

template <int N>
void add_matrices_of(Table& table) {
  std::string of = ".sync.aligned.m8n8.x" + std::to_string(N);
  table["ldmatrix" + of + ".shared.b16"] = load_matrix<N, false>;
  table["ldmatrix" + of + ".trans.shared.b16"] = load_matrix<N, true>;
  table["stmatrix" + of + ".shared.b16"] = store_matrix<N, false>;
  table["stmatrix" + of + ".trans.shared.b16"] = store_matrix<N, true>;
}

template <int N>
void add_groups_of(Table& table) {  // as program.py calls them
  std::string of = "wgmma.m64n" + std::to_string(N);
  table[of + "k16.bf16.registers"] = multiply_group<Bf16, N, false>;
  table[of + "k16.bf16.shared"] = multiply_group<Bf16, N, true>;
  table[of + "k16.f16.registers"] = multiply_group<_Float16, N, false>;
  table[of + "k16.f16.shared"] = multiply_group<_Float16, N, true>;
  table[of + "k8.tf32.registers"] = multiply_group<Tf32, N, false>;
  table[of + "k8.tf32.shared"] = multiply_group<Tf32, N, true>;
}

void add_matrices(Table& table) {
  add_matrices_of<1>(table), add_matrices_of<2>(table), add_matrices_of<4>(table);
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply<Bf16>;
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = multiply<_Float16>;
  table["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply<Tf32>;
  add_groups_of<8>(table), add_groups_of<16>(table), add_groups_of<32>(table);
  add_groups_of<64>(table), add_groups_of<128>(table), add_groups_of<256>(table);
  table["wgmma.fence.sync.aligned"] = nothing;
  table["wgmma.commit_group.sync.aligned"] = commit_products;
  table["wgmma.wait_group.sync.aligned"] = wait_for_products;
  table["fence.proxy.async.shared"] = fence_proxies;
}

template <int N>
void add_tensor_memory_of(Table& table) {
  std::string of = ".x" + std::to_string(N) + ".b32";
  table["tcgen05.ld.sync.aligned.32x32b" + of] = load_tensor<N, false>;
  table["tcgen05.ld.sync.aligned.16x32bx2" + of] = load_tensor<N, true>;
  table["tcgen05.st.sync.aligned.32x32b" + of] = store_tensor<N, false>;
  table["tcgen05.st.sync.aligned.16x32bx2" + of] = store_tensor<N, true>;
}

void add_tensor_memory(Table& table) {
  add_tensor_memory_of<1>(table), add_tensor_memory_of<2>(table), add_tensor_memory_of<4>(table);
  add_tensor_memory_of<8>(table), add_tensor_memory_of<16>(table), add_tensor_memory_of<32>(table);
  add_tensor_memory_of<64>(table), add_tensor_memory_of<128>(table);
  table["tcgen05.wait::ld.sync.aligned"] = wait_for_tensor_loads;
  table["tcgen05.wait::st.sync.aligned"] = wait_for_tensor_stores;
  std::string group = ".cta_group::1";
  table["tcgen05.alloc" + group + ".sync.aligned.shared.b32"] = allocate_tensor_memory;
  table["tcgen05.dealloc" + group + ".sync.aligned.b32"] = free_tensor_memory;
  table["tcgen05.relinquish_alloc_permit" + group + ".sync.aligned"] = nothing;
  table["tcgen05.mma" + group + ".kind::f16.shared"] = issue_product<true>;
  table["tcgen05.mma" + group + ".kind::f16.tensor"] = issue_product<false>;
  for (const char* where : {"", ".shared::cluster"}) {
    table["tcgen05.commit" + group + ".mbarrier::arrive::one" + where + ".b64"] = commit_arrival;
  }
  table["mbarrier.init.shared.b64"] = begin_arrivals;
  table["mbarrier.inval.shared.b64"] = end_arrivals;
  table["mbarrier.try_wait.parity.shared.b64"] = wait_for_arrivals;
  table["elect.sync"] = elect;
}

void add_control(Table& table) {
  table["bra"] = table["bra.uni"] = branch;
  table["bar.sync"] = table["barrier.sync"] = barrier;
  table["bar.warp.sync"] = nothing;
  table["ret"] = leave;
  table["%tid.x"] = read_special<kThread>;
  table["%laneid"] = read_special<kLane>;
  table["%ctaid.x"] = read_special<kProgram, 0>;
  table["%ctaid.y"] = read_special<kProgram, 1>;
  table["%ctaid.z"] = read_special<kProgram, 2>;
  table["%nctaid.x"] = read_special<kGrid, 0>;
  table["%nctaid.y"] = read_special<kGrid, 1>;
  table["%nctaid.z"] = read_special<kGrid, 2>;
}

Table make_table() {
  Table table;
  add_moves(table);
  add_integers<s16, u16, u32>(table, "16");
  add_integers<s32, u32, u32>(table, "32");
  add_integers<s64, u64, u64>(table, "64");
  add_more_integers(table);
  add_floats(table);
  add_pairs_of_floats(table);
  add_memory<uint8_t>(table, "b8");
  add_memory<u16>(table, "b16");
  add_memory<u32>(table, "b32");
  add_memory<u64>(table, "b64");
  add_more_memory(table);
  add_matrices(table);
  add_tensor_memory(table);
  add_control(table);
  return table;
}

// --- running ---------------------------------------------------------------------------------

void step(Machine& m, Warp& w) {
  const Instruction& i = m.program[w.at];
  m.at = w.at;
  ++m.counts.instructions;
  w.mask = w.active;
  if (i.guard >= 0) {
    const uint64_t* p = w.lanes(i.guard);
    for (int l = 0; l < kLanes; ++l) {
      if ((p[l] != 0) == i.negated) w.mask &= ~(1u << l);
    }
  }
  if (w.mask) i.execute(w, i);
  ++w.at;
  if (!w.parted.empty()) w.join();
}

// Those that wait for products go on when others have committed some.
void run_to_barrier(Machine& m) {
  for (Warp& w : m.warps) w.next = Next::kWait;
  bool some_wait = true;
  for (bool goes_on = true; goes_on && some_wait;) {
    uint64_t n_commits = m.tensor.n_commits;
    goes_on = some_wait = false;
    for (Warp& w : m.warps) {
      if (w.next != Next::kWait) continue;
      w.next = Next::kGo;
      while (w.next == Next::kGo) step(m, w);
      some_wait |= w.next == Next::kWait;
      goes_on |= w.next != Next::kWait || w.n_waits == 1;
    }
    goes_on |= m.tensor.n_commits > n_commits;
  }
  if (some_wait) throw Fault("a wait for products that nobody commits");
}

void run_program(Machine& m) {
  for (Warp& w : m.warps) {
    w.start();
    // Nobody relies on what registers and shared memory held before.
    std::fill(w.registers.begin(), w.registers.end(), 0xcdcdcdcdcdcdcdcdull);
    for (auto [r, value] : m.constants) std::fill_n(w.lanes(r), kLanes, value);
  }
  std::fill(m.shared.begin(), m.shared.end(), uint8_t(0xcd));
  m.arrivals.clear();
  m.tensor.start();
  for (bool done = false; !done;) {
    ++m.when;
    run_to_barrier(m);
    size_t n_done = 0;
    for (const Warp& w : m.warps) n_done += w.next == Next::kDone;
    done = n_done == m.warps.size();
    if (n_done && !done) throw Fault("a barrier that some warps never reach");
  }
  if (m.tensor.n_columns) throw Fault("tensor memory is not freed");
  if (!m.tensor.products.empty()) throw Fault("nobody waits for a product");
}

}  // namespace
}  // namespace ptx

// --- what program.py calls -------------------------------------------------------------------

extern "C" {

// `names` has an instruction a line, `layout` a row for each: the register of its predicate or -1,
// whether that is negated, where its operands begin, how many. `constants` is (register, value).
// Returns null and a sentence if there are instructions that it does not know.
void* ptx_create(const char* names, int n_instructions, const int* layout, const int* operands,
                 int n_operands, const uint64_t* constants, int n_constants, int n_registers,
                 char* error, int error_size) {
  static const ptx::Table table = ptx::make_table();
  auto machine = std::make_unique<ptx::Machine>();
  machine->n_registers = n_registers;
  machine->operands.assign(operands, operands + n_operands);
  for (int c = 0; c < n_constants; ++c) {
    machine->constants.push_back({int(constants[2 * c]), constants[2 * c + 1]});
  }
  std::string unknown;
  for (int n = 0; n < n_instructions; ++n) {
    const char* end = std::strchr(names, '\n');
    std::string name(names, end);
    names = end + 1;
    auto found = table.find(name);
    if (found == table.end()) {
      if (unknown.find(name) == std::string::npos) unknown += " " + name;
      continue;
    }
    const int* row = layout + 4 * n;
    const int* first = machine->operands.data() + row[2];
    machine->program.push_back({found->second, row[0], row[1] != 0, first, row[3]});
  }
  if (unknown.empty()) return machine.release();
  std::snprintf(error, error_size, "instructions that are not emulated:%s", unknown.c_str());
  return nullptr;
}

void ptx_destroy(void* machine) { delete static_cast<ptx::Machine*>(machine); }

// `arguments` are as the entry lays them out. `spans` has the begin and the end of each argument's
// memory. Counts go to `counts`, as they stand in ptx::Counts. Returns -1, or the instruction at
// fault and a sentence.
int ptx_run(void* machine, const uint32_t* grid, int n_warps, int shared_bytes,
            const uint8_t* arguments, int n_bytes, const uint64_t* spans, int n_spans,
            int programs_may_overwrite, uint64_t* counts, char* error, int error_size) {
  auto& m = *static_cast<ptx::Machine*>(machine);
  m.arguments.assign(arguments, arguments + n_bytes);
  m.programs_may_overwrite = programs_may_overwrite != 0;
  std::copy_n(grid, 3, m.grid.begin());
  m.shared.resize(shared_bytes);
  m.shared_touched.assign(shared_bytes, {});
  m.tensor = {};
  m.spans.clear();
  for (int s = 0; s < n_spans; ++s) m.spans.emplace_back(spans[2 * s], spans[2 * s + 1]);
  m.warps.assign(n_warps, {});
  for (int n = 0; n < n_warps; ++n) {
    m.warps[n].machine = &m, m.warps[n].index = n;
    m.warps[n].registers.resize(size_t(m.n_registers) * ptx::kLanes);
  }
  m.counts = {}, m.when = 0, m.program_number = 0;
  auto& [x, y, z] = m.program_id;
  try {
    for (z = 0; z < grid[2]; ++z) {
      for (y = 0; y < grid[1]; ++y) {
        for (x = 0; x < grid[0]; ++x, ++m.program_number) ptx::run_program(m);
      }
    }
  } catch (const ptx::Fault& fault) {
    std::snprintf(error, error_size, "program (%u, %u, %u): %s", x, y, z, fault.what());
    m.spans.clear();
    return m.at;
  }
  m.spans.clear();  // some 40 bytes for each that was touched
  std::memcpy(counts, &m.counts, sizeof m.counts);
  return -1;
}

}  // extern "C"
