// Tensor memory, and products whose sums are in it (PTX manual, "TensorCore 5th Generation").
//
// A product reads its operands when it is issued, by one thread; its sum lands when somebody waits
// for the mbarrier that it was committed to, as late as it may. What is loaded is in its registers
// at once: where LLVM moves them before the wait, ptxas has those moves wait. Not modelled: fences
// of tcgen05, which Triton leaves out where it has a barrier.
#pragma once

#include "matrices.h"

namespace ptx {

inline int only_lane(const Warp& w, const char* what) {
  if (w.mask == 0 || w.mask & (w.mask - 1)) throw Fault(std::string(what) + " by several threads");
  return __builtin_ctz(w.mask);
}

inline uint32_t address_of(Warp& w, const int* base_and_offset, int lane = 0) {
  return uint32_t(w.lanes(base_and_offset[0])[lane] + base_and_offset[1]);
}

inline void elect(Warp& w, const Instruction& i) {  // a lane; whether it is this one; members
  w.require_every_lane("elect.sync");
  constexpr int kElected = kLanes - 1;  // nobody may rely on which
  for (int l = 0; l < kLanes; ++l) {
    w.lanes(i.operand[0])[l] = kElected;
    w.lanes(i.operand[1])[l] = l == kElected;
  }
}

// --- allocation ------------------------------------------------------------------------------

inline void allocate_tensor_memory(Warp& w, const Instruction& i) {  // where its address goes; n
  w.require_every_lane("tcgen05.alloc");
  Machine& m = *w.machine;
  TensorMemory& tensor = m.tensor;
  if (tensor.n_columns) throw Fault("tensor memory is allocated twice");  // none asks for it
  uint32_t n = uint32_t(w.lanes(i.operand[2])[0]);
  if (n < 32 || n > kTensorColumns || n & (n - 1)) throw Fault("columns of tensor memory");
  tensor.cells.resize(kTensorLanes * kTensorColumns);
  tensor.touched.resize(kTensorLanes * kTensorColumns);
  tensor.n_sums.resize(kTensorLanes * kTensorColumns);
  tensor.n_columns = int(n);
  tensor.first = kTensorColumns - tensor.n_columns;  // not the 0 of a program that is alone
  uint32_t to = address_of(w, i.operand), address = uint32_t(tensor.first);
  uint8_t* place = m.shared_at(to, sizeof address);
  m.touch_shared(to, sizeof address, {w.index, 0, true, false},
                 reinterpret_cast<const uint8_t*>(&address));
  std::memcpy(place, &address, sizeof address);
}

inline void free_tensor_memory(Warp& w, const Instruction& i) {  // its address; n
  w.require_every_lane("tcgen05.dealloc");
  TensorMemory& tensor = w.machine->tensor;
  if (w.lanes(i.operand[0])[0] != uint64_t(tensor.first) ||
      w.lanes(i.operand[1])[0] != uint64_t(tensor.n_columns) || !tensor.n_columns) {
    throw Fault("it frees other tensor memory than it has");
  }
  if (!tensor.products.empty()) throw Fault("it frees the tensor memory of products under way");
  tensor.n_columns = 0;
}

// --- loads and stores ------------------------------------------------------------------------

// Calls visit(n, lane, cell) for register n of each lane. A warp has 32 lanes of the memory: all
// of them, or the same 16 twice, `split` columns apart.
template <int N, bool kTwice, class Visit>
void each_cell(Warp& w, uint32_t address, uint32_t split, Visit visit) {
  uint32_t first = 32 * (w.index % 4), lane = address >> 16;
  if (lane != first && !(kTwice && lane == first + 16)) {
    throw Fault("tensor memory of another warp");
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    uint32_t at = kTwice ? address + (l % 16 << 16) + l / 16 * split : address + (l << 16);
    for (int n = 0; n < N; ++n) visit(n, int(l), w.machine->cell_at(at + n));
  }
}

inline void require_no_load(const Warp& w) {
  if (w.loads_tensor) throw Fault("nobody waits for a load of tensor memory");
}

inline void require_no_sum(const Machine& m, int cell) {
  if (m.tensor.n_sums[cell]) throw Fault("it touches the sum of a product under way");
}

template <int N, bool kTwice>
void load_tensor(Warp& w, const Instruction& i) {  // N registers; base, offset; split
  w.require_every_lane("tcgen05.ld");
  Machine& m = *w.machine;
  uint32_t split = kTwice ? uint32_t(w.lanes(i.operand[N + 2])[0]) : 0;
  each_cell<N, kTwice>(w, address_of(w, i.operand + N), split, [&](int n, int l, int cell) {
    require_no_sum(m, cell);
    m.touch_tensor(cell, {w.index, l, false, false});
    w.lanes(i.operand[n])[l] = m.tensor.cells[cell];
  });
  w.loads_tensor = true;
}

inline void wait_for_tensor_loads(Warp& w, const Instruction&) { w.loads_tensor = false; }

template <int N, bool kTwice>
void store_tensor(Warp& w, const Instruction& i) {  // base, offset; split; N registers
  w.require_every_lane("tcgen05.st");
  require_no_load(w);
  uint32_t split = kTwice ? uint32_t(w.lanes(i.operand[2])[0]) : 0;
  const int* from = i.operand + (kTwice ? 3 : 2);
  each_cell<N, kTwice>(w, address_of(w, i.operand), split, [&](int n, int l, int cell) {
    require_no_sum(*w.machine, cell);
    w.tensor_stores.push_back({cell, uint32_t(w.lanes(from[n])[l])});
  });
}

inline void wait_for_tensor_stores(Warp& w, const Instruction&) {
  Machine& m = *w.machine;
  for (const Cell& cell : w.tensor_stores) {
    require_no_sum(m, cell.index);
    m.touch_tensor(cell.index, {w.index, 0, true, false}, cell.bits);
    m.tensor.cells[cell.index] = cell.bits;
  }
  w.tensor_stores.clear();
}

// --- products --------------------------------------------------------------------------------

// What is multiplied, in 16 of k (PTX manual, "Instruction descriptor", of kind::f16).
struct ProductShape {
  int m, n;
  bool is_bf16, a_transposed, b_transposed;

  explicit ProductShape(uint32_t bits)
      : m(int(bits >> 24 & 31) * 16),
        n(int(bits >> 17 & 63) * 8),
        is_bf16(bits >> 7 & 1),
        a_transposed(bits >> 15 & 1),
        b_transposed(bits >> 16 & 1) {
    uint32_t type = bits >> 7 & 7, sum_type = bits >> 4 & 3, known = 0x1f7f9fb0;
    if (bits & ~known || type > 1 || (bits >> 10 & 7) != type || sum_type != 1) {
      throw Fault("a product of other than halves with a sum of float32");
    }
    if ((m != 64 && m != 128) || n < 8 || n > 256 || n % (m / 8)) throw Fault("a product's shape");
  }

  // 64 rows take half of each warp's lanes, from that of the address on.
  uint32_t lane(int row) const { return uint32_t(m == 64 ? row / 16 * 32 + row % 16 : row); }
};

// a: its descriptor, or base and offset in tensor memory; b's descriptor.
template <class H, bool kAShared>
void read_operands(Warp& w, const int* of_a, int lane, const ProductShape& shape, Product& p) {
  constexpr int kDepth = Product::kDepth;
  Machine& m = *w.machine;
  auto descriptor = [&](int r) {
    uint64_t bits = w.lanes(r)[lane];
    if ((bits >> 46 & 7) != 1) throw Fault("a descriptor that is not of tcgen05");
    return Descriptor(bits);
  };
  if constexpr (kAShared) {
    Descriptor d = descriptor(of_a[0]);
    for (int row = 0; row < p.m; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        p.a.push_back(read_element<H>(w, d, row, k, shape.a_transposed, p.shared));
      }
    }
  } else {
    uint32_t address = address_of(w, of_a, lane);
    for (int row = 0; row < p.m; ++row) {
      for (int pair = 0; pair < kDepth / 2; ++pair) {
        int cell = m.cell_at(address + (shape.lane(row) << 16) + pair);
        require_no_sum(m, cell);
        m.touch_tensor(cell, {w.index, 0, false, false});
        uint32_t bits = m.tensor.cells[cell];
        p.cells.push_back({cell, bits});
        p.a.push_back(to_float(as<H>(bits))), p.a.push_back(to_float(as<H>(bits >> 16)));
      }
    }
  }
  Descriptor d = descriptor(of_a[kAShared ? 1 : 2]);
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < p.n; ++column) {
      p.b.push_back(read_element<H>(w, d, column, k, shape.b_transposed, p.shared));
    }
  }
}

// The sum's base and offset; operands as above; the shape; whether the sum is added to.
template <bool kAShared>
void issue_product(Warp& w, const Instruction& i) {
  constexpr int kBehind = kAShared ? 4 : 5;
  int lane = only_lane(w, "tcgen05.mma");
  require_no_load(w);
  Machine& m = *w.machine;
  ProductShape shape(uint32_t(w.lanes(i.operand[kBehind])[lane]));
  uint32_t to = address_of(w, i.operand, lane);
  bool adds = w.lanes(i.operand[kBehind + 1])[lane] != 0;
  Product p{w.index, shape.m, shape.n, adds, {}, {}, {}, {}, {}};
  auto read = shape.is_bf16 ? read_operands<Bf16, kAShared> : read_operands<_Float16, kAShared>;
  read(w, i.operand + 2, lane, shape, p);
  for (int row = 0; row < p.m; ++row) {
    for (int n = 0; n < p.n; ++n) {
      int cell = p.sums.emplace_back(m.cell_at(to + (shape.lane(row) << 16) + n));
      if (p.adds) m.touch_tensor(cell, {w.index, 0, false, false});
      m.touch_tensor(cell, {w.index, 0, true, false}, Touched::kUnknown);
      ++m.tensor.n_sums[cell];
    }
  }
  m.tensor.products.push_back(std::move(p));
  ++m.tensor.n_issued;
}

inline void finish(Machine& m, const Product& p) {
  for (const Piece& piece : p.shared) finish_reading(m, p.warp, piece);
  for (const Cell& cell : p.cells) {
    if (m.tensor.cells[cell.index] != cell.bits) {
      throw Fault("a product's operand changes before it is done");
    }
  }
  for (int row = 0; row < p.m; ++row) {
    for (int n = 0; n < p.n; ++n) {
      int cell = p.sums[row * p.n + n];
      double sum = p.adds ? as<float>(m.tensor.cells[cell]) : 0.0;
      for (int k = 0; k < Product::kDepth; ++k) {
        sum += double(p.a[row * Product::kDepth + k]) * p.b[k * p.n + n];
      }
      m.tensor.cells[cell] = uint32_t(bits_of(float(sum)));
      m.touch_tensor(cell, {p.warp, 0, true, false}, m.tensor.cells[cell]);
      --m.tensor.n_sums[cell];
    }
  }
}

// --- waiting for products --------------------------------------------------------------------

inline Arrivals& arrivals_at(Machine& m, uint32_t address) {
  auto found = m.arrivals.find(address);
  if (found == m.arrivals.end()) throw Fault("no mbarrier is there");
  return found->second;
}

inline void begin_arrivals(Warp& w, const Instruction& i) {  // base, offset; how many are expected
  int lane = only_lane(w, "mbarrier.init");
  Machine& m = *w.machine;
  uint32_t address = address_of(w, i.operand, lane);
  if (m.arrivals.contains(address)) throw Fault("a mbarrier is there already");
  m.touch_arrivals(address, {w.index, lane, true, false});
  m.arrivals[address] = {uint32_t(w.lanes(i.operand[2])[lane]), 0, 0, {}};
}

inline void end_arrivals(Warp& w, const Instruction& i) {  // base, offset
  int lane = only_lane(w, "mbarrier.inval");
  Machine& m = *w.machine;
  uint32_t address = address_of(w, i.operand, lane);
  if (!arrivals_at(m, address).commits.empty()) throw Fault("nobody waits for a product");
  m.touch_arrivals(address, {w.index, lane, true, false});
  m.arrivals.erase(address);
}

inline void commit_arrival(Warp& w, const Instruction& i) {  // base, offset
  int lane = only_lane(w, "tcgen05.commit");
  Machine& m = *w.machine;
  uint32_t address = address_of(w, i.operand, lane);
  arrivals_at(m, address).commits.push_back(m.tensor.n_issued);
  m.touch_arrivals(address, {w.index, lane, false, false});
  ++m.tensor.n_commits;
}

inline void wait_for_arrivals(Warp& w, const Instruction& i) {  // done; base, offset; parity
  w.require_every_lane("a wait");
  Machine& m = *w.machine;
  TensorMemory& tensor = m.tensor;
  uint32_t address = address_of(w, i.operand + 1), parity = w.lanes(i.operand[3])[0] & 1;
  Arrivals& a = arrivals_at(m, address);
  m.touch_arrivals(address, {w.index, 0, false, false});
  bool is_late = w.n_waits > 0;  // who asks once may hear no
  while (is_late && a.phase % 2 == parity && !a.commits.empty()) {
    for (; tensor.n_finished < a.commits.front(); ++tensor.n_finished) {
      finish(m, tensor.products.front());
      tensor.products.erase(tensor.products.begin());
    }
    a.commits.erase(a.commits.begin());
    if (++a.arrived == a.expected) a.arrived = 0, ++a.phase;
  }
  bool done = a.phase % 2 != parity;
  std::fill_n(w.lanes(i.operand[0]), kLanes, uint64_t(done));
  w.n_waits = done ? 0 : w.n_waits + 1;
  if (!done) w.next = Next::kWait;
}

}  // namespace ptx
