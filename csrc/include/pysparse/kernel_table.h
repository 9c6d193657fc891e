#pragma once
// One table of every compiled kernel. A kernel file registers itself; an operation looks up the
// supported entry of the highest ISA level, or of the level that PYSPARSE_ISA forces.
#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "pysparse/dtype.h"

namespace pysparse {

struct IsaLevel {
  const char* name;
  int rank;  // higher wins; each level contains the ones below
  bool (*supported)();
  // Measured once where an instruction exists on CPUs that run it slower than what it replaces; a
  // level that does not pay is taken only when forced.
  bool (*pays)() = [] { return true; };
};

struct KernelEntry {
  const char* op;
  const char* format;
  DType dtype;
  const IsaLevel* isa;
  const void* kernel;  // of type Op::Kernel, for the Op that registered it
};

std::vector<KernelEntry>& kernels();
std::vector<const IsaLevel*>& isa_levels();

// Limits lookups to a level and those below; "" lifts the limit. Throws for an unknown level and
// for one that this CPU lacks.
void force_isa(std::string_view level);
std::string forced_isa();
std::string active_isa();
unsigned generation();  // grows at each force_isa, so that cached lookups know they are stale
const KernelEntry* best_kernel(std::string_view op, std::string_view format, DType dtype);

struct RegisterIsa {
  explicit RegisterIsa(const IsaLevel& level) { isa_levels().push_back(&level); }
};

// `Op` names an operation: its constants `op` and `format`, and the type `Kernel`.
template <class Op>
struct Register {
  Register(DType dtype, const IsaLevel& isa, const typename Op::Kernel& kernel) {
    kernels().push_back({Op::op, Op::format, dtype, &isa, &kernel});
  }
};

template <class Op>
const typename Op::Kernel& lookup(DType dtype) {
  struct Cached {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<unsigned> generation{0};
  };
  static Cached cache[kDTypes];
  Cached& cached = cache[static_cast<int>(dtype)];
  const unsigned now = generation();
  if (cached.generation.load(std::memory_order_acquire) != now) {
    cached.kernel.store(best_kernel(Op::op, Op::format, dtype)->kernel, std::memory_order_relaxed);
    cached.generation.store(now, std::memory_order_release);
  }
  return *static_cast<const typename Op::Kernel*>(cached.kernel.load(std::memory_order_relaxed));
}

}  // namespace pysparse
