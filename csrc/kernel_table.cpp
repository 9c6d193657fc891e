// The kernel table: registration order does not matter, rank decides.
#include "pysparse/kernel_table.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "pysparse/error.h"

namespace pysparse {
namespace {

std::mutex mutex;
const IsaLevel* forced = nullptr;
std::atomic<unsigned> current_generation{0};

const IsaLevel& level_named(std::string_view name) {
  std::string known;
  for (const IsaLevel* level : isa_levels()) {
    if (name == level->name) return *level;
    known += (known.empty() ? "" : ", ") + std::string(level->name);
  }
  fail("unknown ISA level \"", name, "\"; known: ", known);
}

void read_environment() {
  static std::once_flag once;
  std::call_once(once, [] {
    const char* wanted = std::getenv("PYSPARSE_ISA");
    current_generation = 1;
    if (wanted && *wanted && std::string_view(wanted) != "auto") force_isa(wanted);
  });
}

}  // namespace

std::vector<KernelEntry>& kernels() {
  static std::vector<KernelEntry> table;
  return table;
}

std::vector<const IsaLevel*>& isa_levels() {
  static std::vector<const IsaLevel*> levels;
  return levels;
}

void force_isa(std::string_view name) {
  const IsaLevel* level = nullptr;
  if (!name.empty()) {
    level = &level_named(name);
    check(level->supported(), "ISA level \"", name, "\" is not supported by this CPU");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  forced = level;
  ++current_generation;
}

std::string forced_isa() {
  read_environment();
  const std::lock_guard<std::mutex> lock(mutex);
  return forced ? forced->name : "";
}

std::string active_isa() {
  read_environment();
  const std::lock_guard<std::mutex> lock(mutex);
  if (forced) return forced->name;
  const IsaLevel* best = nullptr;
  for (const IsaLevel* level : isa_levels())
    if (level->supported() && level->pays() && (!best || level->rank > best->rank)) best = level;
  return best ? best->name : "";
}

unsigned generation() {
  read_environment();
  return current_generation.load(std::memory_order_acquire);
}

const KernelEntry* best_kernel(std::string_view op, std::string_view format, DType dtype) {
  read_environment();
  const std::lock_guard<std::mutex> lock(mutex);
  const KernelEntry* best = nullptr;
  for (const KernelEntry& entry : kernels()) {
    if (op != entry.op || format != entry.format || dtype != entry.dtype) continue;
    if (!entry.isa->supported() || (forced && entry.isa->rank > forced->rank)) continue;
    if (entry.isa != forced && !entry.isa->pays()) continue;
    if (!best || entry.isa->rank > best->isa->rank) best = &entry;
  }
  if (!best) fail("no kernel for ", op, " ", format, " ", name(dtype));
  return best;
}

}  // namespace pysparse
