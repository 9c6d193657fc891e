#pragma once
// Types of entries, where float32 is one of them.

namespace pysparse::cuda {

enum class Entry : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace pysparse::cuda
