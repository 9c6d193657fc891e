#pragma once
// 64-byte aligned memory of one thread; it grows and stays.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pysparse {

class Scratch {
 public:
  void* reserve(size_t bytes) {
    if (storage_.size() < bytes + 64) storage_.resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<void*>((address + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<unsigned char> storage_;
};

}  // namespace pysparse
